"""Where in the training a checkpoint is, apart from how Lightning counts, and back again.

Lightning 2.6 infers from its counters at which hook a checkpoint was saved, and what is left to do. Some of these
guesses are wrong: a checkpoint saved after an epoch's end, without validation, resumes with one batch too many. So the
position is read from the counters when a checkpoint is saved, and the counters are written anew when it is loaded, in
the one form that resumes correctly everywhere: that of a checkpoint saved in ``on_train_batch_end``.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from typing import Any, Self

from lightning import Trainer


@dataclass(frozen=True, kw_only=True)
class Position:
    """What has been done when the next batch is fetched."""

    epoch: int
    """Whole epochs."""
    batches: int
    """Batches of the epoch at hand. 0 if it has not begun."""
    total: int
    """Batches of all epochs."""
    steps: int
    """Optimizer steps."""

    @classmethod
    def of(cls, trainer: Trainer, *, unfinished: int, steps: int) -> Self:
        """The position ``unfinished`` batches before the last one that was fetched, after ``steps`` optimizer steps."""
        progress = trainer.fit_loop.epoch_loop.batch_progress
        epochs = trainer.fit_loop.epoch_progress.current
        batches = progress.current.ready - unfinished
        is_open = epochs.processed < epochs.started
        if batches >= trainer.num_training_batches:
            epoch, batches = epochs.started, 0
        else:
            # a run that ends in the middle of an epoch closes it as if it were finished
            epoch = epochs.started - bool(is_open or batches)
        return cls(epoch=epoch, batches=batches, total=progress.total.ready - unfinished, steps=steps)

    def scaled(self, factor: Fraction, *, multiple: int) -> Self:
        """The same position when every batch is divided into ``factor`` batches, of which ``multiple`` make an
        optimizer step."""
        batches, total = (int(count * factor) // multiple * multiple for count in (self.batches, self.total))
        return replace(self, batches=batches, total=total)

    def write(self, checkpoint: dict[str, Any], trainer: Trainer) -> None:
        """Make Lightning go on here when it loads ``checkpoint``."""
        loops = checkpoint["loops"]["fit_loop"]
        # Lightning takes up a loop in the middle in these cases, and begins a new epoch in the others
        restarts = bool(self.batches) or trainer.max_steps != -1
        begun = self.epoch + bool(self.batches)
        epochs = {"ready": begun, "started": begun, "processed": self.epoch, "completed": self.epoch}
        loops["epoch_progress"] = {"total": epochs, "current": dict(epochs)}
        loops["epoch_loop.batch_progress"] = {
            "total": _batches_ended(self.total, restarts),
            "current": _batches_ended(self.batches, restarts),
            "is_last_batch": False,
        }
        loops["epoch_loop.state_dict"]["_batches_that_stepped"] = self.steps - restarts
        optimizer = loops["epoch_loop.automatic_optimization.optim_progress"]["optimizer"]["step"]
        missed = self.steps - optimizer["total"]["completed"]
        for part in optimizer.values():
            part["ready"] = part["completed"] = part["completed"] + missed
        # a validation that was interrupted is not taken up in its middle: its mean would be that of the rest
        for part in loops["epoch_loop.val_loop.batch_progress"].values():
            if isinstance(part, dict):
                part.update(dict.fromkeys(part, 0))

    def state_dict(self) -> dict[str, int]:
        """Numbers only."""
        return asdict(self)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, int]) -> Self:
        """What `state_dict` gave."""
        return cls(**state)


def _batches_ended(count: int, restarts: bool) -> dict[str, int]:
    """Counters of ``count`` batches; if the loop restarts, in the hooks at the end of the last one."""
    return {"ready": count, "started": count, "processed": count, "completed": count - restarts}
