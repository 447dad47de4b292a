"""Checkpoints that are saved inside an optimizer step, as when a cluster ends a job: back to the step before."""

from typing import Any

from lightning import Trainer


def rewind(checkpoint: dict[str, Any], trainer: Trainer) -> None:
    """Make a checkpoint, as Lightning filled it, go on with the first micro-batch of the optimizer step that is open.

    The gradients accumulated so far are in no checkpoint; computed again, they are the same.
    """
    progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    back = (progress["current"]["ready"] - 1) % trainer.accumulate_grad_batches + 1
    for part in ("total", "current"):
        progress[part] = dict.fromkeys(progress[part], progress[part]["ready"] - back)
    data = trainer.datamodule
    checkpoint[type(data).__qualname__] = data.state_dict(unfinished=back)
