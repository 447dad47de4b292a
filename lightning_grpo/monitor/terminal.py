"""Terminal output: one line of metrics per optimizer step, and a summary at the end."""

import logging
import re
import sys
import time
from pathlib import Path
from typing import Any, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.callbacks.progress.progress_bar import ProgressBar
from tqdm import tqdm

from lightning_grpo.monitor import PHASES

FIGURES = {
    "reward": ("reward", "{:.3f}"),
    "loss": ("loss", "{:+.4f}"),
    "kl": ("kl", "{:.4f}"),
    "entropy": ("entropy", "{:.2f}"),
    "length": ("completions/mean_length", "{:.0f}"),
    "tok/s": ("tokens_per_second", "{:.0f}"),
}


HELD_OUT = re.compile(r"reward|completions/mean_length|(.+/)?pass@1|majority@\d+")


def held_out_figures(metrics: dict[str, float]) -> dict[str, float]:
    """The held-out metrics to show in the terminal; the logs contain all of them."""
    short_names = {name: name.split("/", 1)[1] for name in metrics}
    passes = [short for short in short_names.values() if re.fullmatch(r"pass@\d+", short)]
    most = max(passes, key=lambda short: int(short.removeprefix("pass@")), default=None)
    return {name: metrics[name] for name, short in short_names.items() if short == most or HELD_OUT.fullmatch(short)}


def with_interval(metrics: dict[str, float], name: str) -> str:
    """A held-out figure, with ± half the width of its 95 % interval if that is known."""
    limits = [metrics[limit] for limit in (f"{name}/low", f"{name}/high") if limit in metrics]
    return f"{metrics[name]:.3f}" + (f" ± {(limits[1] - limits[0]) / 2:.3f}" if len(limits) == 2 else "")


def figures(metrics: dict[str, Any]) -> str:
    """Format the metrics of an optimizer step on one line, followed by the seconds of its longer phases."""
    shown = [
        f"{label} {form.format(float(metrics[name]))}" for label, (name, form) in FIGURES.items() if name in metrics
    ]
    seconds = {name: float(metrics.get(f"time/{name}", 0.0)) for name in PHASES}
    phases = [f"{name} {value:.1f}s" for name, value in seconds.items() if value >= 0.05]
    return "  ".join(shown) + "  │ " + " ".join(phases)


def run_folder(trainer: Trainer) -> Path:
    """Return the folder of a run's config and predictions: that of the first logger, or the root without a logger.

    All ranks must call this together, as Lightning broadcasts the folder.
    """
    return Path(trainer.log_dir or trainer.default_root_dir)


class TerminalHandler(logging.StreamHandler):
    """Writes log records above the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        tqdm.write(self.format(record), file=sys.stderr)


class StepProgressBar(ProgressBar):
    """Shows the metrics of each optimizer step: in a progress bar on a terminal, else one line per step."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: tqdm | None = None
        self._enabled = True
        self._started = 0.0

    def disable(self) -> None:
        """Disable output; Lightning calls this on all ranks except the first."""
        self._enabled = False

    def enable(self) -> None:
        """Enable output; called by Lightning."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the bar."""
        if self._enabled:
            tqdm.write(" ".join(map(str, args)), file=sys.stderr)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the bar when training starts or resumes."""
        self._step, self._started, self._first = trainer.global_step, time.monotonic(), trainer.global_step
        if self._enabled and sys.stderr.isatty():
            self._bar = tqdm(
                total=self._total(trainer),
                initial=trainer.global_step,
                dynamic_ncols=True,
                bar_format="{n_fmt}/{total_fmt} {bar:10} {elapsed}<{remaining}  {desc}",
            )

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Show the metrics after an optimizer step."""
        if not self._enabled or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        line = figures(trainer.callback_metrics)
        if self._bar is not None:
            self._bar.n = self._step
            self._bar.set_description_str(line)
        else:
            elapsed = time.monotonic() - self._started
            total = self._total(trainer)
            left = (total - self._step) * elapsed / (self._step - self._first) if total else float("nan")
            print(f"step {self._step}/{total or '?'}  {elapsed:.0f}s<{left:.0f}s  {line}", file=sys.stderr, flush=True)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the held-out metrics."""
        if self._enabled and (held_out := getattr(pl_module, "held_out", None)):
            when = "before training" if trainer.sanity_checking else f"step {trainer.global_step}"
            self.print(
                f"{when}: "
                + "  ".join(f"{name} {with_interval(held_out, name)}" for name in held_out_figures(held_out))
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the bar, so that the error is printed below it."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    @staticmethod
    def _total(trainer: Trainer) -> int | None:
        if trainer.max_steps and trainer.max_steps > 0:
            return trainer.max_steps
        steps = trainer.estimated_stepping_batches
        return int(steps) if steps != float("inf") else None


class RunSummary(Callback):
    """Prints the held-out metrics before and after training, and the paths of checkpoint, config and logs."""

    def __init__(self) -> None:
        self._before: dict[str, float] = {}
        self._after: dict[str, float] = {}
        self._step = 0
        self._folder: Path | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the folder of the logs."""
        self._folder = run_folder(trainer)  # on every rank

    def state_dict(self) -> dict[str, Any]:
        """The held-out metrics and the folder of the logs, which `lightning-grpo export` reads from the checkpoint."""
        folder = None if self._folder is None else str(self._folder.absolute())
        return {"before": self._before, "after": self._after, "step": self._step, "folder": folder}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the metrics of the run that is resumed."""
        self._before, self._after, self._step = (state_dict[name] for name in ("before", "after", "step"))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the first and the last evaluation."""
        module = cast(Any, pl_module)  # `GRPOModule`, which imports this package
        if trainer.sanity_checking:
            self._before = dict(module.held_out)
        else:
            self._after, self._step = dict(module.held_out), trainer.global_step

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the summary."""
        if not trainer.is_global_zero:
            return
        tokens = cast(Any, pl_module).progress.completion_tokens
        lines = [f"{trainer.global_step} optimizer steps, {tokens:,} completion tokens"]
        for name in held_out_figures(self._after):
            before = f"{with_interval(self._before, name)} → " if name in self._before else ""
            lines.append(f"held-out {name.removeprefix('val/')}: {before}{with_interval(self._after, name)}")
        checkpoint = trainer.checkpoint_callback
        if checkpoint is not None and (path := checkpoint.last_model_path or checkpoint.best_model_path):
            lines.append(f"checkpoint: {path}")
        lines.append(f"config and logs: {self._folder}")
        print("\n".join(lines))
