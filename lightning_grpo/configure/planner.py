"""`plan`: from a task, a model and a device to a complete run with predicted memory, time and cost."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning_grpo.configure import recommendations
from lightning_grpo.configure.calibration import load as load_calibration
from lightning_grpo.configure.choices import FORMER_PRESETS, choose
from lightning_grpo.configure.cost import Efficiency, pass_rate_grid, predict_cost
from lightning_grpo.configure.hardware import find_gpu, shared
from lightning_grpo.configure.memory import predict_memory
from lightning_grpo.configure.memory_savers import MemorySaver, changes_to_fit, fits, flags
from lightning_grpo.configure.overrides import check_overrides
from lightning_grpo.configure.prompts import PromptStatistics, prompt_statistics
from lightning_grpo.configure.recommendations import TASKS, Choice
from lightning_grpo.configure.result import Plan
from lightning_grpo.configure.reward import reward_options
from lightning_grpo.configure.shape import ModelShape, find_model
from lightning_grpo.configure.summary import REFUSE_ABOVE, refusal
from lightning_grpo.configure.workload import Workload
from lightning_grpo.devices import GB, Hardware
from lightning_grpo.errors import UserError
from lightning_grpo.policy.checks import require_context
from lightning_grpo.training.batching import check_batch_arithmetic, divisors

MAX_RANKS_PER_NODE = 8

LARGEST_MICRO_BATCH = {"cpu": 4096, "cuda": 65536}
"""Tokens of the largest micro-batch that is tried, by device type."""


def plan(
    *,
    task: str,
    model: str,
    revision: str | None = None,
    gpu: str | float | None = None,
    num_gpus: int = 1,
    lora: bool = False,
    prompts: str | None = None,
    columns: Mapping[str, str] = {},
    reward: str | None = None,
    budget_hours: float | None = None,
    overrides: Mapping[str, Any] = {},
    preset: Literal["recommended", "baseline"] = "recommended",
    efficiency: Efficiency | None = None,
    calibration: Path | None = None,
) -> Plan:
    """Choose every hyperparameter of a run and predict its memory, time and cost.

    Args:
        task: math_reasoning, code, instruction_following, short_answer or tool_use.
        model: folder or hub name; only its config is read.
        revision: branch, tag or commit of the model on the hub.
        gpu: name, gigabytes of memory, ``"cpu"``, or None for the device of this machine.
        num_gpus: number of devices, with one rank on each.
        lora: train adapters.
        prompts: data set whose prompt lengths (and pass rates) are used, as ``data.source``.
        columns: as ``data.columns``, new name → column of ``prompts``.
        reward: name of a class in lightning_grpo.rewards, or dotted path of your own reward function.
        budget_hours: wall-clock hours, which determine the number of steps.
        overrides: options with fixed values, by names in `overrides.OVERRIDABLE`; the rest is planned around them.
        preset: recommended, or baseline for the fixed values of the baseline presets.
        efficiency: measured shares of the device's peak rates. None takes those in ``calibration``, or assumed ones.
        calibration: file with measurements. None takes the user's.

    Raises:
        UserError: an unknown task, GPU, model, preset or option; an unreadable file; options that contradict each
            other; or a run that cannot fit, with the missing memory and the cheapest changes that fit.
    """
    if task not in TASKS:
        raise UserError(f"--task {task}: unknown task; set one of {', '.join(TASKS)}")
    if num_gpus < 1:
        raise UserError(f"--num_gpus is {num_gpus}; set 1 or more")
    if budget_hours is not None and not 0 < budget_hours < math.inf:
        raise UserError(f"--budget_hours is {budget_hours}; set a number of hours above 0")
    preset = FORMER_PRESETS.get(preset, preset)
    overrides = check_overrides(overrides, lora)
    if overrides.get("strategy") == "fsdp" and num_gpus == 1:
        raise UserError("--set strategy=fsdp needs several devices; set --num_gpus to 2 or more, or leave it out")
    if reward is not None:
        reward_options(reward)
    hardware = shared(find_gpu(gpu), num_gpus)
    shape = find_model(model, revision)
    statistics = prompt_statistics(prompts, model, columns) if prompts else None
    lora = lora or overrides.get("lora_rank", 0) > 0
    choices = choose(task, preset, shape, hardware, num_gpus, lora, statistics)
    if "loss_type" in overrides:
        # the published form of this loss has its own clip range
        choices = {name: choice for name, choice in choices.items() if name not in ("epsilon", "epsilon_high")}
    choices |= {name: Choice(value, "set by --set") for name, value in overrides.items()}
    run = _workload(choices, overrides, task, shape, hardware, num_gpus, lora, statistics)
    run, savers = _make_it_fit(run, hardware, overrides, preset)
    cost = predict_cost(
        run,
        hardware,
        efficiency or load_calibration(run, hardware, calibration),
        reward_seconds=TASKS[task].reward_seconds,
        pass_rates=(statistics and statistics.pass_rates) or pass_rate_grid(TASKS[task].mean_pass_rate),
    )
    return Plan(
        task=task,
        preset=preset,
        model=model,
        revision=revision,
        hardware=hardware,
        workload=run,
        choices=_with_changes(choices, run, overrides),
        memory=predict_memory(run, hardware),
        cost=cost,
        max_steps=overrides.get("max_steps") or _steps(budget_hours, cost.total / run.updates_per_rollout),
        memory_savers=tuple(f"{saver.name} ({' '.join(flags(run, [saver]))})" for saver in savers),
        prompts=prompts,
        columns=dict(columns),
        reward=reward,
        prompt_statistics=statistics,
        budget_hours=budget_hours,
        notes=_notes(run, hardware, task, statistics, reward),
    )


def _workload(
    choices: dict[str, Choice],
    overrides: Mapping[str, Any],
    task: str,
    shape: ModelShape,
    hardware: Hardware,
    ranks: int,
    lora: bool,
    statistics: PromptStatistics | None,
) -> Workload:
    """Return the run that the choices describe, with the largest micro-batch that is tried."""
    value = {name: choice.value for name, choice in choices.items()}
    B, G, mu = (value[name] for name in ("prompts_per_rollout", "num_generations", "num_iterations"))
    if statistics and statistics.count < B:
        raise UserError(
            f"prompts_per_rollout is {B}, but --prompts has {statistics.count} rows; set {statistics.count} or fewer"
        )
    batch = {"prompts_per_rollout": B, "num_generations": G, "num_iterations": mu, "ranks": ranks}
    check_batch_arithmetic(**batch, micro_batch_size=1)
    local = B * G // ranks
    length = value["max_prompt_length"] + value["max_completion_length"]
    micro, accumulate = value.get("micro_batch_size"), value.get("accumulate_grad_batches")
    if micro is None and accumulate is not None:
        micro = local // accumulate if local % accumulate == 0 else 1
    elif micro is None:
        largest = max(1, LARGEST_MICRO_BATCH[hardware.device] // length)
        micro = max(m for m in divisors(local) if m <= largest and (m % G == 0 or G % m == 0))
    if accumulate is None and local % micro == 0:
        accumulate = local // micro
    check_batch_arithmetic(**batch, micro_batch_size=micro, accumulate_grad_batches=accumulate or 1)
    kind = TASKS[task]
    run = Workload(
        **batch,
        shape=shape,
        micro_batch_size=micro,
        accumulate_grad_batches=accumulate,
        prompt_length=value["max_prompt_length"],
        completion_length=value["max_completion_length"],
        mean_fill=kind.mean_fill,
        precision=value["precision"],
        dtype=value["dtype"],
        lora_rank=value.get("lora_rank", 0) if lora else 0,
        gradient_checkpointing=value["gradient_checkpointing"],
        beta=value["beta"],
        optimizer=value["optimizer"],
        learning_rate=value["learning_rate"],
        shards=ranks if value.get("strategy") == "fsdp" else 1,
        engine=value["engine"],
        engine_sleep=value.get("engine_sleep", True),
        engine_sequences=min(local, 256),
        engine_bytes=4 if value["precision"] == "32-true" else 2,
        rollout_class={"vllm": "VLLMRollout", "hf": "HFRollout"}[value["engine"]],
        ranks_per_node=max(n for n in divisors(ranks) if n <= MAX_RANKS_PER_NODE),
    )
    require_context(shape.name, shape.config, run.prompt_length, run.completion_length)
    return replace(run, engine_cache=value.get("engine_cache") or _engine_cache(run, hardware))


def _engine_cache(w: Workload, hardware: Hardware) -> float:
    """Return bytes for all completions of a rank at full length, at most a third of the device."""
    if w.engine != "vllm":
        return 0.0
    share = (w.completion_length + w.prompt_length / w.num_generations) / w.max_length
    return float(max(w.engine_row, min(w.engine_sequences * share * w.engine_row * 1.1, hardware.memory / 3)))


def _make_it_fit(
    w: Workload, hardware: Hardware, overrides: Mapping[str, Any], preset: str
) -> tuple[Workload, tuple[MemorySaver, ...]]:
    """Return a run that fits and what was changed. The values of the baseline preset stay, even if they don't fit."""
    fixed = set(overrides)
    if "dtype" in overrides or "lora_rank" in overrides:
        fixed.add("lora")
    if preset == "baseline":
        fixed |= {"num_generations", "beta", "max_completion_length", "micro_batch_size", "lora"}
    for run, savers in changes_to_fit(w, hardware, fixed, count=1):
        return run, tuple(savers)
    if preset == "baseline":
        return w, ()
    raise UserError(refusal(w, predict_memory(w, hardware), hardware, fixed))


