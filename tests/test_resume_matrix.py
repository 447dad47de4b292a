"""Every kind of checkpoint, wherever in an epoch it was saved, goes on as the run that was never interrupted."""

from itertools import product

import pytest
from fitting import checksum, data, fit, largest_difference, module, parameters
from lightning import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger

from lightning_grpo.monitor.checkpoint import Checkpoint


class Log(DummyLogger):
    """All that was logged, and at which step."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def log_metrics(self, metrics, step=None):
        kept = {k: v for k, v in metrics.items() if k in ("epoch", "loss", "reward", "grad_norm", "val/reward")}
        self.lines.append((step, kept))


class Interrupt(Callback):
    """Ends the run in the optimizer step, or the validation, after ``steps`` steps, and saves where it was."""

    def __init__(self, steps, path, hook="on_after_backward"):
        self.steps, self.path = steps, path
        setattr(self, hook, self.end)

    def end(self, trainer, *args):
        if trainer.global_step == self.steps:
            raise InterruptedError

    def on_exception(self, trainer, pl_module, exception):
        trainer.save_checkpoint(self.path)


class Runs:
    """Rollouts of two optimizer steps, of ``accumulate`` micro-batches each."""

    def __init__(self, root, model, *, accumulate, rollouts, validates):
        self.root, self.model, self.accumulate = root, model, accumulate
        self.prompts = {"size": 8 * rollouts + 1 + 3 * validates, "validation_size": 3 * validates}
        self.trainer = {"limit_val_batches": 1.0 * validates, "num_sanity_val_steps": 0, "enable_checkpointing": True}
        self.end = 2 * rollouts
        """Optimizer steps of an epoch."""

    def fit(self, name, steps, resume=None, callbacks=(), **trainer):
        policy = module(self.model, rewards=[checksum], micro_batch_size=16 // self.accumulate)
        log = Log()
        callbacks = callbacks or [Checkpoint(str(self.root / name), every_n_train_steps=100)]
        fit(
            self.root / name, policy, data(**self.prompts), steps=steps, accumulate=self.accumulate, logger=log,
            log_every_n_steps=1, ckpt_path=resume and str(resume), callbacks=callbacks, **self.trainer | trainer,
        )  # fmt: skip
        return log.lines, parameters(policy), policy.trainer.current_epoch

    def saved(self, kind, steps):
        """A checkpoint after ``steps`` optimizer steps."""
        if kind == "periodic":
            return self.root / "whole" / f"step-{steps:06d}.ckpt"
        if kind == "epoch end":
            return self.root / "epochs" / f"{steps}.ckpt"
        if kind == "finished":
            self.fit(f"finished-{steps}", steps)
            return self.root / f"finished-{steps}" / "last.ckpt"
        path = self.root / f"{kind}-{steps}.ckpt"
        hook = "on_validation_batch_end" if kind == "validating" else "on_after_backward"
        with pytest.raises(InterruptedError):
            self.fit(f"{kind}-{steps}", 100, callbacks=[Interrupt(steps, path, hook)])
        return path


@pytest.mark.parametrize("validates", [False, True], ids=["no validation", "validation"])
@pytest.mark.parametrize("rollouts", [1, 2], ids=["epoch of one rollout", "epoch of two"])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_every_checkpoint_goes_on_exactly(tmp_path, tiny_model_path, accumulate, rollouts, validates):
    runs = Runs(tmp_path, tiny_model_path, accumulate=accumulate, rollouts=rollouts, validates=validates)
    end, middle = runs.end, runs.end + 1
    steps = end + 2
    periodic = Checkpoint(str(tmp_path / "whole"), every_n_train_steps=1, save_top_k=-1)
    stock = ModelCheckpoint(
        tmp_path / "epochs", filename="{step}", auto_insert_metric_name=False, save_top_k=-1,
        save_on_train_epoch_end=True,
    )  # fmt: skip
    lines, ended, epoch = runs.fit("whole", steps, callbacks=[periodic, stock])
    kinds = [*product(["periodic", "finished", "interrupted"], [end, middle]), ("epoch end", end)]
    kinds += [("validating", end)] if validates else []
    for kind, step in kinds:
        resumed, other, its_epoch = runs.fit(f"{kind}-{step}-on", steps, resume=runs.saved(kind, step))
        assert resumed == [line for line in lines if line[0] >= step], (kind, step)
        assert largest_difference(other, ended) == 0, (kind, step)
        assert its_epoch == epoch, (kind, step)
