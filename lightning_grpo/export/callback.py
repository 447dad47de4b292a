"""Exports at the end of ``fit``."""

import logging
import os
from pathlib import Path
from typing import Any, Literal

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lightning_grpo.errors import ReportedError
from lightning_grpo.export.folder import Exported, export
from lightning_grpo.monitor.checkpoint_files import remove

log = logging.getLogger(__name__)


class Export(Callback):
    """Writes the trained policy as a Hugging Face model folder when training ends; with LoRA, as a PEFT adapter.

    The folders are called ``last`` and ``best`` and lie beside the checkpoints that they are made from, on the first
    rank, in its memory on the CPU. In float32 each takes 4 bytes per parameter, a third of a checkpoint with AdamW's
    state. What can't be written is a warning with the reason: the checkpoints are there, and `lightning-grpo export`
    can be run at any time.

    Args:
        last: export the last step.
        best: export the best checkpoint by checkpoint.monitor, if that is a metric. It is a link to ``last`` if that
            step is the best.
        merge: with LoRA, write whole weights instead of the adapter.
        dtype: round the weights to this type, of which bfloat16 takes half the space; None keeps what was trained.
    """

    def __init__(
        self,
        *,
        last: bool = True,
        best: bool = True,
        merge: bool = False,
        dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    ) -> None:
        self.last = last
        self.best = best
        self.merge = merge
        self.dtype = dtype

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export, and print a command that uses the result."""
        checkpoint = trainer.checkpoint_callback
        if not trainer.is_global_zero or trainer.fast_dev_run or checkpoint is None:
            return
        for logger in trainer.loggers:
            logger.save()  # the model card reads metrics.csv
        files = {"last": checkpoint.last_model_path or checkpoint.best_model_path} if self.last else {}
        if self.best and checkpoint.monitor not in (None, "step"):
            files["best"] = checkpoint.best_model_path
        files = {name: os.path.realpath(file) for name, file in files.items() if file}
        exported = None
        for name, file in files.items():
            folder = Path(checkpoint.dirpath) / name
            if name == "best" and file == files.get("last"):
                remove(folder)
                folder.symlink_to("last")
                print(f"model (best): {folder}, a link to last")
            else:
                exported = self._export(file, folder, pl_module) or exported
        if exported is not None:
            print(f"use it: {exported.next_command()}")

    def _export(self, file: str, folder: Path, pl_module: LightningModule) -> Exported | None:
        try:
            if folder.is_symlink():
                folder.unlink()
            merge = True if self.merge and pl_module.lora is not None else None
            pretrained: Any = pl_module.pretrained
            trust = pretrained.trust_remote_code
            exported = export(file, folder, merge=merge, dtype=self.dtype, trust_remote_code=trust, overwrite=True)
        except (ReportedError, OSError) as error:
            log.warning("%s was not exported to %s: %s", file, folder, error)
            return None
        print(f"{'adapter' if exported.is_adapter else 'model'} ({folder.name}): {folder}")
        return exported