def _with_changes(choices: dict[str, Choice], w: Workload, overrides: Mapping[str, Any]) -> dict[str, Choice]:
    """Return the choices with the batch, and with what was changed to fit."""
    tokens = w.micro_batch_size * w.max_length
    updates = f"{w.updates_per_rollout} step{'s' * (w.updates_per_rollout > 1)} per rollout"
    reasons = {
        "micro_batch_size": f"at most {tokens:,} tokens per forward pass; it changes the memory, not the gradient",
        "accumulate_grad_batches": f"{w.samples_per_update} completions per optimizer step, {updates}",
    }
    out = dict(choices)
    for name, why in reasons.items():
        if name not in out or out[name].value != getattr(w, name):
            out[name] = Choice(getattr(w, name), why)
    changed = {
        "gradient_checkpointing": w.gradient_checkpointing,
        "beta": w.beta,
        "optimizer": w.optimizer,
        "max_completion_length": w.completion_length,
        "dtype": w.dtype,
    }
    for name, value in changed.items():
        if out[name].value != value:
            out[name] = Choice(value, f"changed from {out[name].value} to fit the memory")
    if w.lora_rank and "lora_rank" not in out:
        out["lora_rank"] = Choice(w.lora_rank, "added to fit the memory")
        if "learning_rate" not in overrides:
            out["learning_rate"] = recommendations.learning_rate(w.shape, True)
        if "gradient_clip_val" not in overrides:
            out["gradient_clip_val"] = recommendations.gradient_clip_val(True)
    return out


