"""The callback that diagnoses a run while it trains."""

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from lightning_grpo.diagnosis.finding import SEVERITIES, Finding, Severity, at_least
from lightning_grpo.diagnosis.history import History, Row, by_step
from lightning_grpo.diagnosis.live import info_of, options_of, rows_of
from lightning_grpo.diagnosis.nonfinite import find_origin, save_batch
from lightning_grpo.diagnosis.rule import Rule
from lightning_grpo.diagnosis.rules.optimization import NonFinite
from lightning_grpo.diagnosis.ruleset import RuleSet, keys
from lightning_grpo.diagnosis.text import describe
from lightning_grpo.errors import NonFiniteError, RunError, UserError
from lightning_grpo.module import GRPOModule
from lightning_grpo.monitor.checkpoint import save_now
from lightning_grpo.monitor.terminal import run_folder
from lightning_grpo.record.reader import read_run
from lightning_grpo.record.schema import FINDINGS, HELD_OUT

log = logging.getLogger(__name__)


class Diagnosis(Callback):
    """Checks the metrics of every optimizer step by rules (docs/diagnosis.md), and reports what is wrong, with evidence
    and values to set.

    Each problem is reported once, and again if it gets worse or recurs, in the terminal and in findings.jsonl beside
    the logs.

    Args:
        enabled: whether to diagnose at all.
        rules: further rules, by class path. A rule with the name of a built-in one replaces it, so that a built-in rule
            with other thresholds can be given.
        ignore: names of rules that are not applied.
        halt_on: stop the run, after saving a checkpoint, at a finding that is at least this severe: note, warning or
            critical. By default the run goes on.
    """

    def __init__(
        self,
        *,
        enabled: bool = True,
        rules: list[Rule] | None = None,
        ignore: list[str] | None = None,
        halt_on: Severity | None = None,
    ) -> None:
        if halt_on not in (None, *SEVERITIES):
            raise UserError(f"diagnosis.halt_on is {halt_on!r}; set one of {', '.join(SEVERITIES)}, or null")
        self.enabled = enabled
        self.halt_on = halt_on
        self.rules = RuleSet(rules or (), ignore or ())
        self.history = History()
        self.findings: list[Finding] = []
        """All findings of this run, on the first rank."""
        self._folder = Path()
        self._step = 0

    # ── Following the run ─────────────────────────────────────────────────────────────────────────────────────────

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a history; a run that continues reads that of its earlier steps."""
        module = cast(GRPOModule, pl_module)
        self._folder, self._step = run_folder(trainer), trainer.global_step
        self._continues, self.findings = trainer.global_step > 0, []
        self.rules.reported.clear()
        options, info = options_of(trainer, module), info_of(module)
        self.history = History(options=options, info=info, samples=lambda step: self._rows(trainer, step))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: object) -> None:
        """Remember the completions of the step, which the module may forget after it."""
        progress, accumulate = cast(GRPOModule, pl_module).progress, trainer.accumulate_grad_batches
        self._trained = progress.experience, progress.rows_of_step(accumulate, begun=accumulate)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Check the rules after an optimizer step."""
        if not self.enabled or trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        severe = None
        if trainer.is_global_zero:
            if self._continues:
                self._continues = False
                self._read_earlier_steps()
            values = {name: float(x) for name, x in trainer.callback_metrics.items() if not name.startswith(HELD_OUT)}
            self.history.append(self._step, values)
            severe = self._report(self.rules.check(self.history))
        if self.halt_on is not None:
            self._halt(trainer, trainer.strategy.broadcast(severe))

    def _read_earlier_steps(self) -> None:
        """Fill the history of a resumed run with what `Record` wrote before."""
        try:
            run = read_run(self._folder)
        except UserError:  # the run is not recorded
            return
        for step, metrics, held_out in by_step([*run.metrics, *run.held_out]):
            if metrics and step < self._step:
                self.history.append(step, metrics)
            self.history.add_held_out(step, held_out)
        self.rules.remember(run.findings)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add held-out metrics to the history."""
        if not trainer.sanity_checking:
            self.history.add_held_out(trainer.global_step, cast(GRPOModule, pl_module).held_out)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """If a loss or gradient is not finite, save the batch, and name the first such tensor and its completion."""
        if not self.enabled or not isinstance(exception, NonFiniteError):
            return
        try:
            self._report_nonfinite(trainer, cast(GRPOModule, pl_module), exception)
        except Exception as error:  # the run ends with the error that is examined here
            log.warning("the cause of the error was not found: %s: %s", type(error).__name__, error)

    def _report_nonfinite(self, trainer: Trainer, module: GRPOModule, exception: NonFiniteError) -> None:
        experience, trained = self._trained
        places = range(trained.start, trained.stop)
        step, rank = trainer.global_step + 1, trainer.global_rank
        origin = find_origin(module, experience, places, trainer)
        path = self._folder / f"nonfinite-step{step}{f'-rank{rank}' if rank else ''}.pt"
        save_batch(path, experience, places, self.history.latest, origin)
        place = None if origin is None else origin.place
        rows = [] if place is None else rows_of(experience, slice(place, place + 1), step, trainer)
        message = str(exception).split(":")[0] + (f", first in {origin.tensor}" if origin else "")
        exception.add_note(f"{message}; the batch was saved to {path}")
        if trainer.is_global_zero:
            finding = NonFinite().finding(
                self.history,
                message,
                evidence=["loss", "grad_norm", "entropy", "kl"],
                since=step,
                change=NonFinite.change(self.history),
                advice=NonFinite.advice,
            )
            finding.step, finding.samples = step, [keys(row) for row in rows]
            self._report([finding])

    def _rows(self, trainer: Trainer, step: int) -> list[Row]:
        return rows_of(*self._trained, step, trainer) if step == self._step else []

    # ── Reporting ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _report(self, findings: list[Finding]) -> str | None:
        """Write findings to the terminal and to the file. Return the message of one that is to stop the run."""
        self.findings += findings
        for finding in findings:
            log.log(
                logging.INFO if finding.severity == "note" else logging.WARNING, "\n".join(describe(asdict(finding)))
            )
        if findings:
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                with (self._folder / FINDINGS).open("a", encoding="utf-8") as file:
                    file.writelines(finding.line() + "\n" for finding in findings)
            except OSError as error:
                log.warning("%s can't be written: %s", self._folder / FINDINGS, error.strerror)
        limit = self.halt_on
        return next((f.message for f in findings if limit is not None and at_least(f.severity, limit)), None)

    def _halt(self, trainer: Trainer, message: str | None) -> None:
        """Stop on all ranks if there is a message, after saving a checkpoint.

        Raises:
            RunError: the reason.
        """
        if message is None:
            return
        saved = save_now(trainer)
        raise RunError(
            f"stopped after {trainer.global_step} optimizer steps, as diagnosis.halt_on is {self.halt_on}: {message}. "
            + (f"Checkpoint: {saved}" if saved else "No checkpoint was saved")
        )
