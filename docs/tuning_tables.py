"""The generated tables of docs/tuning.md: ``python docs/tuning_tables.py docs/tuning.md`` renews them."""

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from lightning_grpo.configure.cost import zero_variance_share
from lightning_grpo.configure.devices import GB, GPUS
from lightning_grpo.configure.memory_savers import LEVERS
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


def _markdown(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def _number(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cell(choice: Choice) -> str:
    return f"{_number(choice.value)} ({choice.evidence})" if choice.evidence else _number(choice.value)


def tasks() -> str:
    """What each task asks for."""
    return _markdown(
        ["task", "what it is", "num_generations", "max_completion_length", "beta"],
        [
            [f"`{name}`", task.about, *map(_cell, (task.num_generations, task.max_completion_length, task.beta))]
            for name, task in TASKS.items()
        ],
    )


def baseline() -> str:
    """The baseline presets."""
    return _markdown(
        ["task", "num_generations", "max_completion_length", "beta", "learning_rate"],
        [
            [f"`{name}`", c.num_generations, c.max_completion_length, c.beta, _number(c.learning_rate)]
            for name, c in BASELINES.items()
        ],
    )


def learning_rates() -> str:
    """Learning rates by size."""
    models = ["SmolLM2-135M-Instruct", "Qwen2.5-0.5B-Instruct", "Qwen2.5-1.5B-Instruct", "Qwen2.5-7B-Instruct"]
    models.append("Qwen2.5-32B-Instruct")
    rows = []
    for name in models:
        shape = find_model(name)
        full, lora = learning_rate(shape, False), learning_rate(shape, True)
        rows.append([name, _number(full.value), full.evidence, _number(lora.value), lora.evidence])
    return _markdown(["model", "whole weights", "evidence", "LoRA", "evidence"], rows)


def knobs() -> str:
    """What each option does."""
    choices = FIXED | {"gradient_clip_val": gradient_clip_val(False), "lora.rank": lora_rank()}
    rows = [[f"`{name}`", _number(c.value), c.why, c.evidence, c.trades] for name, c in choices.items()]
    return _markdown(["option", "value", "why", "evidence", "trades"], rows)


def levers() -> str:
    """What makes a run fit, cheapest first."""
    rows = [
        [i, lever.name, ", ".join(f"`{pin}`" for pin in lever.pins), lever.trades] for i, lever in enumerate(LEVERS, 1)
    ]
    return _markdown(["", "lever", "options", "what it trades"], rows)


def zero_variance() -> str:
    """Share of groups without signal by pass rate and group size."""
    groups = (4, 8, 16, 32)
    rows = [
        [p, *(f"{zero_variance_share([p], G):.0%}" for G in groups)] for p in (0.02, 0.05, 0.1, 0.2, 0.5, 0.8, 0.95)
    ]
    return _markdown(["pass rate", *(f"G = {G}" for G in groups)], rows)


def hardware() -> str:
    """The devices known by name."""
    rows = [
        [f"`{key}`", g.name, f"{g.memory / GB:.0f}", f"{g.flops / 1e12:g}", f"{g.bandwidth / 1e12:g}", g.source]
        for key, g in GPUS.items()
    ]
    return _markdown(["--gpu", "card", "GB", "bf16 TFLOP/s", "TB/s", "source"], rows)


TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table for table in (tasks, baseline, learning_rates, knobs, levers, zero_variance, hardware)
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
