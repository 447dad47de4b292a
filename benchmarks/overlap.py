"""Seconds per step of a training run that alternates sampling and training, or samples the next rollout meanwhile.

Claim: with the engine in a separate process, `rollout_ahead: 1` makes steps shorter than alternating on the same cores.
Each contender is a `fit` of the quickstart in its own process: alternating with vLLM in the trainer's process on both
cores; then with trainer and server on one core each: alternating, ahead, and ahead with in-flight weight updates.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIG = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
APART = ["--rollout", "VLLMProcessRollout", "--rollout.cores", "[1]"]
CORRECTED = ["--model.objective.rollout_correction", "{level: token, mode: truncate, upper: 2.0}"]
AHEAD = [*APART, "--model.rollout_ahead", "1"]
CONTENDERS = {
    "in turn, one process, two cores": (["--rollout", "VLLMRollout"], {0, 1}),
    "in turn, a core each": (APART, {0}),
    "ahead, a core each": (AHEAD, {0}),
    "ahead, in flight, a core each": ([*AHEAD, "--model.in_flight_updates", "true"], {0}),
}
PHASES = ("step_time", "time/sync", "time/rollout", "time/reward", "time/score", "time/update", "staleness")
GOAL = 1.0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    parser.add_argument("--check", action="store_true", help=f"fail if ahead is less than {GOAL}x as fast as in turn")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--model", help="a checkpoint's folder, in place of the quickstart's")
    parser.add_argument("--max-completion-length", type=int, default=20)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("this benchmark needs two cores, but this process may use only one")
    steps = 5 if args.quick else 10
    rows = {name: run(options, cores, steps, args) for name, (options, cores) in CONTENDERS.items()}
    print(f"{'':34}" + "".join(f"{phase.removeprefix('time/'):>11}" for phase in PHASES))
    for name, row in rows.items():
        print(f"{name:34}" + "".join(f"{row[phase]:11.2f}" for phase in PHASES))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    in_turn, ahead = (rows[name]["step_time"] for name in ("in turn, a core each", "ahead, a core each"))
    one = rows["in turn, one process, two cores"]["step_time"]
    print(
        f"overlap: ahead is {in_turn / ahead:.2f}x as fast as in turn on a core each, "
        f"and {one / ahead:.2f}x as fast as one process on both cores"
    )
    if args.check and in_turn / ahead < GOAL:
        sys.exit(1)


def run(options: list[str], cores: set[int], steps: int, args: argparse.Namespace) -> dict[str, float]:
    """Medians over the steps after the first two."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "lightning_grpo", "fit", "--config", str(CONFIG), *options, *CORRECTED]
        command += ["--trainer.max_steps", str(steps + 2), "--trainer.default_root_dir", folder]
        command += ["--trainer.limit_val_batches", "0", "--trainer.num_sanity_val_steps", "0"]
        command += ["--data.validation_size", "0", "--model.max_completion_length", str(args.max_completion_length)]
        if args.model:
            command += ["--model.model", args.model]
        result = subprocess.run(
            command,
            env=os.environ | {"OMP_NUM_THREADS": str(len(cores))},
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
            capture_output=True,
            text=True,
        )
        if result.returncode:
            sys.exit(result.stderr[-3000:])
        with next(Path(folder).rglob("metrics.csv")).open() as file:
            logged = [line for line in csv.DictReader(file) if line.get("step_time")][2:]
    return {phase: statistics.median(float(line[phase]) for line in logged) for phase in PHASES}


if __name__ == "__main__":
    main()
