"""Whether the diagnosis names faults, how soon, and how often it reports healthy runs.

Claims: every fault in a run is named within 20 optimizer steps, and no healthy run is reported as critical. Faults are
injected at a known step into small runs of this framework that really learn (`diagnosis_runs.py`,
`diagnosis_cases.py`). The rules are then applied to what the runs recorded, step by step as in training, so that they
can be changed and applied again to the same runs (--reuse). If the framework itself ends a run with an error that
states the fault, that counts as named, by "refused".

With --peers, rldoctor 0.2, rlprobe 0.1 and rlwatch 0.5 get the same metrics. They are installed from the package index
into a virtual environment of their own.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from diagnosis_cases import CLEAN, FAULTS
from diagnosis_runs import READ, Run, execute, prepare, quietly

from lightning_grpo.diagnosis.history import History, by_step
from lightning_grpo.diagnosis.ruleset import RuleSet
from lightning_grpo.record.reader import read_run

WITHIN = 20
OUTCOME = "outcome.json"
SEVERITIES = ("critical", "warning", "note")
PEERS = ("rldoctor==0.2.0", "rlprobe==0.1.0", "rlwatch==0.5.1", "diptest")
NAMED_BY = {
    "entropy_collapse": {"entropy_collapse", "ENTROPY_COLLAPSE"},
    "kl_runaway": {"kl_drift", "KL_BLOWUP", "kl_explosion"},
    "learning_rate_high": {"gradient_pathology", "GRAD_PATHOLOGY", "gradient_norm_spike", "clip_saturation",
                           "CLIP_SATURATION"},
    "learning_rate_low": {"plateau"},
    "dead_groups": {"advantage_collapse", "DEGENERATE_GROUPS", "ADV_COLLAPSE", "REWARD_STD_DEATH"},
    "truncation": {"length_pathology", "TRUNCATION_STARVE"},
    "dead_reward": {"reward_composition"},
    "dominating_reward": {"reward_composition", "FORMAT_GAMING"},
    "length_hacking": {"length_pathology", "REWARD_HACK_LENGTH"},
    "reward_hacking": {"reward_hacking", "FORMAT_GAMING", "reward_mean_drift"},
    "repetition": {"REPETITION_SPIRAL"},
    "nonfinite": {"gradient_pathology", "GRAD_PATHOLOGY", "loss_nan"},
    "slower_steps": {"THROUGHPUT_ROT"},
}  # fmt: skip
"""Names under which a peer reports what a rule reports, in the widest sense."""


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was reported about a run, by us or by a peer: (name, severity, step)."""

    run: Run
    findings: Sequence[tuple[str, str, int]]
    refused: int | None = None
    """The optimizer step at which the framework ended the run, if it did."""

    def named(self, names: Iterable[str]) -> tuple[str, int] | None:
        """The first finding since the fault whose name is among ``names``, and the step at which it was found."""
        found = [(step, name) for name, _, step in self.findings if name in names and step >= self.run.at]
        if self.refused is not None:
            found.append((self.refused, "refused"))
        return (min(found)[1], min(found)[0]) if found else None

    def steps(self, names: Iterable[str]) -> int | None:
        """How many optimizer steps with the fault there were before it was named, counting the one that showed it."""
        found = self.named(names)
        return None if found is None else found[1] - self.run.at + 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed of each kind of run")
    parser.add_argument("--check", action="store_true", help="fail if a claim does not hold")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--runs", type=Path, help="folder for the runs; by default they are not kept")
    parser.add_argument("--reuse", action="store_true", help="don't train again what the folder of --runs has")
    parser.add_argument("--only", default="", help="only runs whose name contains this text")
    parser.add_argument("--peers", type=Path, help="folder of the virtual environment with the other tools")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at the same time")
    return parser.parse_args()


def main() -> None:
    args = parse()
    with tempfile.TemporaryDirectory() as temporary:
        root = args.runs or Path(temporary)
        runs = [run for run in (*FAULTS, *CLEAN) if args.only in run.name]
        if args.quick:
            runs = [next(same) for _, same in groupby(runs, key=lambda run: run.name)]
        start = time.perf_counter()
        train(runs, root, reuse=args.reuse, jobs=args.jobs)
        print(f"{len(runs)} runs after {time.perf_counter() - start:.0f} s")
        reports = [diagnose(run, folder(root, run)) for run in runs]
        peers = by_peers(args.peers, reports, root) if args.peers else {}
    faults = [report for report in reports if report.run.names]
    clean = [report for report in reports if not report.run.names]
    print(fault_table(faults))
    print(clean_table(clean))
    for name, found in peers.items():
        print(f"\n{name}")
        print(fault_table([report for report in found if report.run.names], NAMED_BY))
        print(clean_table([report for report in found if not report.run.names]))
    missed = [
        f"{report.run.name}, seed {report.run.seed}" for report in faults if not is_in_time(report, report.run.names)
    ]
    critical = [report.run.name for report in clean if alarms([report])["critical"]]
    if args.json:
        args.json.write_text(json.dumps(figures({"lightning_grpo": reports} | peers), indent=1))
    print(
        f"diagnosis: {len(faults) - len(missed)} of {len(faults)} faults named within {WITHIN} steps"
        + (f" (not: {'; '.join(missed)})" if missed else "")
        + f"; {len(critical)} of {len(clean)} healthy runs reported as critical"
    )
    if args.check and (missed or critical):
        sys.exit(1)


# ── Runs ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def folder(root: Path, run: Run) -> Path:
    name = "".join(c if c.isalnum() else "-" for c in run.name)
    return root / ("faults" if run.names else "clean") / f"{name}-{run.seed}"


