"""Saving of checkpoints between optimizer steps, and finding the one that ``--ckpt_path last`` names."""

import logging
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

from lightning import LightningModule, Trainer
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from lightning_grpo.errors import UserError
from lightning_grpo.monitor.checkpoint_files import PARTIAL, CheckpointFiles
from lightning_grpo.monitor.checkpoint_folder import LAST, FolderLock, family, newest, newest_file, unused

log = logging.getLogger(__name__)


class Checkpoint(ModelCheckpoint):
    """Saves every ``every_n_train_steps`` optimizer steps, every ``every_n_minutes``, and at the end of training.

    A new run never writes to a folder with checkpoints of another run; it uses ``checkpoints-2``, ``checkpoints-3``, …
    instead. ``--ckpt_path last`` resumes from the newest checkpoint, and continues in its folder.

    Args:
        dirpath: folder. None: ``checkpoints`` in trainer.default_root_dir, which stays the same after a restart.
        every_n_train_steps: optimizer steps between two checkpoints. 0 saves only by time.
        every_n_minutes: minutes between two checkpoints, for runs with slow steps. Saving takes seconds, so with 10
            minutes it costs about 1 % of the time. None saves only by steps.
        save_top_k: number of checkpoints to keep, the latest or the best by ``monitor``; -1 keeps all.
        monitor: metric that ranks checkpoints, for example val/pass@1; ``step`` keeps the latest.
        mode: ``max`` if a higher value of the metric is better, ``min`` if a lower one is.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        *,
        every_n_train_steps: int = 50,
        every_n_minutes: float | None = 10.0,
        save_top_k: int = 2,
        monitor: str = "step",
        mode: str = "max",
    ) -> None:
        if every_n_train_steps < 0:
            raise UserError(
                f"checkpoint.every_n_train_steps is {every_n_train_steps}; set 1 or more, or 0 to save only by time"
            )
        if every_n_minutes is not None and not 0 < every_n_minutes < math.inf:
            raise UserError(
                f"checkpoint.every_n_minutes is {every_n_minutes}; set a number above 0, or null to save only by steps"
            )
        if save_top_k < -1:
            raise UserError(f"checkpoint.save_top_k is {save_top_k}; set 1 or more, or -1 to keep all")
        if mode not in ("max", "min"):
            raise UserError(f"checkpoint.mode is {mode!r}; set max or min")
        super().__init__(
            dirpath,
            filename="step-{step:06d}",
            auto_insert_metric_name=False,
            monitor=monitor,
            mode=mode,
            every_n_train_steps=every_n_train_steps,
            save_top_k=save_top_k,
            save_last="link",
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        self.every_n_minutes = every_n_minutes
        self._base = self.dirpath and Path(self.dirpath)
        self._resumes = False
        self._lock: FolderLock | None = None
        self._claimed: Path | None = None
        self._saved_at = 0.0
        self._step = 0
        self._unranked: str | None = None

    # ── The folder ────────────────────────────────────────────────────────────────────────────────────────────────

    def _folder(self, trainer: Trainer) -> Path:
        return self._base or Path(os.path.abspath(trainer.default_root_dir)) / "checkpoints"

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        # Lightning looks for ``last`` before it calls `setup`.
        folder = newest(self._folder(trainer))
        self.dirpath = str(folder)
        checkpoints = {str(file)} if (file := newest_file(folder)) else set()
        self._resumes = bool(checkpoints)
        return checkpoints

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the folder, and replace the class that writes and reads files."""
        if not self._resumes:
            base = self._folder(trainer)
            self.dirpath = str(unused(base) if stage == "fit" and trainer.is_global_zero else base)
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckpointFiles()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Continue in the folder of the checkpoint that the run resumes from."""
        restores = trainer.state.fn == TrainerFn.FITTING and trainer.strategy.lightning_restore_optimizer
        if restores and "optimizer_states" not in checkpoint:
            raise UserError(
                f"ckpt_path {trainer.ckpt_path} has weights but no optimizer state, so training can't be resumed "
                "from it; set ckpt_path to a checkpoint that lightning-grpo fit saved"
            )
        folder = Path(os.path.abspath(str(trainer.ckpt_path))).parent
        if folder in family(self._folder(trainer)):
            self.dirpath = str(folder)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mark the folder as in use, before time is spent on start-up."""
        self._claim(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock for checkpoints by time."""
        super().on_train_start(trainer, pl_module)
        self._claim(trainer)  # some strategies read the checkpoint after `on_fit_start`
        self._saved_at, self._step = time.monotonic(), trainer.global_step

    def _claim(self, trainer: Trainer) -> None:
        folder = Path(self.dirpath)
        # All ranks compare the folder, though only the first one has the lock.
        if trainer.fast_dev_run or self._claimed == folder:
            return
        self._release()
        self._claimed = folder
        refused = None
        if trainer.is_global_zero:
            try:
                self._lock = FolderLock(folder)
            except (UserError, OSError) as error:
                refused = error
        refused = trainer.strategy.broadcast(refused)
        if refused is not None:
            raise refused
        if trainer.is_global_zero and folder != (base := self._folder(trainer)) and not any(folder.glob("*.ckpt")):
            log.info("%s belongs to another run; checkpoints of this one go to %s", base, folder)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
        self._lock = self._claimed = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let other runs use the folder."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let other runs use the folder."""
        self._release()

    # ── Saving ────────────────────────────────────────────────────────────────────────────────────────────────────

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save if enough steps or minutes have passed."""
        super().on_train_batch_end(trainer, pl_module, *args)
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        if self.every_n_minutes is None or not stepped or self._should_skip_saving_checkpoint(trainer):
            return
        # Clocks differ between ranks, so the first rank decides.
        if trainer.strategy.broadcast(time.monotonic() - self._saved_at >= 60 * self.every_n_minutes):
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step."""
        if self._last_global_step_saved != trainer.global_step and not trainer.fast_dev_run and self.save_top_k != 0:
            self.save(trainer)
        super().on_train_end(trainer, pl_module)

    def save(self, trainer: Trainer) -> str:
        """Save the current step as ``last``, regardless of ``monitor``. All ranks must call this together.

        Returns:
            The path of the file. Of files that are not among the best, only the newest is kept.
        """
        candidates = self._monitor_candidates(trainer)
        path = self.format_checkpoint_name(candidates)
        if self.save_top_k != 0:
            if self.monitor == "step" and path not in self.best_k_models:
                self._save_topk_checkpoint(trainer, candidates)
            else:
                self._save_checkpoint(trainer, path)
        self._save_last_checkpoint(trainer, candidates)
        earlier, self._unranked = self._unranked, None if path in self.best_k_models else path
        if earlier not in (None, path) and earlier not in self.best_k_models:
            self._remove_checkpoint(trainer, earlier)
        return self._last_checkpoint_saved

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        if getattr(trainer.strategy, "_save_distributed_checkpoint", False):
            self._save_folder(trainer, filepath)
        else:
            super()._save_checkpoint(trainer, filepath)
        self._saved_at = time.monotonic()

    def _save_folder(self, trainer: Trainer, filepath: str) -> None:
        """Save a sharded checkpoint, a folder, to a temporary name and rename it, as `CheckpointFiles` does."""
        partial = os.path.join(os.path.dirname(filepath), f".{os.path.basename(filepath)}{PARTIAL}")
        super()._save_checkpoint(trainer, partial)
        if trainer.is_global_zero:
            shutil.rmtree(filepath, ignore_errors=True)
            os.replace(partial, filepath)
        self._last_checkpoint_saved = filepath
        trainer.strategy.barrier()

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        """Point ``last`` to a checkpoint atomically, so that it exists at any time."""
        if trainer.is_global_zero and os.path.abspath(filepath) != os.path.abspath(linkpath):
            _link(filepath, linkpath)
        trainer.strategy.barrier()

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Remove a checkpoint, after pointing ``last`` to another one if necessary."""
        last = os.path.join(os.path.dirname(filepath), LAST)
        if trainer.is_global_zero and os.path.realpath(last) == os.path.realpath(filepath):
            _link(self._last_checkpoint_saved, last)
        super()._remove_checkpoint(trainer, filepath)


def _link(filepath: str, linkpath: str) -> None:
    if os.path.isdir(linkpath) and not os.path.islink(linkpath):
        shutil.rmtree(linkpath)
    partial = f"{linkpath}{PARTIAL}"
    if os.path.lexists(partial):
        os.remove(partial)
    os.symlink(os.path.relpath(filepath, os.path.dirname(linkpath)), partial)
    os.replace(partial, linkpath)


def save_now(trainer: Trainer) -> str | None:
    """Save the current step with the trainer's `Checkpoint`. All ranks must call this together.

    Returns:
        The path of the file from the current folder; None if the trainer saves no checkpoints.
    """
    checkpoint = next((c for c in trainer.checkpoint_callbacks if isinstance(c, Checkpoint)), None)
    return None if checkpoint is None or trainer.fast_dev_run else os.path.relpath(checkpoint.save(trainer))
