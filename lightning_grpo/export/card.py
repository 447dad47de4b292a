"""The model card of an exported policy: what it was trained from, on what, how, and what that changed."""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache

from lightning_grpo.export.checkpoint import SavedPolicy
from lightning_grpo.monitor.terminal import held_out_figures, with_interval

MODEL_OPTIONS = (
    *("num_generations", "num_iterations", "micro_batch_size", "max_prompt_length", "max_completion_length"),
    *("quantization", "lora", "dtype"),
    *("sampling", "objective", "advantage", "optimizer", "lr_schedule", "warmup_steps"),
)
TRAINER_OPTIONS = ("precision", "accumulate_grad_batches", "gradient_clip_val", "devices", "num_nodes")
DATA_OPTIONS = ("source", "source_args", "size", "prompts_per_rollout", "system_prompt", "validation_source")
AVERAGED = 10
"""Optimizer steps whose mean stands for the begin and the end of training."""


def model_card(saved: SavedPolicy, *, is_adapter: bool) -> str:
    """README.md of an export, as the Hugging Face hub reads it.

    Args:
        saved: the policy.
        is_adapter: whether the folder holds an adapter without its base model.
    """
    on_hub = not Path(saved.model).is_dir()
    base = saved.model if on_hub else Path(saved.model).name
    config = _run_config(saved)
    source = _options(config, "data").get("source")
    front = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["grpo", "reinforcement-learning", "lightning_grpo"],
    }
    if on_hub:
        front |= {"base_model": base, "base_model_relation": "adapter" if is_adapter else "finetune"}
    if licence := base_licence(saved.model, saved.base.revision):
        front["license"] = licence
    sections = [
        f"---\n{_yaml(front)}---",
        f"# {base.rpartition('/')[2]} trained with GRPO",
        f"{'A LoRA adapter for' if is_adapter else 'A policy trained from'} "
        f"{f'[{base}](https://huggingface.co/{base})' if on_hub else f'`{base}`'}"
        f"{f' at revision `{saved.base.revision}`' if saved.base.revision else ''}"
        f"{', whose weights were random,' if saved.from_scratch else ''} by Group Relative Policy Optimization (GRPO, "
        f"[arXiv:2402.03300](https://arxiv.org/abs/2402.03300)) with lightning_grpo: {saved.step:,} optimizer steps, "
        f"{saved.completion_tokens:,} completion tokens.",
    ]
    if rows := [*_rewards(saved), *_held_out(saved)]:
        table = "\n".join(f"| {what} | {before} | {after} |" for what, before, after in rows)
        sections.append(f"## Rewards\n\n| | before | after |\n|---|---|---|\n{table}")
    if source is not None:
        sections.append(f"## Data\n\n```yaml\n{_yaml(_chosen(_options(config, 'data'), DATA_OPTIONS))}```")
    hyperparameters = _chosen(_options(config, "model"), MODEL_OPTIONS) | _chosen(
        config.get("trainer") or {}, TRAINER_OPTIONS
    )
    if hyperparameters:
        rewards = [_class_name(reward) for reward in _options(config, "model").get("rewards") or []]
        hyperparameters = {"rewards": rewards} | hyperparameters
        sections.append(f"## Hyperparameters\n\n```yaml\n{_yaml(hyperparameters)}```")
    if saved.versions:
        sections.append("## Versions\n\n" + ", ".join(f"{name} {v}" for name, v in saved.versions.items()))
    return "\n\n".join(sections) + "\n"


def base_licence(model: str, revision: str | None = None) -> str | None:
    """The licence that the base model's card names, in its folder or in the hub's cache; None if that is unknown."""
    card = Path(model) / "README.md"
    if not card.is_file():
        cached = None if Path(model).is_dir() else try_to_load_from_cache(model, "README.md", revision=revision)
        if not isinstance(cached, str):
            return None
        card = Path(cached)
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n")
    try:
        front = yaml.safe_load(parts[1]) if len(parts) > 2 and not parts[0].strip() else None
    except yaml.YAMLError:
        return None
    return front.get("license") if isinstance(front, dict) else None


# ── The run ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def _logs(saved: SavedPolicy) -> Path | None:
    """The folder of the run's logs, also if the run was moved since."""
    folder = saved.summary.get("folder")
    if folder is None:
        return None
    folder = Path(folder)
    moved = saved.path.resolve().parent.parent / "logs" / folder.name
    return next((path for path in (folder, moved) if path.is_dir()), None)


def _run_config(saved: SavedPolicy) -> dict[str, Any]:
    logs = _logs(saved)
    if logs is None or not (logs / "config.yaml").is_file():
        return {}
    return yaml.safe_load((logs / "config.yaml").read_text(encoding="utf-8")) or {}


def _options(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The init_args of a part of the configuration."""
    return (config.get(name) or {}).get("init_args") or {}


def _chosen(options: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """The options that may be published: others can hold addresses and keys."""
    return {name: _without_empty(options[name]) for name in names if options.get(name) not in (None, {}, [])}


def _without_empty(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_empty(inner) for key, inner in value.items() if inner is not None}
    return value


def _class_name(reward: Any) -> str:
    if not isinstance(reward, dict):
        return str(reward)
    function = (reward.get("init_args") or {}).get("function")
    return str(function or reward.get("class_path", reward))


def _rewards(saved: SavedPolicy) -> Iterator[tuple[str, str, str]]:
    """The training reward's mean over the first and the last steps, as far as the checkpoint goes."""
    logs = _logs(saved)
    if logs is None or not (logs / "metrics.csv").is_file():
        return
    with (logs / "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("reward") and int(row["step"]) < saved.step]
    if len(rows) < 2:
        return
    most = min(AVERAGED, len(rows) // 2)
    parts = rows[:most], rows[-most:]
    steps = " and ".join(f"{int(part[0]['step']) + 1}–{int(part[-1]['step']) + 1}" for part in parts)
    before, after = (sum(float(row["reward"]) for row in part) / most for part in parts)
    yield f"training, mean of optimizer steps {steps}", f"{before:.3f}", f"{after:.3f}"


def _held_out(saved: SavedPolicy) -> Iterator[tuple[str, str, str]]:
    before, after = (saved.summary.get(when) or {} for when in ("before", "after"))
    for name in held_out_figures(after):
        first = with_interval(before, name) if name in before else "–"
        last = with_interval(after, name)
        yield f"held-out {name.removeprefix('val/')}, after step {saved.summary['step']}", first, last


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
