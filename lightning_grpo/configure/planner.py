"""`plan`: from a task, a model and a device to a complete run with predicted memory, time and cost."""

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from lightning_grpo.configure import recommendations as evidence
from lightning_grpo.configure.calibration import load as load_calibration
from lightning_grpo.configure.cost import Efficiency, pass_rate_grid, predict_cost
from lightning_grpo.configure.devices import GB, Hardware
from lightning_grpo.configure.hardware import find_gpu, shared
from lightning_grpo.configure.memory import predict_memory
from lightning_grpo.configure.memory_savers import Lever, fits, flags, ways_to_fit
from lightning_grpo.configure.overrides import check_pins
from lightning_grpo.configure.prompts import PromptStatistics, prompt_statistics
from lightning_grpo.configure.recommendations import BASELINES, FIXED, TASKS, Choice
from lightning_grpo.configure.result import Plan
from lightning_grpo.configure.reward import reward_options
from lightning_grpo.configure.shape import ModelShape, find_model
from lightning_grpo.configure.summary import REFUSE_ABOVE, refusal
from lightning_grpo.configure.workload import Workload
from lightning_grpo.errors import UserError
from lightning_grpo.policy.checks import require_context
from lightning_grpo.processor import GAIN
from lightning_grpo.training.batching import check_batch_arithmetic, divisors

NODE = 8
"""Devices of one machine, at most."""

# Largest micro-batch tried: tokens of one forward pass.
LARGEST_MICRO_BATCH = {"cpu": 4096, "cuda": 65536}


# Names of --preset that are accepted until 0.3.
FORMER_PRESETS: dict[str, Literal["baseline"]] = {"classic": "baseline"}


def plan(
    *,
    task: str,
    model: str,
    gpu: str | float | None = None,
    num_gpus: int = 1,
    lora: bool = False,
    prompts: str | None = None,
    reward: str | None = None,
    budget_hours: float | None = None,
    pins: Mapping[str, Any] = {},
    preset: Literal["evidence", "baseline"] = "evidence",
    efficiency: Efficiency | None = None,
    calibration: Path | None = None,
) -> Plan:
    """Choose every hyperparameter of a run and predict its memory, time and cost.

    Args:
        task: math_reasoning, code, instruction_following, short_answer or tool_use.
        model: folder or hub name; only its config is read.
        gpu: name, gigabytes of memory, ``"cpu"``, or None for what is in this machine.
        num_gpus: devices, one rank on each.
        lora: train adapters.
        prompts: .jsonl or .parquet file whose lengths (and pass rates) are taken into account.
        reward: name of a class in lightning_grpo.rewards, or dotted path of a reward function of your own.
        budget_hours: hours on the clock; decides the number of steps.
        pins: options with fixed values, of `pins.PINNABLE`; the rest is planned around them.
        preset: evidence, or baseline for the fixed values of the baseline presets.
        efficiency: measured shares of the device's peak rates; None takes those in ``calibration``, or assumes them.
        calibration: file of measurements; None takes the user's.

    Raises:
        ValueError: unknown task, GPU, model, preset or pin; an unreadable file; pins that contradict each other; or
            a run that cannot fit, with what is short, by how much, and the cheapest ways out.
    """
    if task not in TASKS:
        raise UserError(f"--task {task}: unknown; set one of {', '.join(TASKS)}")
    if num_gpus < 1:
        raise UserError(f"--num_gpus is {num_gpus}; set 1 or more")
    if budget_hours is not None and not 0 < budget_hours < math.inf:
        raise UserError(f"--budget_hours is {budget_hours}; set a number of hours above 0")
    preset = FORMER_PRESETS.get(preset, preset)
    pins = check_pins(pins, lora)
    if pins.get("strategy") == "fsdp" and num_gpus == 1:
        raise UserError("--set strategy=fsdp shards over several devices; set --num_gpus to 2 or more, or leave it out")
    if reward is not None:
        reward_options(reward)
    hardware = shared(find_gpu(gpu), num_gpus)
    shape = find_model(model)
    statistics = prompt_statistics(prompts, model) if prompts else None
    lora = lora or pins.get("lora_rank", 0) > 0
    choices = _choose(task, preset, shape, hardware, num_gpus, lora, statistics)
    if "loss_type" in pins:
        # The name's published form has its own clip range.
        choices = {name: choice for name, choice in choices.items() if name not in ("epsilon", "epsilon_high")}
    choices |= {name: Choice(value, "pinned") for name, value in pins.items()}
    run = _workload(choices, pins, task, shape, hardware, num_gpus, lora, statistics)
    run, levers = _make_it_fit(run, hardware, pins, preset)
    choices = _with_batch(choices, run, pins)

    rates = (
        statistics.pass_rates if statistics and statistics.pass_rates else pass_rate_grid(TASKS[task].mean_pass_rate)
    )
    cost = predict_cost(
        run,
        hardware,
        efficiency or load_calibration(run, hardware, calibration),
        reward_seconds=TASKS[task].reward_seconds,
        pass_rates=rates,
    )
    steps = pins.get("max_steps") or _steps(budget_hours, cost.total / run.updates_per_rollout)
    return Plan(
        task=task,
        preset=preset,
        model=model,
        hardware=hardware,
        workload=run,
        choices=choices,
        memory=predict_memory(run, hardware),
        cost=cost,
        max_steps=steps,
        levers=tuple(f"{lever.name} ({' '.join(flags(run, [lever]))})" for lever in levers),
        prompts=prompts,
        reward=reward,
        prompt_statistics=statistics,
        budget_hours=budget_hours,
        notes=_notes(run, hardware, task, statistics, reward),
    )


