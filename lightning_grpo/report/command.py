"""``lightning-grpo report``: one HTML file about one or several runs."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lightning_grpo.errors import UserError, optional
from lightning_grpo.stopping import Stopped

if TYPE_CHECKING:
    from lightning_grpo.record.reader import Run

PATIENCE = 600.0
"""Seconds without a new file or line after which `--live` takes a run to have ended."""


def parser() -> argparse.ArgumentParser:
    """The options."""
    out = argparse.ArgumentParser(
        prog="lightning-grpo report",
        description="Write one HTML file about runs, finished or not: the prediction beside what was measured, all "
        "metrics, findings and samples. It needs neither a network nor a server. Several runs are compared; runs that "
        "differ only in their seed are taken together.",
        epilog="Example: lightning-grpo report runs/quickstart && xdg-open runs/quickstart/logs/version_0/report.html",
    )
    add = out.add_argument
    add(
        "runs",
        metavar="RUN_DIR",
        nargs="+",
        type=Path,
        help="the folder of a run's logs (runs/NAME/logs/version_0), or a folder above it for its newest run",
    )
    add(
        "--out",
        metavar="FILE",
        type=Path,
        help="file to write (default: report.html in the folder of the run's logs, or in the current folder for several"
        " runs)",
    )
    add(
        "--samples",
        metavar="N",
        type=int,
        default=10_000,
        help="most samples in the page, of all runs together (default: 10000); 0 leaves them out",
    )
    add(
        "--live",
        metavar="SECONDS",
        nargs="?",
        type=float,
        const=10.0,
        help="write the file again every SECONDS (default: 10) until the runs end or Ctrl-C; the page reloads itself",
    )
    return out


def has_ended(run: "Run", patience: float) -> bool:
    """Whether a run has reached its last step, or has written nothing for long.

    Args:
        run: the run, as it was just read.
        patience: seconds without a new metric after which it is taken to have ended, or 20 steps if that is longer.
    """
    last, total = run.metrics[-1] if run.metrics else {}, run.info.get("max_steps")
    if isinstance(total, int) and 0 < total <= last.get("step", 0):
        return True
    written = max((file.stat().st_mtime for file in run.folder.iterdir() if file.suffix != ".html"), default=0.0)
    return time.time() - written > max(patience, 20 * float(last.get("step_time") or 0.0))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    arguments = parser().parse_args(argv)
    live = arguments.live
    if live is not None and not 1 <= live < float("inf"):
        raise UserError(f"--live is {live:g}; set 1 or more seconds")
    if arguments.samples < 0:
        raise UserError(f"--samples is {arguments.samples}; set 0 or more")
    optional("plotly", "report", "the report")
    # after the options are read
    from lightning_grpo.record.reader import read_run
    from lightning_grpo.report.page import write

    runs = [read_run(folder) for folder in arguments.runs]
    out = arguments.out or (runs[0].folder if len(runs) == 1 else Path()) / "report.html"
    if out.is_dir():
        out = out / "report.html"
    write(runs, out, most_samples=arguments.samples, reload_seconds=live)
    print(f"report: {out}", flush=True)
    if live is None:
        return
    try:
        while not all(has_ended(run, PATIENCE) for run in runs):
            write(runs, out, most_samples=arguments.samples, reload_seconds=live)
            time.sleep(live)
            runs = [read_run(folder) for folder in arguments.runs]
    except Stopped:
        pass  # Ctrl-C is how the user ends it
    write(runs, out, most_samples=arguments.samples)
