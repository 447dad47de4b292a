"""Statistics of a user's prompts: their number, their lengths and, if there is a column for it, their pass rates."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from lightning_grpo.data.encoding import Encoder
from lightning_grpo.data.rows import Row, as_messages, name_columns
from lightning_grpo.data.sources import read
from lightning_grpo.errors import UserError
from lightning_grpo.policy.load import load_tokenizer

CHARACTERS_PER_TOKEN = 3.5
PASS_RATE_COLUMNS = ("pass_rate", "solve_rate", "mean_reward")


@dataclass(frozen=True)
class PromptStatistics:
    """Lengths are in tokens."""

    count: int
    mean_length: float
    longest: int
    pass_rates: tuple[float, ...]
    """Pass rates of the prompts that have one."""
    counted: bool
    """Whether the lengths were counted by the model's tokenizer; otherwise they are estimated from characters."""


def prompt_statistics(source: str, model: str, columns: Mapping[str, str] = {}) -> PromptStatistics:
    """Read prompts as `PromptDataModule` does and measure them, with the model's tokenizer if its folder is local.

    Args:
        source: as ``data.source``.
        model: folder or hub name.
        columns: as ``data.columns``, new name → column.

    Raises:
        UserError: the prompts can't be read, or a pass rate is not a share.
    """
    rows = read(source, args={}, size=None, seed=0, option="--prompts")
    tokenizer = _local_tokenizer(model)
    lengths = _counted(rows, tokenizer, columns) if tokenizer else [_estimated(*row, columns) for row in rows]
    rates = tuple(rate for where, row in rows if (rate := _pass_rate(where, row)) is not None)
    return PromptStatistics(len(rows), mean(lengths), max(lengths), rates, tokenizer is not None)


def _local_tokenizer(model: str) -> Any:
    try:
        tokenizer = load_tokenizer(model) if Path(model).is_dir() else None
    except UserError:
        return None
    # a folder without tokenizer files gives a tokenizer without a vocabulary
    return tokenizer if tokenizer and tokenizer("a prompt")["input_ids"] else None


def _counted(rows: list[tuple[str, Row]], tokenizer: Any, columns: Mapping[str, str]) -> list[int]:
    encoder = Encoder(tokenizer=tokenizer, columns=dict(columns))
    return [len(prompt.ids) for prompts in encoder.encode(rows) for prompt in prompts]


def _estimated(where: str, row: Row, columns: Mapping[str, str]) -> int:
    prompt = as_messages(where, name_columns(where, row, dict(columns))["prompt"], chat=False, system_prompt=None)
    texts = [prompt] if isinstance(prompt, str) else [message["content"] or "" for message in prompt]
    return max(1, round(sum(map(len, texts)) / CHARACTERS_PER_TOKEN))


def _pass_rate(where: str, row: Row) -> float | None:
    column = next((name for name in PASS_RATE_COLUMNS if row.get(name) not in (None, "")), None)
    if column is None:
        return None
    try:
        rate = float(row[column])
    except (TypeError, ValueError):
        rate = -1.0
    if not 0 <= rate <= 1:
        raise UserError(f"{where}: the column {column} is {row[column]!r}; a pass rate is a number in [0, 1]")
    return rate
