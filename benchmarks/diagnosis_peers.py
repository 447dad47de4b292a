"""What rldoctor 0.2, rlprobe 0.1 and rlwatch 0.5 find in recorded runs. `diagnosis.py --peers` runs it in their own
environment, since they are no dependency of this project.

Each peer gets the metrics of a run step by step, as it would get them from TRL, whose names our metrics have; what it
reports first counts. Arguments: folders of runs. Prints for each run and peer a list of [name, severity, step].
"""

import json
import sys
from pathlib import Path
from typing import Any

FIRST = 10
"""Steps before the first diagnosis of a peer that diagnoses a whole log."""
RLPROBE = {
    "reward": "reward_mean",
    "reward_std": "reward_std",
    "group_reward_std": "group_reward_std_mean",
    "frac_reward_zero_std": "zero_variance_group_frac",
    "kl": "kl_mean",
    "entropy": "entropy_mean",
    "clip_ratio/region_mean": "clip_fraction",
    "loss": "loss",
    "learning_rate": "lr",
    "grad_norm": "grad_norm",
    "update_ratio": "weight_update_ratio",
    "completions/mean_length": "completion_len_mean",
    "completions/max_length": "completion_len_max",
    "completions/clipped_ratio": "truncation_rate",
    "completions/repetition": "repetition_rate",
    "step_time": "step_time_s",
}
"""The fields of its records, as its adapter for TRL fills them, and further ones that our metrics have."""
SEVERITIES = {"info": "note", "warn": "warning"}

Reports = list[tuple[str, str, int]]
Records = list[dict[str, Any]]


def main() -> None:
    for folder in map(Path, sys.argv[1:]):
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        records = [{name: value for name, value in record.items() if value is not None} for record in records]
        config = json.loads((folder / "read.json").read_text())["options"]
        found = {"rldoctor": rldoctor(records, config), "rlprobe": rlprobe(records), "rlwatch": rlwatch(records)}
        print(json.dumps([str(folder), found]), flush=True)


def rldoctor(records: Records, config: dict[str, Any]) -> Reports:
    from rl_doctor import diagnose
    from rl_doctor.ingest.base import run_from_records

    merged: dict[int, dict[str, Any]] = {}
    for record in records:  # held-out metrics have lines of their own, which it would count as steps
        # it would take sampling/kl for the KL to the reference
        kept = {name: x for name, x in record.items() if not name.startswith("sampling/")}
        renamed = {name.replace("val/", "eval/", 1): x for name, x in kept.items()}
        merged.setdefault(record["step"], {}).update(renamed)
    known = {name.rpartition(".")[2]: value for name, value in config.items()}
    reports: Reports = []
    for end in range(FIRST, len(merged) + 1):
        rows = list(merged.values())[:end]
        for finding in diagnose(run_from_records(rows, config=known)).problems:
            reports.append((finding.detector, finding.severity.name.lower(), rows[-1]["step"]))
    return first(reports)


def rlprobe(records: Records) -> Reports:
    from rlprobe.doctor.engine import diagnose_view
    from rlprobe.doctor.runview import RunView
    from rlprobe.schemas import RunManifest, StepRecord

    manifest = RunManifest(run_id="run", created_at="2026-01-01T00:00:00", algorithm="grpo")
    steps = []
    for record in (record for record in records if "reward" in record):
        fields = {RLPROBE[name]: value for name, value in record.items() if name in RLPROBE}
        parts = {
            name.split("/")[1]: value
            for name, value in record.items()
            if name.startswith("rewards/") and name.endswith("/mean")
        }
        steps.append(StepRecord(step=record["step"], reward_components=parts, **fields))
    reports: Reports = []
    for end in range(FIRST, len(steps) + 1):
        for finding in diagnose_view(RunView(manifest, steps[:end])):
            reports.append((finding.signature_id, finding.severity, steps[end - 1].step))
    return first(reports)


def rlwatch(records: Records) -> Reports:
    from rlwatch.config import RLWatchConfig
    from rlwatch.detectors import DetectorSuite

    suite, reports = DetectorSuite(RLWatchConfig()), []
    for record in (record for record in records if "reward" in record):
        alerts = suite.check_step(
            record["step"],
            entropy=record.get("entropy"),
            kl_divergence=record.get("kl"),
            reward_mean=record.get("reward"),
            reward_std=record.get("reward_std"),
            loss=record.get("loss"),
            grad_norm=record.get("grad_norm"),
        )
        reports += [(alert.detector, alert.severity, alert.step) for alert in alerts]
    return first(reports)


def first(reports: Reports) -> Reports:
    """The first report of each name and severity."""
    found: dict[tuple[str, str], int] = {}
    for name, severity, step in reports:
        found.setdefault((name, SEVERITIES.get(severity, severity)), step)
    return [(name, severity, step) for (name, severity), step in found.items()]


if __name__ == "__main__":
    main()
