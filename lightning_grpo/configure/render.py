"""Writes a plan as YAML for ``lightning-grpo fit`` and as a table."""

import textwrap
from collections.abc import Iterator
from typing import Any

import yaml

from lightning_grpo.configure.memory_savers import SHARDED
from lightning_grpo.configure.recommendations import TASKS, Choice
from lightning_grpo.configure.result import Plan
from lightning_grpo.configure.reward import reward_options
from lightning_grpo.configure.summary import duration, identity_line, memory_line, time_line
from lightning_grpo.devices import GiB

WIDTH = 108

ENGINES = {"vllm": "lightning_grpo.rollout.VLLMRollout", "hf": "lightning_grpo.rollout.HFRollout"}
OPTIMIZERS = {
    "adamw": "torch.optim.AdamW",
    "adamw_8bit": "bitsandbytes.optim.AdamW8bit",
    "sgd": "torch.optim.SGD",
}


def config(plan: Plan) -> dict[str, Any]:
    """Return the nested options of ``lightning-grpo fit``; chosen values are `Choice` objects."""
    w, c = plan.workload, plan.choices
    trainer: dict[str, Any] = {
        "max_steps": Choice(plan.max_steps, _steps_reason(plan)),
        "accumulate_grad_batches": c["accumulate_grad_batches"],
        "precision": c["precision"],
        "gradient_clip_val": c["gradient_clip_val"],
        "max_epochs": -1,
        "accelerator": "cpu" if plan.hardware.is_cpu else "gpu",
        "devices": w.ranks_per_node,
        "default_root_dir": f"runs/{plan.task}",
    }
    if w.ranks > w.ranks_per_node:
        trainer["num_nodes"] = w.ranks // w.ranks_per_node
    if w.shards > 1:
        trainer["strategy"] = {
            "class_path": SHARDED,
            "init_args": {"data_parallel_size": w.shards, "tensor_parallel_size": 1},
        }
    elif w.ranks > 1:
        trainer["strategy"] = "ddp"
    module: dict[str, Any] = {
        "model": plan.model if plan.revision is None else {"name": plan.model, "revision": plan.revision},
        "num_generations": c["num_generations"],
        "max_prompt_length": c["max_prompt_length"],
        "max_completion_length": c["max_completion_length"],
        "micro_batch_size": c["micro_batch_size"],
        "num_iterations": c["num_iterations"],
        "dtype": c["dtype"],
        "gradient_checkpointing": c["gradient_checkpointing"],
    }
    if w.lora_rank:
        rank = c["lora_rank"]
        if w.quantization:
            module["quantization"] = Choice(w.quantization, "added to fit the memory")
        module["lora"] = {"rank": rank, "alpha": 2.0 * rank.value, "target_modules": "all-linear"}
    optimizer: dict[str, Any] = {"lr": c["learning_rate"]}
    optimizer["weight_decay"] = c["weight_decay"]
    if w.optimizer == "adamw" and w.precision != "16-mixed":
        optimizer["fused"] = True
    module |= {
        "sampling": {"temperature": c["temperature"]},
        "objective": {name: c[name] for name in ("loss_type", "beta", "epsilon", "epsilon_high") if name in c},
        "advantage": {"scale_rewards": c["scale_rewards"]},
        "rewards": [_reward(plan)],
        "optimizer": {"class_path": OPTIMIZERS[w.optimizer], "init_args": optimizer},
        "lr_schedule": c["lr_schedule"],
        "warmup_steps": c["warmup_steps"],
    }
    source: dict[str, Any] = {"source": plan.prompts} if plan.prompts else _procedural(plan)
    if plan.columns:
        source["columns"] = plan.columns
    return {
        "seed_everything": c["seed"].value,
        "trainer": trainer,
        "model": {"class_path": "lightning_grpo.GRPOModule", "init_args": module},
        "data": {
            "class_path": "lightning_grpo.PromptDataModule",
            "init_args": source | {"prompts_per_rollout": c["prompts_per_rollout"]},
        },
        "rollout": {"class_path": Choice(ENGINES[w.engine], c["engine"].why), "init_args": _engine(plan)},
    }


def _reward(plan: Plan) -> dict[str, Any]:
    task = TASKS[plan.task]
    if plan.reward is None:
        return task.reward if plan.prompts else task.source_reward
    return reward_options(plan.reward)


def _procedural(plan: Plan) -> dict[str, Any]:
    task, prompts = TASKS[plan.task], plan.workload.prompts_per_rollout
    source = {"source": task.source, "size": max(1000, 4 * prompts), "chat": True}
    return source | ({"source_args": task.source_args} if task.source_args else {})


def _steps_reason(plan: Plan) -> str:
    if plan.budget_hours:
        return f"expected to take {plan.budget_hours:g} h"
    return f"takes about {duration(plan.hours * 3600)}; check the reward after that"


