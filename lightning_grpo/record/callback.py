"""The `Record` callback: writes the samples and metrics of a run to its folder, and shows a few samples."""

import logging
import os
import platform
import shlex
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

import psutil
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger

from lightning_grpo.export.checkpoint import installed_versions
from lightning_grpo.monitor.terminal import run_folder
from lightning_grpo.ranges import check_ranges
from lightning_grpo.record import show
from lightning_grpo.record.background import Background
from lightning_grpo.record.files import SampleFiles, append_line
from lightning_grpo.record.rows import SampleTables
from lightning_grpo.record.schema import FORMAT, HELD_OUT, METRICS
from lightning_grpo.record.start import identify, start
from lightning_grpo.training.experience import Experience

log = logging.getLogger(__name__)

SECONDS = 30.0
"""Maximum age of samples that are not on the disk yet, and maximum time that a checkpoint waits for them."""
PACKAGES = ("lightning-grpo", "torch", "lightning", "transformers", "peft", "vllm")


class Record(Callback):
    """Writes the samples and the metrics of the run to its folder, and prints a few samples.

    ``run.json`` describes the run, ``metrics.jsonl`` has one line per optimizer step, and the files in ``samples`` have
    one row per completion that the policy was trained on; docs/record.md describes them. They are written by a thread
    in the background. If the disk is full, one warning is logged, and the run goes on without them.

    Args:
        samples: write the samples.
        logprobs: with the samples, write the log-probs of the engine and those of the trainer. They take more space
            than all other columns together.
        max_gib: limit on the size of the samples of a run in GiB. The oldest files are deleted.
        print_every: print samples after the first optimizer step and then after every this many, and log them to
            loggers that take tables (W&B, TensorBoard). 0 never does.
    """

    def __init__(
        self, *, samples: bool = True, logprobs: bool = False, max_gib: float = 4.0, print_every: int = 20
    ) -> None:
        check_ranges(locals(), {"max_gib": "(0, inf)", "print_every": "[0, inf)"}, prefix="record.")
        self.samples = samples
        self.logprobs = logprobs
        self.max_gib = max_gib
        self.print_every = print_every
        self._identity: dict[str, str] = {}
        self._before: dict[str, float] = {}
        self._background: Background | None = None
        self._rows: tuple[Experience, slice] | None = None
        self._recorded = 0
        self._has_warned = False

    # ── Start and end ─────────────────────────────────────────────────────────────────────────────────────────────

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what an evaluation before an earlier `fit` found."""
        self._before = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a record, or continue that of the checkpoint."""
        folder = run_folder(trainer)  # on every rank
        self._recorded, self._rows = trainer.global_step, None
        if trainer.fast_dev_run:
            return
        problem = _problem(self._begin, folder, trainer, pl_module) if trainer.is_global_zero else None
        problem = trainer.strategy.broadcast(problem) or _problem(self._open, folder, trainer, pl_module)
        if problem is not None:
            log.warning("The run is not recorded in %s: %s", folder, problem)
        elif self._before:
            self._submit_line(trainer, self._before)

    def _begin(self, folder: Path, trainer: Trainer, pl_module: LightningModule) -> None:
        root, step = Path(trainer.default_root_dir), trainer.global_step
        start(folder, describe(trainer, pl_module), self._identity if step else {}, step, root)
        self._identity = identify(folder, root)

    def _open(self, folder: Path, trainer: Trainer, pl_module: LightningModule) -> None:
        module = cast(Any, pl_module)  # `GRPOModule`, which imports packages above this one
        self._tables = SampleTables.of(trainer, logprobs=self.logprobs)
        limit = self.max_gib * 2**30 / trainer.world_size
        self._files = SampleFiles(folder, rank=trainer.global_rank, max_bytes=limit)
        self._metrics = folder / METRICS
        # tensor-parallel ranks share their prompts, and the first of them writes the samples
        mesh = module.device_mesh
        module.keeps_logprobs = self.logprobs
        self._has_samples = mesh is None or mesh["tensor_parallel"].get_local_rank() == 0
        self._background = Background(self._files.write, seconds=SECONDS, what="Samples and metrics of the run")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is left."""
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Write what is left."""
        self._close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write what is left."""
        self._close()

    def _close(self) -> None:
        background, self._background, self._rows = self._background, None, None
        if background is not None:
            background.close(SECONDS)

    # ── Checkpoints ───────────────────────────────────────────────────────────────────────────────────────────────

    def state_dict(self) -> dict[str, str]:
        """Where this record is, for a run that resumes from the checkpoint."""
        return self._identity

    def load_state_dict(self, state_dict: dict[str, str]) -> None:
        """Remember where the record of the resumed run is."""
        self._identity = state_dict

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write everything up to the step of the checkpoint, since a run that resumes from it goes on after it."""
        self._record_step(trainer, pl_module)
        if self._background is not None:
            self._background.flush(SECONDS)

    # ── Steps ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: object) -> None:
        """Note the rows of the step, which are recorded when it was taken; with several passes, in the first one."""
        progress, accumulate = cast(Any, pl_module).progress, trainer.accumulate_grad_batches
        self._rows = None
        if progress.is_first_pass:
            self._rows = progress.experience, progress.rows_of_step(accumulate, begun=accumulate)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Record the step that was taken."""
        self._record_step(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the metrics of the held-out prompts, also those of all prompts before training."""
        logged = {name: float(value) for name, value in trainer.logged_metrics.items() if name.startswith(HELD_OUT)}
        metrics = getattr(pl_module, "held_out", {}) | logged
        if not trainer.sanity_checking:
            self._submit_line(trainer, metrics)
        elif trainer.num_sanity_val_batches == trainer.num_val_batches:
            self._before = metrics

    def _record_step(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # a checkpoint may be saved after a step was taken, before Lightning counts it
        step = cast(Any, pl_module).progress.steps_at_commit
        if self._background is None or step <= self._recorded:
            return
        self._recorded = step
        values = {name: float(value) for name, value in trainer.logged_metrics.items()}
        self._submit_line(trainer, {name: value for name, value in values.items() if not name.startswith(HELD_OUT)})
        shows = trainer.is_global_zero and self.print_every > 0 and (step == 1 or step % self.print_every == 0)
        if self._rows is not None and self._has_samples and (self.samples or shows):
            loggers = trainer.loggers if shows else []
            self._background.submit(partial(self._write, *self._rows, step, shows, loggers))
        self._rows = None

    def _submit_line(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if self._background is not None and trainer.is_global_zero and metrics:
            step = max(self._recorded, trainer.global_step)
            self._background.submit(partial(append_line, self._metrics, {"step": step, "time": time.time()} | metrics))

    # ── In the background ─────────────────────────────────────────────────────────────────────────────────────────

    def _write(self, experience: Experience, rows: slice, step: int, shows: bool, loggers: Sequence[Logger]) -> None:
        table = self._tables.table(experience, rows, step)
        if self.samples:
            self._files.append(table)
        if shows:
            show.print_samples(show.choose(table), step)
        for logger in loggers:
            if (problem := _problem(show.log_samples, logger, table, step)) and not self._has_warned:
                self._has_warned = True
                log.warning("Samples can't be logged to %s: %s", type(logger).__name__, problem)


def describe(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """What ``run.json`` contains of a run that starts."""
    module = cast(Any, pl_module)
    predictions = (callback.record() for callback in trainer.callbacks if hasattr(callback, "record"))
    return {
        "format": FORMAT,
        "id": uuid.uuid4().hex,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join([Path(sys.argv[0]).name.replace("__main__.py", "lightning-grpo"), *sys.argv[1:]]),
        "versions": {"python": platform.python_version()} | installed_versions(PACKAGES),
        "machine": machine(trainer),
        "model": str(module.model_path),
        "reward_names": module.reward_names,
        "reward_weights": module.reward_weights.tolist(),
        "num_generations": module.num_generations,
        "completions_per_step": module.completions_per_step,
        "max_steps": trainer.max_steps,
        "seed": module.seed,
        "pass_threshold": module.evaluation.pass_threshold,
        "prediction": next(predictions, None),
    }


def machine(trainer: Trainer) -> str:
    """The machine of the first rank in words."""
    device, ranks = trainer.strategy.root_device, trainer.world_size
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    memory = psutil.virtual_memory().total / 2**30
    devices = f"{ranks} × {name}" if ranks > 1 else name
    return f"{devices}, {os.cpu_count()} cores, {memory:.0f} GiB of memory, {platform.system()}"


def _problem(function: Callable[..., None], *args: Any) -> str | None:
    """Call the function, and return what went wrong."""
    try:
        function(*args)
    except Exception as error:  # whatever it is, training goes on
        return str(error) or repr(error)
    return None
