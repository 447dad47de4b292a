"""What reward functions log besides their values, through TRL's arguments ``log_metric`` and ``log_extra``."""

import numbers
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from lightning_grpo.errors import UserError


class RewardLogs:
    """Collects the logs of one call of the rewards.

    Args:
        count: number of completions.
    """

    def __init__(self, count: int) -> None:
        self.metrics: dict[str, list[float]] = {}
        """The values of each metric, one per call of `log_metric`."""
        self.extras: list[dict[str, Any]] = [{} for _ in range(count)]
        """For each completion its value of each column."""

    def arguments(self, rows: Sequence[int]) -> dict[str, Callable[..., None]]:
        """The arguments of a reward that scores the completions ``rows``."""
        return {"log_metric": self.log_metric, "log_extra": partial(self.log_extra, rows)}

    def log_metric(self, name: str, value: float) -> None:
        """Log a number under ``name``. Its mean over all calls in an optimizer step and over all ranks is reported.

        Raises:
            UserError: ``value`` is not a number.
        """
        number = plain(value)
        if not isinstance(number, numbers.Real):
            raise UserError(f"log_metric({name!r}) got {value!r} ({type(value).__name__}); pass a number")
        self.metrics.setdefault(str(name), []).append(float(number))

    def log_extra(self, rows: Sequence[int], column: str, values: Iterable[Any]) -> None:
        """Log a value for each of the completions ``rows``, as a column of the samples. If two rewards log the same
        column, the later one counts.

        Raises:
            UserError: the number of values differs from that of the completions.
        """
        values = [plain(value) for value in values]
        if len(values) != len(rows):
            raise UserError(
                f"log_extra({column!r}) got {len(values)} values for {len(rows)} completions; pass one value for each, "
                "None if there is none"
            )
        for row, value in zip(rows, values, strict=True):
            self.extras[row][str(column)] = value


def plain(value: Any) -> Any:
    """The value as a number, text or None, which any checkpoint can store."""
    if hasattr(value, "item") and getattr(value, "ndim", 0) == 0:
        value = value.item()
    is_plain = value is None or isinstance(value, float | str) or (isinstance(value, int) and abs(value) < 2**53)
    return value if is_plain else str(value)