def _choose(
    task: str,
    preset: str,
    shape: ModelShape,
    hardware: Hardware,
    ranks: int,
    lora: bool,
    statistics: PromptStatistics | None,
) -> dict[str, Choice]:
    """Every option before memory is looked at."""
    kind = TASKS[task]
    length = Choice(kind.max_prompt_length, "usual for the task; longer prompts are dropped")
    if statistics:
        how = "counted" if statistics.counted else "estimated from characters"
        longest = -(-statistics.longest // 16) * 16
        length = Choice(longest, f"the longest of {statistics.count} prompts ({how}), rounded up to 16s")
    precision = _precision(hardware, lora)
    choices = {
        "num_generations": kind.num_generations,
        "prompts_per_rollout": _prompts_per_rollout(hardware, ranks, statistics),
        "max_prompt_length": length,
        "max_completion_length": kind.max_completion_length,
        "beta": kind.beta,
        "learning_rate": evidence.learning_rate(shape, lora),
        "gradient_clip_val": evidence.gradient_clip_val(lora),
        **FIXED,
        **precision,
        "optimizer": Choice("adamw", "Adam with decoupled weight decay"),
        "engine": _engine(hardware, precision["precision"].value),
        "gradient_checkpointing": Choice(False, "not needed: activations fit"),
        "seed": Choice(0, "any; samples follow from it"),
    }
    if lora:
        choices["lora_rank"] = evidence.lora_rank()
    if preset == "baseline":
        choices |= _baseline(task, hardware, ranks)
    elif preset != "evidence":
        raise UserError(f"--preset {preset}: unknown; set evidence or baseline")
    return choices


def _prompts_per_rollout(hardware: Hardware, ranks: int, statistics: PromptStatistics | None) -> Choice:
    usual = evidence.prompts_per_rollout(hardware.is_cpu, ranks)
    if statistics is None or statistics.count >= usual.value:
        return usual
    most = statistics.count // ranks * ranks
    if not most:
        raise UserError(f"--prompts has {statistics.count} rows, fewer than the {ranks} ranks; each needs one at least")
    return Choice(most, f"as many as there are prompts ({statistics.count}) and {ranks} ranks can share evenly")


def _baseline(task: str, hardware: Hardware, ranks: int) -> dict[str, Choice]:
    if task not in BASELINES:
        raise UserError(f"--preset baseline has no {task}; it knows {', '.join(BASELINES)}. Leave --preset out")
    baseline = BASELINES[task]
    choices = {
        name: Choice(getattr(baseline, name), "baseline preset")
        for name in ("num_generations", "max_completion_length", "beta", "learning_rate")
    }
    group, prompts = baseline.num_generations, 8
    why = "baseline preset: one group a micro-batch"
    if hardware.memory < 23.5 * GB:
        group, prompts = group // 2, prompts * 2
        why = "baseline preset under 24 GB: num_generations halved, accumulation doubled"
    choices["num_generations"] = Choice(group, why)
    choices["micro_batch_size"] = Choice(group, why)
    # a group per rank and micro-batch: more ranks take the place of accumulation
    accumulate = -(-prompts // ranks)
    if ranks > 1:
        why = f"{why}; shared by {ranks} ranks"
    choices["prompts_per_rollout"] = Choice(accumulate * ranks, why)
    choices["accumulate_grad_batches"] = Choice(accumulate, why)
    return choices


def _precision(hardware: Hardware, lora: bool) -> dict[str, Choice]:
    rounding = "in bfloat16 a step of 1e-6 to 1e-5 is mostly lost to rounding (one step of a weight of 0.05 is 2e-4)"
    if not hardware.bf16:
        precision = Choice("16-mixed", "this card has no bfloat16", "", "a loss scale to watch")
    elif hardware.is_cpu and hardware.flops < GAIN * hardware.flops_fp32:
        precision = Choice("32-true", "this processor gains nothing from bfloat16")
    else:
        precision = Choice("bf16-mixed", "matrix products in bfloat16, everything else in float32")
    if lora:
        low = "float16" if precision.value == "16-mixed" else "bfloat16"
        dtype = Choice("float32" if precision.value == "32-true" else low, "frozen weights; the adapters keep float32")
    else:
        dtype = Choice("float32", f"master weights: {rounding}", "", "16 bytes a parameter in all, against 8")
    return {"precision": precision, "dtype": dtype}


def _engine(hardware: Hardware, precision: str) -> Choice:
    if hardware.is_cpu and precision == "32-true":
        return Choice("hf", "in float32 a CPU samples as fast with the policy's own modules, without a copy of them")
    if not hardware.is_cpu or importlib.util.find_spec("vllm"):
        return Choice("vllm", "generation dominates the time, and vLLM generates fastest")
    return Choice("hf", "vLLM is not installed here: samples from the policy itself", "", "slower than vLLM")


def _workload(
    choices: dict[str, Choice],
    pins: Mapping[str, Any],
    task: str,
    shape: ModelShape,
    hardware: Hardware,
    ranks: int,
    lora: bool,
    statistics: PromptStatistics | None,
) -> Workload:
    """The run that the choices describe, its micro-batch the largest that is tried."""
    value = {name: choice.value for name, choice in choices.items()}
    B, G, mu = (value[name] for name in ("prompts_per_rollout", "num_generations", "num_iterations"))
    if statistics and statistics.count < B:
        raise UserError(
            f"prompts_per_rollout is {B}, and --prompts has {statistics.count} rows; set that many or fewer"
        )
    check_batch_arithmetic(prompts_per_rollout=B, num_generations=G, micro_batch_size=1, num_iterations=mu, ranks=ranks)
    local = B * G // ranks
    length = value["max_prompt_length"] + value["max_completion_length"]
    micro, accumulate = value.get("micro_batch_size"), value.get("accumulate_grad_batches")
    if micro is None and accumulate is not None:
        micro = next((m for m in (local // accumulate,) if m and local % accumulate == 0), 1)
    elif micro is None:
        most = max(1, LARGEST_MICRO_BATCH[hardware.device] // length)
        sharing = [m for m in divisors(local) if m <= most and (m % G == 0 or G % m == 0)]
        micro = max(sharing)
    if accumulate is None and local % micro == 0:
        accumulate = local // micro
    check_batch_arithmetic(
        prompts_per_rollout=B,
        num_generations=G,
        micro_batch_size=micro,
        accumulate_grad_batches=accumulate or 1,
        num_iterations=mu,
        ranks=ranks,
    )
    kind = TASKS[task]
    run = Workload(
        shape=shape,
        prompts_per_rollout=B,
        num_generations=G,
        micro_batch_size=micro,
        accumulate_grad_batches=accumulate,
        num_iterations=mu,
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
        ranks=ranks,
        shards=ranks if value.get("strategy") == "fsdp" else 1,
        engine=value["engine"],
        engine_sleep=value.get("engine_sleep", True),
        engine_sequences=min(local, 256),
        engine_bytes=4 if value["precision"] == "32-true" else 2,
        rollout_class={"vllm": "VLLMRollout", "hf": "HFRollout"}[value["engine"]],
        ranks_per_node=max(n for n in divisors(ranks) if n <= NODE),
    )
    require_context(shape.name, shape.config, run.prompt_length, run.completion_length)
    return replace(run, engine_cache=value.get("engine_cache") or _engine_cache(run, hardware))


def _engine_cache(w: Workload, hardware: Hardware) -> float:
    """Room for all of a rank's completions at full length, at most a third of the device."""
    if w.engine != "vllm":
        return 0.0
    share = (w.completion_length + w.prompt_length / w.num_generations) / (w.completion_length + w.prompt_length)
    return float(max(w.engine_row, min(w.engine_sequences * share * w.engine_row * 1.1, hardware.memory / 3)))


def _make_it_fit(
    w: Workload, hardware: Hardware, pins: Mapping[str, Any], preset: str
) -> tuple[Workload, tuple[Lever, ...]]:
    """A run that fits, and what was changed for it. The baseline preset stays as it is written, also if it doesn't."""
    fixed = set(pins)
    if "dtype" in pins or "lora_rank" in pins:
        fixed.add("lora")
    if preset == "baseline":
        fixed |= {"num_generations", "beta", "max_completion_length", "micro_batch_size", "lora"}
    ways = ways_to_fit(w, hardware, fixed, count=1)
    if ways:
        run, levers = ways[0]
        return run, tuple(levers)
    if preset == "baseline":
        return w, ()
    raise UserError(refusal(w, predict_memory(w, hardware), hardware, fixed))


def _with_batch(choices: dict[str, Choice], w: Workload, pins: Mapping[str, Any]) -> dict[str, Choice]:
    """Add what memory decided."""
    tokens = w.micro_batch_size * (w.prompt_length + w.completion_length)
    decided = {
        "micro_batch_size": Choice(
            w.micro_batch_size, f"{tokens:,} tokens a forward pass at most; memory follows it, the gradient does not"
        ),
        "accumulate_grad_batches": Choice(
            w.accumulate_grad_batches,
            f"one optimizer step in {w.samples_per_update} completions, {w.updates_per_rollout} a rollout",
        ),
    }
    out = dict(choices)
    for name, choice in decided.items():
        if name not in pins and (name not in out or out[name].value != choice.value):
            out[name] = choice
    changed = {
        "gradient_checkpointing": w.gradient_checkpointing,
        "beta": w.beta,
        "optimizer": w.optimizer,
        "max_completion_length": w.completion_length,
        "dtype": w.dtype,
    }
    for name, value in changed.items():
        if out[name].value != value:
            out[name] = Choice(value, f"to fit the memory (instead of {out[name].value})")
    if w.lora_rank and "lora_rank" not in out:
        out["lora_rank"] = Choice(w.lora_rank, "to fit the memory")
        if "learning_rate" not in pins:
            out["learning_rate"] = evidence.learning_rate(w.shape, True)
        if "gradient_clip_val" not in pins:
            out["gradient_clip_val"] = evidence.gradient_clip_val(True)
    return out


def _steps(budget_hours: float | None, step_seconds: float) -> int:
    if budget_hours is None:
        return 200
    steps = int(budget_hours * 3600 / step_seconds)
    if steps < 1:
        raise UserError(
            f"--budget_hours {budget_hours:g} is less than one step's {step_seconds / 60:.1f} min; raise it, or lower "
            "num_generations, prompts_per_rollout or max_completion_length with --set"
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
            notes.append("fit refuses such a run; --prediction.refuse false lets it try")
    if w.ranks > w.ranks_per_node:
        notes.append(f"{w.ranks_per_node} devices per node assumed; set trainer.devices and num_nodes to yours")
    if statistics is None:
        notes.append(f"no --prompts given: {TASKS[task].source} stands in; set data.source to your own")
    elif not reward and task in ("code", "instruction_following", "tool_use"):
        notes.append("the reward compares with the column answer; name one that judges your task with --reward")
    if w.precision.endswith("16-true") and not w.lora_rank:
        notes.append("parameters in 16 bits: learning rates of 1e-5 and below are mostly lost to rounding")
    if w.trained_bytes == 4 and not w.lora_rank:
        notes.append(
            f"float32 master weights take {16 * w.trained / GB:.1f} GB with gradients and Adam's moments "
            f"({8 * w.trained / GB:.1f} GB in bfloat16, where small steps are lost)"
        )
    return tuple(notes)
