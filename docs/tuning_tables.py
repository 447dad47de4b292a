"""The generated tables of docs/tuning.md: ``python docs/tuning_tables.py docs/tuning.md`` renews them."""

import re
import sys
from collections.abc import Callable
from pathlib import Path

from objectives_table import table

from lightning_grpo.configure.cost import zero_variance_share
from lightning_grpo.configure.memory_savers import MEMORY_SAVERS
from lightning_grpo.configure.recommendations import (
    BASELINES,
    FIXED,
    TASKS,
    Choice,
    gradient_clip_val,
    learning_rate,
    lora_rank,
)
from lightning_grpo.configure.shape import find_model
from lightning_grpo.devices import GB, GPUS


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cell(choice: Choice) -> str:
    return f"{_number(choice.value)} ({choice.sources})" if choice.sources else _number(choice.value)


def tasks() -> str:
    """Recommended values by task."""
    reward = lambda task: f"`{task.reward['class_path'].rpartition('.')[2]}`"
    return table(
        ["task", "what it is", "reward", "num_generations", "max_completion_length", "beta"],
        [
            [
                f"`{name}`",
                task.about,
                reward(task),
                *map(_cell, (task.num_generations, task.max_completion_length, task.beta)),
            ]
            for name, task in TASKS.items()
        ],
    )


def baseline() -> str:
    """The baseline presets."""
    options = list(BASELINES["math_reasoning"])
    return table(["task", *options], [[f"`{name}`", *map(_number, b.values())] for name, b in BASELINES.items()])


def learning_rates() -> str:
    """Learning rates by model size."""
    models = ["SmolLM2-135M-Instruct", "Qwen2.5-0.5B-Instruct", "Qwen2.5-1.5B-Instruct", "Qwen2.5-7B-Instruct"]
    models.append("Qwen2.5-32B-Instruct")
    rows = []
    for name in models:
        shape = find_model(name)
        full, lora = learning_rate(shape, False), learning_rate(shape, True)
        rows.append([name, _number(full.value), full.sources, _number(lora.value), lora.sources])
    return table(["model", "full weights", "sources", "LoRA", "sources"], rows)


def other_options() -> str:
    """The other options."""
    choices = FIXED | {"gradient_clip_val": gradient_clip_val(False), "lora.rank": lora_rank()}
    rows = [[f"`{name}`", _number(c.value), c.why, c.sources, c.tradeoff] for name, c in choices.items()]
    return table(["option", "value", "why", "sources", "trade-off"], rows)


def memory_savers() -> str:
    """Changes that save memory, cheapest first."""
    rows = [
        [saver.name, ", ".join(f"`{option}`" for option in saver.options), saver.tradeoff]
        for saver in sorted(MEMORY_SAVERS, key=lambda saver: saver.cost)
    ]
    return table(["change", "options", "trade-off"], rows)


def zero_variance() -> str:
    """Share of groups without a signal, by pass rate and group size."""
    groups = (4, 8, 16, 32)
    rows = [
        [p, *(f"{zero_variance_share([p], G):.0%}" for G in groups)] for p in (0.02, 0.05, 0.1, 0.2, 0.5, 0.8, 0.95)
    ]
    return table(["pass rate", *(f"G = {G}" for G in groups)], rows)


def hardware() -> str:
    """Devices by name."""
    rows = [
        [f"`{key}`", g.name, f"{g.memory / GB:.0f}", f"{g.flops / 1e12:g}", f"{g.bandwidth / 1e12:g}", g.source]
        for key, g in GPUS.items()
    ]
    return table(["--gpu", "card", "GB", "bf16 TFLOP/s", "TB/s", "source"], rows)


TABLES: dict[str, Callable[[], str]] = {
    make.__name__: make
    for make in (tasks, baseline, learning_rates, other_options, memory_savers, zero_variance, hardware)
}


def renewed(page: str) -> str:
    """``page`` with every table between ``<!-- table: NAME -->`` and ``<!-- end -->`` made anew from the code."""
    return re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}",
        page,
        flags=re.DOTALL,
    )


if __name__ == "__main__":
    file = Path(sys.argv[1])
    file.write_text(renewed(file.read_text()))
