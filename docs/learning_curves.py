"""Draw the rewards of a run and of its held-out prompts, and further metrics.

    python docs/learning_curves.py runs/calculator docs/calculator.png tools/call_frequency tools/failure_frequency
    python docs/learning_curves.py runs/guess docs/guess.png environment/done environment/turns

Each argument after the file is a metric of docs/metrics.md. It needs the extra plot (matplotlib).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_grpo.record import read_run
from lightning_grpo.record.reader import Run

HELD_OUT = ("val/reward", "val/reward/low", "val/reward/high")


def draw(run: Run, file: Path, names: Sequence[str]) -> None:
    """Write a PNG with one panel for the reward, and one for each metric of ``names``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * (1 + len(names)), 2.9), layout="constrained")
    panels = figure.subplots(1, 1 + len(names), squeeze=False)[0]
    steps = [line["step"] for line in run.metrics]
    for panel, name in zip(panels, ["reward", *names], strict=True):
        panel.plot(steps, [line[name] for line in run.metrics], color="tab:blue", label="training")
        panel.set_title(name)
        panel.set_xlabel("optimizer step")
        panel.grid(alpha=0.3)
    at, means, lows, highs = zip(*([line["step"], *map(line.get, HELD_OUT)] for line in run.held_out), strict=True)
    errors = [[m - x for m, x in zip(means, lows, strict=True)], [x - m for m, x in zip(means, highs, strict=True)]]
    panels[0].errorbar(at, means, errors, fmt="o-", color="tab:orange", capsize=3, label="held out, 95 % interval")
    panels[0].legend(loc="lower right", fontsize="small")
    for panel in panels:
        panel.set_ylim(bottom=0)
    figure.savefig(file, dpi=120)


def main(argv: Sequence[str]) -> None:
    """Draw the curves of a run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("file", type=Path, help="PNG to write")
    parser.add_argument("names", nargs="*", metavar="METRIC")
    arguments = parser.parse_args(argv)
    draw(read_run(arguments.run), arguments.file, arguments.names)


if __name__ == "__main__":
    main(sys.argv[1:])
