"""The base class of rewards that worker processes can compute."""

import logging
import pickle
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_grpo.errors import RunError, UserError
from lightning_grpo.ranges import check_ranges
from lightning_grpo.rewards.base import Reward
from lightning_grpo.rewards.sandbox.pool import Failure, shared_pool

log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class WorkerReward(Reward):
    """Base class of rewards that worker processes compute, one completion at a time."""

    sandbox: bool = True
    """Score in worker processes. False: in this process, where nothing limits a completion's time but time_limit."""
    seconds: float = 10.0
    """Limit on the time of one completion in a worker process."""
    failed: ClassVar[float] = 0.0
    """Reward of a completion that can't be scored."""
    raises: ClassVar[bool] = False
    """Whether `score` may raise for any completion. Otherwise a reward that has raised for all of them, and scored
    none yet, ends the run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"seconds": "(0, inf)"}, prefix=f"{type(self).__name__}.")
        self._has_scored = False
        if self.in_workers:
            try:
                pickle.dumps(self)
                if "__main__" in self.modules():
                    raise ValueError("it is defined in the script or notebook that runs")
            except Exception as error:
                raise UserError(
                    f"the reward {self.name!r} can't be sent to worker processes: {error}; define it in a module "
                    "that can be imported, or set sandbox: false"
                ) from error

    @property
    def in_workers(self) -> bool:
        """Whether worker processes score. Override it for options with which no text takes long."""
        return self.sandbox

    def warm_up(self) -> None:
        """Import what `score` needs and what takes long. Called in each worker process when it starts."""

    def modules(self) -> set[str | None]:
        """The modules that worker processes import to compute this reward."""
        return {type(self).__module__}

    def start_workers(self, function: Callable[..., Any]) -> None:
        """Start the worker processes, which load what ``function``, a method of this reward, needs."""
        if self.in_workers:
            shared_pool().prepare(function)

    def evaluate(self, function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], failed: Any) -> list[Any]:
        """What ``function``, a method of this reward, returns for each of the jobs, computed where this reward scores;
        ``failed`` for jobs that fail in a worker process."""
        if not self.in_workers:
            return [function(*job) for job in jobs]
        values = shared_pool().map(function, jobs, self.seconds)
        failures = Counter(value for value in values if isinstance(value, Failure))
        given = "nothing" if failed is None else f"{self.failed:g}"
        for failure, count in failures.most_common(3):
            log.warning("%d of %d completions get %s from %s: %s", count, len(values), given, self.name, failure.reason)
        self._has_scored |= failures.total() < len(values)
        if not (self._has_scored or self.raises or any(failure.limit for failure in failures)) and len(values) > 1:
            raise RunError(f"the reward {self.name!r} scores no completion: {next(iter(failures)).reason}")
        return [failed if isinstance(value, Failure) else value for value in values]
