"""Rewards that score one completion at a time, in worker processes or in this one."""

import logging
import pickle
from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from lightning_grpo.errors import RunError, UserError
from lightning_grpo.ranges import check_ranges
from lightning_grpo.rewards.base import Completion, Reward, completion_text
from lightning_grpo.rewards.sandbox.pool import Failure, shared_pool

log = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class TextReward(Reward):
    """Base class of rewards that score each completion by its text and its row alone: override `score`.

    With ``sandbox``, worker processes score: without network, with limited memory, on all cores. A completion that
    exceeds ``seconds``, or whose scoring fails, gets ``failed``, and the others are not delayed.
    """

    sandbox: bool = True
    """Score in worker processes. False: in this process, where nothing limits a completion's time but time_limit."""
    seconds: float = 10.0
    """Limit on the time of one completion in a worker process."""
    failed: ClassVar[float] = 0.0
    """Reward of a completion that can't be scored."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"seconds": "(0, inf)"}, prefix=f"{type(self).__name__}.")
        if self.sandbox:
            try:
                pickle.dumps(self)
            except Exception as error:
                raise UserError(
                    f"the reward {self.name!r} can't be sent to worker processes: {error}; define it in a module "
                    "that can be imported, or set sandbox: false"
                ) from error

    @abstractmethod
    def score(self, text: str, row: Mapping[str, Any]) -> float | None:
        """The reward of one completion; None if it does not apply.

        Args:
            text: of the completion.
            row: further columns of the data set.
        """

    def __call__(self, *, completions: list[Completion], **columns: Any) -> list[float | None]:
        names = [name for name in columns if name not in ("prompts", "completion_ids", "trainer_state")]
        rows = [{name: columns[name][i] for name in names} for i in range(len(completions))]
        jobs = list(zip(map(completion_text, completions), rows, strict=True))
        if not self.sandbox:
            return [self.score(*job) for job in jobs]
        values = shared_pool().map(self.score, jobs, self.seconds)
        failures = Counter(value.reason for value in values if isinstance(value, Failure))
        for reason, count in failures.items():
            log.warning("%d of %d completions get %g from %s: %s", count, len(values), self.failed, self.name, reason)
        if failures.total() == len(values) > 1 and len(failures) == 1 and not any(value.timed_out for value in values):
            raise RunError(f"the reward {self.name!r} scores no completion: {next(iter(failures))}")
        return [self.failed if isinstance(value, Failure) else value for value in values]
