"""Checkpoints between optimizer steps, the last step included, where ``--ckpt_path last`` finds them."""

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

    A run that starts anew never writes into a folder that holds another run's checkpoints: it takes ``checkpoints-2``,
    ``checkpoints-3``, … beside it. ``--ckpt_path last`` resumes the one that was saved last, in its folder.

    Args:
        dirpath: folder; None takes ``checkpoints`` under trainer.default_root_dir, the same after a restart.
        every_n_train_steps: optimizer steps between two checkpoints; 0 saves by time alone.
        every_n_minutes: minutes between two checkpoints, for runs whose steps are slow. Ten lose little when a machine
            fails, and a checkpoint takes seconds, a percent or two of that. None saves by steps alone.
        save_top_k: how many to keep: the latest, or the best by ``monitor``; -1 keeps all.
        monitor: metric that says which are best, for example val/pass@1; ``step`` keeps the latest.
        mode: whether the metric is better at its ``max`` or its ``min``.
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
            raise UserError(f"checkpoint.every_n_train_steps is {every_n_train_steps}; set 1 or more, or 0 for none")
        if every_n_minutes is not None and not 0 < every_n_minutes < math.inf:
            raise UserError(f"checkpoint.every_n_minutes is {every_n_minutes}; set a number above 0, or null for none")
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
        # Lightning looks for ``last`` before it calls setup
        folder = newest(self._folder(trainer))
        self.dirpath = str(folder)
        found = {str(file)} if (file := newest_file(folder)) else set()
        self._resumes = bool(found)
        return found

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the folder, and how files are written and read."""
        if not self._resumes:
            base = self._folder(trainer)
            self.dirpath = str(unused(base) if stage == "fit" and trainer.is_global_zero else base)
        super().setup(trainer, pl_module, stage)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = CheckpointFiles()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A resumed run goes on in the folder of its checkpoint."""
        restores = trainer.state.fn == TrainerFn.FITTING and trainer.strategy.lightning_restore_optimizer
        if restores and "optimizer_states" not in checkpoint:
            raise UserError(
                f"ckpt_path {trainer.ckpt_path} holds weights without the optimizer's state: training can't be resumed "
                "from it; name a checkpoint that lightning-grpo fit saved"
            )
        folder = Path(os.path.abspath(str(trainer.ckpt_path))).parent
        if folder in family(self._folder(trainer)):
            self.dirpath = str(folder)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mark the folder as in use, before a long start-up is paid for."""
        self._claim(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training begins or goes on."""
        super().on_train_start(trainer, pl_module)
        self._claim(trainer)  # some strategies read the checkpoint after on_fit_start
        self._saved_at, self._step = time.monotonic(), trainer.global_step

    def _claim(self, trainer: Trainer) -> None:
        folder = Path(self.dirpath)
        # the same on all ranks, though the first one alone holds the lock
        if trainer.fast_dev_run or self._claimed == folder:
            return
        self._release()
        self._claimed = folder
        refusal = None
        if trainer.is_global_zero:
            try:
                self._lock = FolderLock(folder)
            except (UserError, OSError) as error:
                refusal = error
        refusal = trainer.strategy.broadcast(refusal)
        if refusal is not None:
            raise refusal
        if trainer.is_global_zero and folder != (base := self._folder(trainer)) and not any(folder.glob("*.ckpt")):
            log.info("%s belongs to another run; checkpoints of this one go to %s", base, folder)

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.release()
        self._lock = self._claimed = None

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let others use the folder."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Let others use the folder."""
        self._release()

    # ── Saving ────────────────────────────────────────────────────────────────────────────────────────────────────

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Save once enough steps, or enough minutes, have passed."""
        super().on_train_batch_end(trainer, pl_module, *args)
        stepped, self._step = trainer.global_step != self._step, trainer.global_step
        if self.every_n_minutes is None or not stepped or self._should_skip_saving_checkpoint(trainer):
            return
        # clocks differ between ranks: the first one decides
        if trainer.strategy.broadcast(time.monotonic() - self._saved_at >= 60 * self.every_n_minutes):
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step too."""
        if self._last_global_step_saved != trainer.global_step and not trainer.fast_dev_run and self.save_top_k != 0:
            self.save(trainer)
        super().on_train_end(trainer, pl_module)

    def save(self, trainer: Trainer) -> str:
        """Save the present step now, whatever its rank by ``monitor``, as ``last``. All ranks come here together.

        Returns:
            The file's path. Of those that are not among the best, only the newest is kept.
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
        """A sharded checkpoint, which is a folder: written beside and renamed, as `CheckpointFiles` does with files."""
        partial = os.path.join(os.path.dirname(filepath), f".{os.path.basename(filepath)}{PARTIAL}")
        super()._save_checkpoint(trainer, partial)
        if trainer.is_global_zero:
            shutil.rmtree(filepath, ignore_errors=True)
            os.replace(partial, filepath)
        self._last_checkpoint_saved = filepath
        trainer.strategy.barrier()

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        """Point ``last`` to a checkpoint in one step, so that there is one at any moment."""
        if trainer.is_global_zero and os.path.abspath(filepath) != os.path.abspath(linkpath):
            _link(filepath, linkpath)
        trainer.strategy.barrier()

    def _remove_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        """Remove a checkpoint, which ``last`` does not name by then."""
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