def _steps(budget_hours: float | None, step_seconds: float) -> int:
    if budget_hours is None:
        return 200
    steps = int(budget_hours * 3600 / step_seconds)
    if steps < 1:
        raise UserError(
            f"--budget_hours {budget_hours:g} is less than one step, which takes {step_seconds / 60:.1f} min; raise it "
            "or lower num_generations, prompts_per_rollout or max_completion_length with --set"
        )
    return steps


def _notes(
    w: Workload, hardware: Hardware, task: str, statistics: PromptStatistics | None, reward: str | None
) -> tuple[str, ...]:
    notes = []
    memory = predict_memory(w, hardware)
    if not fits(memory, hardware):
        notes += refusal(w, memory, hardware).splitlines()
        if memory.peak > REFUSE_ABOVE * hardware.memory:
            notes.append("fit refuses to start such a run unless --prediction.refuse is false")
    if w.ranks > w.ranks_per_node:
        notes.append(f"assuming {w.ranks_per_node} devices per node; set trainer.devices and num_nodes to yours")
    if statistics is None:
        notes.append(f"no --prompts given, so {TASKS[task].source} is used; set data.source to your own prompts")
    elif not reward:
        notes.append(f"{TASKS[task].reward_note}; set --reward to use another (docs/rewards.md)")
    if task == "tool_use":
        notes.append("completions have a single turn until model.environment is set to tools or an environment")
    if w.precision.endswith("16-true") and not w.lora_rank:
        notes.append("parameters in 16 bits lose most of the updates with learning rates of 1e-5 and below to rounding")
    if w.trained_bytes == 4 and not w.lora_rank:
        notes.append(
            f"float32 weights with gradients and Adam's moments take {16 * w.trained / GB:.1f} GB "
            f"({8 * w.trained / GB:.1f} GB in bfloat16, which loses small steps)"
        )
    return tuple(notes)
