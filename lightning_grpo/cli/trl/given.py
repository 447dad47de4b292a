"""The options of a TRL run as its file gives them: read and checked."""

import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_grpo.cli.trl.options import ROWS
from lightning_grpo.errors import UserError

NUMBERS = ("generation_batch_size", "steps_per_generation", "eval_steps", "save_total_limit", "num_generations_eval")
"""Options that are numbers although their default is none."""


def read(path: str) -> dict[str, Any]:
    """The options in a YAML or JSON file.

    Raises:
        UserError: the file can't be read, or contains no mapping.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path} can't be read: {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}"
        ) from error
    try:
        options = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not valid {'JSON' if path.endswith('.json') else 'YAML'}: {error}") from error
    if not isinstance(options, dict):
        raise UserError(f"{path} is not a mapping of options; write it as learning_rate: 1e-6")
    # YAML 1.1 reads 1e-6 as text
    number = re.compile(r"[-+]?[0-9.]+[eE][-+]?[0-9]+")
    return {
        str(name): float(value) if isinstance(value, str) and number.fullmatch(value) else value
        for name, value in options.items()
    }


def check_types(given: Mapping[str, Any]) -> None:
    """Raise `UserError` if an option has a value of the wrong type."""
    for name, value in given.items():
        default = ROWS[name].default if name in ROWS else None
        if value is None or (default is None and name not in NUMBERS):
            continue
        if isinstance(default, bool) and not isinstance(value, bool):
            raise UserError(f"{name} is {value!r}; set true or false")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        needs_number = name in NUMBERS or (isinstance(default, int | float) and not isinstance(default, bool))
        if needs_number and not is_number:
            raise UserError(f"{name} is {value!r}; set a number")


def unknown(names: Sequence[str]) -> Iterator[str]:
    """One message for each of ``names`` that is no option of TRL."""
    for name in names:
        if name not in ROWS:
            near = difflib.get_close_matches(name, ROWS, 1, 0.7)
            yield f"{name} is not an option of TRL 1.16{f'; did you mean {near[0]}?' if near else ''}"