def train(runs: Sequence[Run], root: Path, *, reuse: bool, jobs: int) -> None:
    """Train the runs in ``jobs`` processes of one thread each."""
    prepare(root / "models")
    todo = [run for run in runs if not (reuse and (folder(root, run) / OUTCOME).exists())]
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=quietly) as pool:
        for done in [pool.submit(train_by_name, root, (run.name, run.seed)) for run in todo]:
            done.result()


def train_by_name(root: Path, key: tuple[str, int]) -> None:
    """Train the run of this name and seed. A run has functions, which can't be sent to another process."""
    run = next(run for run in (*FAULTS, *CLEAN) if (run.name, run.seed) == key)
    train_run(run, root / "models", folder(root, run))


def train_run(run: Run, models: Path, where: Path) -> None:
    """Train a run, and write how it ended."""
    random.seed(run.seed)
    torch.manual_seed(run.seed)
    error = execute(run, models, where)
    (where / OUTCOME).write_text(json.dumps({"error": error}))


# ── Diagnosis ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def diagnose(run: Run, where: Path) -> Report:
    """Apply the rules after each optimizer step of a recorded run."""
    record = read_run(where)
    history = History(**json.loads((where / READ).read_text()))
    rules, found = RuleSet(), []
    for step, metrics, held_out in by_step([*record.metrics, *record.held_out]):
        if metrics:
            history.append(step, metrics)
            found += [(f.rule, f.severity, f.step) for f in rules.check(history)]
        history.add_held_out(step, held_out)
    if rules.broken:
        sys.exit(f"{run.name}: rules failed: {rules.broken}")
    refused = None
    if json.loads((where / OUTCOME).read_text())["error"]:
        refused = record.metrics[-1]["step"] + 1
        # the metrics of a step that was not taken are not recorded, so that only the callback could find its problem
        found += [(f["rule"], f["severity"], f["step"]) for f in record.findings if f["step"] == refused]
    return Report(run=run, findings=found, refused=refused)


def by_peers(environment: Path, reports: Sequence[Report], root: Path) -> dict[str, list[Report]]:
    """What each peer reports about the same runs."""
    python = environment / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *PEERS], check=True)
    script = Path(__file__).with_name("diagnosis_peers.py")
    folders = [str(folder(root, report.run)) for report in reports]
    result = subprocess.run([str(python), str(script), *folders], capture_output=True, text=True)
    if result.returncode:
        sys.exit(result.stderr[-3000:])
    found: dict[str, list[Report]] = {}
    for report, line in zip(reports, result.stdout.splitlines(), strict=True):
        for name, findings in json.loads(line)[1].items():
            found.setdefault(name, []).append(Report(run=report.run, findings=[tuple(f) for f in findings]))
    return found


# ── Tables ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def is_in_time(report: Report, names: Iterable[str]) -> bool:
    steps = report.steps(names)
    return steps is not None and steps <= WITHIN


def names_of(run: Run, synonyms: dict[str, set[str]] | None) -> set[str]:
    return set(run.names) if synonyms is None else set().union(*(synonyms.get(name, ()) for name in run.names))


def fault_table(reports: Sequence[Report], synonyms: dict[str, set[str]] | None = None) -> str:
    """One row per fault, with the steps of each seed, and the recall."""
    lines = ["| fault | injected at step | named by | after steps | other findings |", "|---|---|---|---|---|"]
    for _, group in groupby(reports, key=lambda report: report.run.name):
        seeds = list(group)
        names = names_of(seeds[0].run, synonyms)
        by = dict.fromkeys(named[0] if (named := report.named(names)) else "–" for report in seeds)
        after = [str(report.steps(names) or "–") for report in seeds]
        others = dict.fromkeys(name for report in seeds for name, _, _ in report.findings if name not in names)
        cells = (seeds[0].run.name, str(seeds[0].run.at), ", ".join(by), ", ".join(after), ", ".join(others))
        lines.append(f"| {' | '.join(cells)} |")
    named = sum(is_in_time(report, names_of(report.run, synonyms)) for report in reports)
    return "\n".join([*lines, f"recall within {WITHIN} steps: {named} of {len(reports)}"])


def alarms(reports: Iterable[Report]) -> Counter[str]:
    return Counter(severity for report in reports for _, severity, _ in report.findings)


def clean_table(reports: Sequence[Report]) -> str:
    """What was reported about healthy runs: one row per run with findings, and the sums."""
    lines = ["| healthy run | seed | findings |", "|---|---|---|"]
    for report in (report for report in reports if report.findings):
        listed = ", ".join(f"{name} ({severity}) {step}" for name, severity, step in report.findings)
        lines.append(f"| {report.run.name} | {report.run.seed} | {listed} |")
    runs = {severity: sum(alarms([report])[severity] > 0 for report in reports) for severity in SEVERITIES}
    counts = ", ".join(f"{alarms(reports)[s]} {s} in {runs[s]} runs" for s in SEVERITIES)
    return "\n".join([*lines, f"false alarms in {len(reports)} healthy runs: {counts}"])


def figures(reports: dict[str, Sequence[Report]]) -> dict[str, Any]:
    return {
        tool: [
            {
                "run": report.run.name,
                "seed": report.run.seed,
                "at": report.run.at,
                "faulty": bool(report.run.names),
                "after": report.steps(names_of(report.run, None if tool == "lightning_grpo" else NAMED_BY)),
                "refused": report.refused,
                "findings": report.findings,
            }
            for report in found
        ]
        for tool, found in reports.items()
    }


if __name__ == "__main__":
    main()
