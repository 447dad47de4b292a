"""Prompts, environment, rewards, and held-out prompts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_grpo.cli.trl.conversion import Conversion
from lightning_grpo.cli.trl.options import ROWS
from lightning_grpo.errors import UserError

BOXED = "the answer must be in \\boxed{}, numbers are compared exactly, and answers in thoughts do not count"
MATH = {"class_path": "lightning_grpo.rewards.MathMatch", "init_args": {"answer": "solution"}}
FORMAT = {
    "class_path": "lightning_grpo.rewards.RegexFormat",
    "init_args": {"pattern": "<think>(?!.*<think>).*?</think>.*"},
}
REWARDS: dict[str, tuple[dict[str, Any], str]] = {
    "accuracy_reward": (MATH, f"accuracy_reward: {BOXED}"),
    "reasoning_accuracy_reward": (MATH, f"reasoning_accuracy_reward: {BOXED}; completions without thoughts are scored"),
    "think_format_reward": (FORMAT, "think_format_reward: the default pattern requires an answer after the thoughts"),
    "get_soft_overlong_punishment": (
        {
            "class_path": "lightning_grpo.rewards.LengthPenalty",
            "init_args": {"max_completion_length": 1280, "soft_punish_cache": 256},
        },
        "",
    ),
}
"""Rewards of the script ``trl grpo``, and what differs."""


def prompts(run: Conversion) -> None:
    """Prompts of training."""
    sources = {f"source{i}": _source(source) for i, source in enumerate(run["datasets"])}
    if sources:
        run.put("data.source", sources, note="datasets: names of the sources appear in metrics")
    else:
        name = run["dataset_name"]
        note = "" if name else "the data set is an argument of GRPOTrainer in TRL; set yours"
        run.put("data.source", name or "prompts.jsonl", note=note)
        if name and not Path(name).exists():
            run.put("data.source_args", _split(run, run["dataset_train_split"]))
    run.put("data.shuffle", run["shuffle_dataset"])
    if run["dataset_streaming"] or run["streaming"]:
        run.put("data.streaming", True, "dataset_streaming")
    run.copy("chat_template_kwargs", "data_seed")


def environment(run: Conversion) -> None:
    """Tools, and the objects of an environment."""
    tools, factory, calls = run["tools"], run["environment_factory"], run["max_tool_calling_iterations"]
    if isinstance(factory, Mapping):
        run.remarks.append(
            "environment_factory: several environments, chosen by a column of the row, have no equivalent; set the "
            "path of one class, whose reset(**row) may choose"
        )
        factory = None
    if not tools and not factory:
        if calls is not None:
            run.remarks.append(f"max_tool_calling_iterations: {calls} needs tools or environment_factory")
        return
    options: dict[str, Any] = {"tools": [tools] if isinstance(tools, str) else tools} if tools else {}
    options |= {"factory": factory} if factory else {}
    options |= {} if calls is None else {"max_turns": int(calls) + 1}
    kind = "TRLEnvironment" if factory else "ToolEnvironment"
    described = {"class_path": f"lightning_grpo.environments.{kind}", "init_args": options}
    run.put("model.environment", described, "max_tool_calling_iterations")


def rewards(run: Conversion) -> None:
    """Reward functions and their weights."""
    functions = run["reward_funcs"] or []
    functions = [functions] if isinstance(functions, str) else functions
    weights = run["reward_weights"] or [1.0] * len(functions)
    if functions and len(weights) != len(functions):
        raise UserError(f"reward_weights has {len(weights)} values for {len(functions)} reward_funcs")
    converted: list[dict[str, Any]] = []
    notes: list[str] = []
    for name, weight in zip(functions, weights, strict=False):
        reward, note = REWARDS.get(name, ({"class_path": "lightning_grpo.rewards.FunctionReward"}, ""))
        options = dict(reward.get("init_args", {})) | ({"name": name} if name in REWARDS else {"function": name})
        converted.append({**reward, "init_args": options | {"weight": float(weight)}})
        notes += [note] if note else []
    if not converted and isinstance(run["environment_factory"], str):
        notes = ["the method get_reward of the environment; reward functions are arguments of GRPOTrainer in TRL"]
    elif not converted:
        converted = [{"class_path": "lightning_grpo.rewards.ExactMatch"}]
        notes = [
            "the rewards are arguments of GRPOTrainer in TRL; set yours, a function as "
            "{class_path: FunctionReward, init_args: {function: module.name}}"
        ]
    run.put("model.rewards", converted, note="; ".join(notes))


def _source(source: Mapping[str, Any]) -> dict[str, Any]:
    options = {key: source[key] for key in ("name", "data_dir", "data_files", "split") if source.get(key)}
    return {"source": source["path"], "source_args": {"split": "train"} | options}


def _split(run: Conversion, split: str) -> dict[str, Any]:
    return ({"name": run["dataset_config"]} if run["dataset_config"] else {}) | {"split": split}


def evaluation(run: Conversion) -> None:
    """Held-out prompts."""
    strategy = str(run["eval_strategy"])
    if strategy == "no":
        run.put("trainer.limit_val_batches", 0)
        run.put("trainer.num_sanity_val_steps", 0)
        return
    if run["dataset_name"]:
        run.put("data.validation_source", run["dataset_name"])
        run.put("data.validation_args", _split(run, run["dataset_test_split"]))
    else:
        note = "the held-out set is an argument of GRPOTrainer in TRL; here it is drawn from data.source"
        run.put("data.validation_size", 64, note=f"{note}, or set data.validation_source")
    run.put("trainer.num_sanity_val_steps", -1 if run["eval_on_start"] else 0, "eval_on_start")
    if strategy == "steps":
        steps = int(run["eval_steps"] or run["logging_steps"])
        note = f"eval_steps: {steps} optimizer steps; {ROWS['eval_steps'].note}"
        run.put("trainer.val_check_interval", steps * int(run["gradient_accumulation_steps"]), note=note)
        run.put("trainer.check_val_every_n_epoch", None)
    group = int(run["num_generations_eval"] or run["num_generations"])
    run.put("model.validation_generations", group, "num_generations_eval")
    count = max(1, int(run["per_device_eval_batch_size"]) // group)
    run.put("data.validation_batch_size", count, "per_device_eval_batch_size")
