"""Writes the report at the end of ``fit``."""

import logging
from importlib.util import find_spec
from pathlib import Path

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lightning_grpo.errors import ReportedError
from lightning_grpo.monitor.terminal import run_folder
from lightning_grpo.record.reader import read_run

log = logging.getLogger(__name__)


class Report(Callback):
    """Writes report.html beside the logs when training ends, also if it ends with an error: metrics, findings, samples,
    and predicted beside measured time and memory (docs/report.md). `lightning-grpo report` writes it at any time.

    Args:
        enabled: whether to write it. Without plotly, which the extra ``report`` installs, there is none.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self.enabled = enabled
        self._folder: Path | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the folder of the logs, which is computed on every rank."""
        self._folder = run_folder(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report, and print its path. A report that can't be written is a warning."""
        self._write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do the same if the run can't go on. A run that a signal stops must end soon, and has no report."""
        if isinstance(exception, ReportedError) and trainer.global_step > 0:
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        if not self.enabled or self._folder is None or not trainer.is_global_zero or trainer.fast_dev_run:
            return
        if find_spec("plotly") is None:
            print("report: none without plotly; run pip install 'lightning-grpo[report]'")
            return
        from lightning_grpo.report.page import write

        for logger in trainer.loggers:
            logger.save()  # without Record's files, the report is made from metrics.csv
        path = self._folder / "report.html"
        try:
            write([read_run(self._folder)], path)
        except Exception as error:  # whatever it is, the run itself is not concerned
            log.warning("no report was written: %s", str(error) or repr(error))
        else:
            print(f"report: {path}")
