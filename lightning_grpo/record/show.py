"""A few samples as a table, for the terminal and for loggers."""

import io
import shutil
import sys
import unicodedata
from typing import Any

import pyarrow as pa
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from lightning_grpo.record.schema import EXTRA, REWARD

COUNT = 4
"""Number of completions shown: the best and the worst ones."""


def choose(table: pa.Table) -> pa.Table:
    """The rows with the highest and with the lowest advantages, in this order."""
    advantages = [value or 0.0 for value in table["advantage"].to_pylist()]
    order = sorted(range(table.num_rows), key=lambda row: -advantages[row])
    half = COUNT // 2
    return table.take(list(dict.fromkeys([*order[:half], *order[-half:]])))


def print_samples(table: pa.Table, step: int) -> None:
    """Print rows above the progress bar."""
    tqdm.write(render(table, step, color=sys.stderr.isatty()), file=sys.stderr, end="")


def log_samples(logger: Any, table: pa.Table, step: int) -> None:
    """Log rows to a logger that takes a table, as W&B's, or a text, as TensorBoard's."""
    if hasattr(logger, "log_table"):
        columns, data = _flat(table)
        logger.log_table("samples", columns=columns, data=data, step=step)
    elif hasattr(logger.experiment, "add_text"):
        # four spaces make Markdown show a text as it is
        text = "\n".join(f"    {line}" for line in render(choose(table), step, width=120).splitlines())
        logger.experiment.add_text("samples", text, step)


def escaped(text: str) -> str:
    """The text on one line, with escape sequences for characters that could control a terminal or reorder a line."""
    return "".join(c if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Zl", "Zp") else _escape(c) for c in text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


def render(table: pa.Table, step: int, *, width: int | None = None, color: bool = False) -> str:
    """The rows as lines of text for the terminal."""
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, title=f"samples of step {step}", title_justify="left")
    shown.add_column("prompt", ratio=2, overflow="fold")
    shown.add_column("completion", ratio=4, overflow="fold")
    shown.add_column("reward", justify="right", max_width=40)
    shown.add_column("advantage", justify="right")
    for row in table.to_pylist():
        parts = {_label(name): row[name] for name in _details(table)}
        rewards = "\n".join([_cell(row["reward"]), *(f"{name} {_cell(value)}" for name, value in parts.items())])
        cells = (_end(row["prompt"] or "", 200), _middle(row["completion"], 400), rewards, _cell(row["advantage"]))
        shown.add_row(*map(Text, cells))  # unlike a str, a Text contains no markup
    out = io.StringIO()
    width = width or shutil.get_terminal_size((120, 24)).columns
    Console(file=out, width=width, force_terminal=color, color_system="standard" if color else None).print(shown)
    return "".join(f"{line.rstrip()}\n" for line in out.getvalue().splitlines())


def _flat(table: pa.Table) -> tuple[list[str], list[list[Any]]]:
    """The names of the columns and their values: texts, rewards, advantage, and what rewards logged."""
    names = ["step", "prompt", "completion", "reward", "advantage", *_details(table)]
    return [_label(name) for name in names], [[row[name] for name in names] for row in table.to_pylist()]


def _details(table: pa.Table) -> list[str]:
    """The columns of each reward, unless there is only one, and of what rewards logged."""
    rewards = [name for name in table.column_names if name.startswith(REWARD)]
    return rewards[len(rewards) == 1 :] + [name for name in table.column_names if name.startswith(EXTRA)]


def _label(name: str) -> str:
    return escaped(name.removeprefix(REWARD).removeprefix(EXTRA))


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else _middle(str(value), 60)


def _end(text: str, length: int) -> str:
    return escaped(text if len(text) <= length else "…" + text[1 - length :])


def _middle(text: str, length: int) -> str:
    """The beginning and the end of a long text."""
    return escaped(text if len(text) <= length else f"{text[: length // 2]} … {text[-length // 2 :]}")
