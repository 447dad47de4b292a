"""Checkpoints between optimizer steps, the last step included, where ``--ckpt_path last`` finds them."""

import os

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class Checkpoint(ModelCheckpoint):
    """Saves every ``every_n_train_steps`` optimizer steps, and at the end of training.

    Args:
        dirpath: folder; None takes ``checkpoints`` under trainer.default_root_dir, the same after a restart.
        every_n_train_steps: optimizer steps between two checkpoints.
        save_top_k: how many to keep: the latest, or the best by ``monitor``; -1 keeps all.
        monitor: metric that says which are best, for example val/pass@1; ``step`` keeps the latest.
        mode: whether the metric is better at its ``max`` or its ``min``.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        *,
        every_n_train_steps: int = 50,
        save_top_k: int = 2,
        monitor: str = "step",
        mode: str = "max",
    ) -> None:
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

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the folder."""
        self._choose_folder(trainer)
        super().setup(trainer, pl_module, stage)

    def _find_last_checkpoints(self, trainer: Trainer) -> set[str]:
        # Lightning looks for ``last`` before it calls setup
        self._choose_folder(trainer)
        return super()._find_last_checkpoints(trainer)

    def _choose_folder(self, trainer: Trainer) -> None:
        if self.dirpath is None:
            self.dirpath = os.path.join(os.path.abspath(trainer.default_root_dir), "checkpoints")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step too."""
        if self._last_global_step_saved != trainer.global_step and not trainer.fast_dev_run:
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
        super().on_train_end(trainer, pl_module)
