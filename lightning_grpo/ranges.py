"""Range checks of numeric options. NaN is in no range."""

import math
from collections.abc import Mapping
from typing import Any

from lightning_grpo.errors import UserError


def check_ranges(options: Any, ranges: Mapping[str, str], *, prefix: str = "") -> None:
    """Raise `UserError` for the first option outside its range.

    Args:
        options: a mapping, or an object with the options as attributes. Options that are None are not checked.
        ranges: intervals by name, as ``"[0, 1)"`` or ``"(0, inf)"``.
        prefix: prefix of the option names in messages.

    Raises:
        UserError: names the option, its value and its range.
    """
    for name, interval in ranges.items():
        value = options[name] if isinstance(options, Mapping) else getattr(options, name)
        if value is not None and not _contains(interval, value):
            raise UserError(f"{prefix}{name} is {value!r}; set {_in_words(interval)}")


def _contains(interval: str, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    low, high = _bounds(interval)
    above = value >= low if interval.startswith("[") else value > low
    return above and (value <= high if interval.endswith("]") else value < high)


def _in_words(interval: str) -> str:
    low, high = _bounds(interval)
    if high == math.inf:
        if low == -math.inf:
            return "a finite number"
        return f"{low:g} or more" if interval.startswith("[") else f"a number above {low:g}"
    return f"a number in {interval}"


def _bounds(interval: str) -> tuple[float, float]:
    low, high = interval[1:-1].split(",")
    return float(low), float(high)
