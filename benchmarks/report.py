"""A report of many steps and samples: the time to write it, its size, and how fast the page reacts in a browser.

The run has `--steps` optimizer steps with 60 metrics each and 10,000 samples of 60 tokens with log-probs. The page is
opened in the headless Chromium of the tests (`make browser`), and its list of samples is filtered by a word. The other
side of the comparison is a page of the same run without samples.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_grpo.record import read_run
from lightning_grpo.record.schema import COLUMNS, LOGPROBS, METRICS
from lightning_grpo.report.page import write

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from chromium import chromium, executable

SAMPLES, TOKENS, GROUP = 10_000, 60, 8
MAX_WRITE, MAX_OPEN, MAX_FILTER = 20.0, 10.0, 1.0
ROW, COUNT, TEXT = ".sample-row", ".sample-count", ".sample-filters [name=text]"
WORDS = [f"word{i}" for i in range(20)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--quick", action="store_true", help="1,000 steps instead of --steps")
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"fail if writing takes over {MAX_WRITE} s, opening over {MAX_OPEN} s, or filtering over {MAX_FILTER} s",
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    steps = 1000 if args.quick else args.steps
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_run(folder, steps)
        for samples in (0, SAMPLES):
            rows.append({"steps": steps, "samples": samples} | measure(folder, samples))
            print("{samples:6} samples: written in {write:.1f} s, {megabytes:.1f} MB".format(**rows[-1]), end="")
            print("".join(f", {what} {rows[-1][what]:.2f} s" for what in ("open", "filter") if what in rows[-1]))
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    without, full = rows
    print(
        f"report: {steps:,} steps and {SAMPLES:,} samples in {full['write']:.1f} s "
        f"({full['write'] / without['write']:.1f} × without samples)"
        + ("; no browser here" if "open" not in full else f", opened in {full['open']:.1f} s")
    )
    slow = full["write"] > MAX_WRITE or full.get("open", 0) > MAX_OPEN or full.get("filter", 0) > MAX_FILTER
    if args.check and slow:
        sys.exit(1)


def write_run(folder: Path, steps: int) -> None:
    """Write the folder of a run, as `Record` does."""
    draw = random.Random(0)
    (folder / "run.json").write_text(json.dumps({"format": 1, "model": "tiny", "max_steps": steps, "seed": 0}))
    names = ["reward", "loss", "kl", "entropy", "grad_norm", "step_time", *(f"metric_{i}" for i in range(54))]
    with (folder / METRICS).open("w") as out:
        for step in range(1, steps + 1):
            out.write(json.dumps({"step": step, "time": step} | {name: draw.random() for name in names}) + "\n")
    texts = [" ".join(draw.choices(WORDS, k=TOKENS)) for _ in range(SAMPLES)]
    columns = {
        "step": [1 + i * steps // SAMPLES for i in range(SAMPLES)],
        "rollout": [i * steps // SAMPLES for i in range(SAMPLES)],
        "rank": [0] * SAMPLES,
        "group": [i // GROUP for i in range(SAMPLES)],
        "index": [i % GROUP for i in range(SAMPLES)],
        "prompt": ["What is 3 + 4?"] * SAMPLES,
        "completion": texts,
        "completion_ids": [[draw.randrange(40_000) for _ in range(TOKENS)] for _ in range(SAMPLES)],
        "reward": [draw.random() for _ in range(SAMPLES)],
        "advantage": [draw.random() - 0.5 for _ in range(SAMPLES)],
        "truncated": [False] * SAMPLES,
        "finish_reason": ["stop"] * SAMPLES,
    } | {field.name: [[-draw.random() for _ in range(TOKENS)] for _ in range(SAMPLES)] for field in LOGPROBS}
    schema = pa.schema([field for field in [*COLUMNS, *LOGPROBS] if field.name in columns])
    (folder / "samples").mkdir()
    pq.write_table(pa.table(columns, schema=schema), folder / "samples" / "rank0-000000.parquet")


def measure(folder: Path, samples: int) -> dict[str, float]:
    """Write the report and open it."""
    page = folder / "report.html"
    start = time.perf_counter()
    write([read_run(folder)], page, most_samples=samples)
    figures = {"write": time.perf_counter() - start, "megabytes": page.stat().st_size / 1e6}
    if executable() is None:
        return figures
    with chromium() as browser:
        tab = browser.new_page()
        start = time.perf_counter()
        tab.goto(page.as_uri(), timeout=120_000)
        if samples:
            tab.wait_for_selector(ROW, timeout=120_000)
        figures["open"] = time.perf_counter() - start
        if samples:
            before = tab.inner_text(COUNT)
            start = time.perf_counter()
            tab.fill(TEXT, "word7 word8")
            changed = "([at, before]) => document.querySelector(at).innerText !== before"
            tab.wait_for_function(changed, arg=[COUNT, before])
            figures["filter"] = time.perf_counter() - start
    return figures


if __name__ == "__main__":
    main()