def _engine(plan: Plan) -> dict[str, Any]:
    w = plan.workload
    completions = w.local_samples * w.engine_shards
    sequences = Choice(w.engine_sequences * w.engine_shards, f"an engine samples {completions} completions per rollout")
    if w.engine == "hf":
        return {"max_num_seqs": sequences}
    settings: dict[str, Any] = {
        "dtype": w.compute_dtype,
        "max_num_seqs": sequences,
        "kv_cache_memory_bytes": Choice(int(w.engine_cache), f"{w.engine_cache / GiB:.1f} GiB of key-value cache"),
    }
    if w.engine_shards > 1:
        settings["tensor_parallel_size"] = Choice(w.engine_shards, "ranks that share the weights of one engine")
    if not plan.hardware.is_cpu:
        settings["sleep_level"] = Choice(2 if w.engine_sleep else 0, "frees the engine's memory for the update")
    return settings


def _scalar(value: Any) -> str:
    # YAML 1.1 reads 1e-06 as text; floats need a point
    if isinstance(value, float):
        text = f"{value:.10g}"
        mantissa, _, exponent = text.partition("e")
        mantissa = mantissa if "." in mantissa else f"{mantissa}.0"
        return f"{mantissa}e{exponent}" if exponent else mantissa
    return (
        yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("\n...\n").strip()
    )


def _lines(node: dict[str, Any], indent: str) -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, Choice):
            yield from _wrap(value.sentence(), f"{indent}# ")
            value = value.value
        if isinstance(value, dict) and value:
            yield f"{indent}{key}:"
            yield from _lines(value, indent + "  ")
        else:
            yield f"{indent}{key}: {_scalar(value)}"


def to_yaml(plan: Plan) -> str:
    """Return a complete configuration with a comment above each choice."""
    head = [
        f"{plan.task} with {plan.model} on {plan.workload.ranks} × {plan.hardware.name} ({plan.preset} preset)",
        identity_line(plan.workload),
        memory_line(plan.memory, plan.hardware),
        time_line(plan.workload, plan.cost, plan.max_steps),
        *(f"changed to fit the memory: {change}" for change in plan.memory_savers),
        *plan.notes,
    ]
    comments = [line for text in head for line in _wrap(text, "# ", "#   ")]
    return "\n".join([*comments, *_lines(config(plan), "")]) + "\n"


def _wrap(text: str, indent: str, hanging: str | None = None) -> list[str]:
    wrapper = textwrap.TextWrapper(WIDTH, indent, hanging or indent, break_long_words=False, break_on_hyphens=False)
    return wrapper.wrap(text)


def table(plan: Plan) -> str:
    """Return a table of the choices with reasons, memory by phase and part, time and cost."""
    out = [f"{plan.task}, {plan.model}, {plan.workload.ranks} × {plan.hardware.name}, {plan.preset} preset", ""]
    width = max(map(len, plan.choices))
    for name, choice in plan.choices.items():
        lines = textwrap.wrap(choice.sentence(), 84)
        out.append(f"{name:<{width}}  {choice.value!s:<12}  {lines[0]}")
        out += [f"{'':<{width}}  {'':<12}  {line}" for line in lines[1:]]
    out += ["", identity_line(plan.workload), "", "memory of one rank (GiB)", *_memory_table(plan), ""]
    out += ["time of a rollout and its updates (s)", *_cost_table(plan), ""]
    out += [f"changed to fit the memory: {change}" for change in plan.memory_savers]
    out += [f"note: {note}" for note in plan.notes]
    return "\n".join(out) + "\n"


def _memory_table(plan: Plan) -> Iterator[str]:
    phases = plan.memory.phases
    parts = list(dict.fromkeys(part for phase in phases.values() for part in phase))
    width = max(map(len, parts))
    yield f"{'':<{width}}  " + "".join(f"{phase:>10}" for phase in phases)
    for part in parts:
        cells = [phases[phase].get(part, 0.0) / GiB for phase in phases]
        if any(cell >= 0.005 for cell in cells):
            yield f"{part:<{width}}  " + "".join(f"{cell:>10.2f}" if cell else f"{'':>10}" for cell in cells)
    yield f"{'total':<{width}}  " + "".join(f"{plan.memory.total(phase) / GiB:>10.2f}" for phase in phases)
    yield f"{'available':<{width}}  {plan.hardware.memory / GiB:>10.2f}"


def _cost_table(plan: Plan) -> Iterator[str]:
    cost = plan.cost
    for phase, seconds in cost.seconds.items():
        yield f"{phase:<10}{seconds:>10.2f}  {seconds / cost.total:>5.0%}"
    low, high = cost.total / cost.efficiency.spread, cost.total * cost.efficiency.spread
    yield f"{'total':<10}{cost.total:>10.2f}  between {low:.1f} and {high:.1f} (efficiencies {cost.efficiency.source})"
    yield (
        f"about {cost.zero_variance:.0%} of groups have equal rewards at the start: {cost.effective:.1f} s per "
        "rollout's worth of groups with a signal"
    )
    yield (
        f"{plan.max_steps} optimizer steps: {plan.tokens / 1e6:,.1f}M tokens sampled, {duration(plan.hours * 3600)}, "
        f"{plan.device_hours:.2f} device-hours"
    )
