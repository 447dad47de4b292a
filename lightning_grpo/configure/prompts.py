"""What a file of prompts says about a run: how many, how long, and, where it has them, how often they are solved."""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from lightning_grpo.errors import UserError
from lightning_grpo.policy.files import loading_options

CHARACTERS_PER_TOKEN = 3.5
PASS_RATE_COLUMNS = ("pass_rate", "solve_rate", "mean_reward")


@dataclass(frozen=True)
class PromptStatistics:
    """Lengths are in tokens."""

    count: int
    mean_length: float
    longest: int
    pass_rates: tuple[float, ...]
    """Of the prompts that have one; empty where the file has no such column."""
    counted: bool
    """By the model's tokenizer; otherwise estimated from characters."""


def read_rows(path: str) -> list[dict[str, Any]]:
    """Rows of a .jsonl or .parquet file.

    Raises:
        ValueError: not there, not readable, or without rows; the message names file and line.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"--prompts {path}: no such file; set a .jsonl or .parquet file")
    if file.suffix == ".parquet":
        from pyarrow import ArrowException, parquet

        try:
            rows = parquet.read_table(file).to_pylist()
        except (ArrowException, OSError) as error:
            raise UserError(f"--prompts {path}: not readable as parquet ({str(error).splitlines()[0]})") from error
    elif file.suffix in (".jsonl", ".json"):
        rows = []
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if line.strip():
                try:
                    rows.append(json.loads(line))
                except json.JSONDecodeError as error:
                    raise UserError(f"--prompts {path}, line {number}: no JSON object ({error})") from error
    else:
        raise UserError(f"--prompts {path}: unknown kind of file {file.suffix!r}; set a .jsonl or .parquet file")
    if not rows:
        raise UserError(f"--prompts {path}: holds no rows")
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or "prompt" not in row:
            raise UserError(f"--prompts {path}, row {number}: has no column 'prompt'")
    return rows


def _tokens(prompt: str | list[dict], tokenizer: Any) -> int:
    if tokenizer is None:
        text = prompt if isinstance(prompt, str) else "".join(str(message["content"]) for message in prompt)
        return max(1, round(len(text) / CHARACTERS_PER_TOKEN))
    if isinstance(prompt, str):
        return len(tokenizer(prompt)["input_ids"])
    text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def prompt_statistics(path: str, model: str) -> PromptStatistics:
    """Read the file and measure it, with the model's own tokenizer where its folder is here."""
    rows = read_rows(path)
    tokenizer = None
    if Path(model).is_dir():
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(model, **loading_options(model))
        except (OSError, ValueError):
            tokenizer = None
        if tokenizer is not None and not tokenizer("a prompt")["input_ids"]:
            # a folder without tokenizer files gives one without a vocabulary
            tokenizer = None
    lengths = [_tokens(row["prompt"], tokenizer) for row in rows]
    column = next((name for name in PASS_RATE_COLUMNS if name in rows[0]), None)
    rates = tuple(float(row[column]) for row in rows if row.get(column) is not None) if column else ()
    if any(not 0 <= rate <= 1 for rate in rates):
        raise UserError(f"--prompts {path}: column {column!r} has values outside [0, 1]; pass rates are shares")
    return PromptStatistics(len(rows), mean(lengths), max(lengths), rates, tokenizer is not None)
