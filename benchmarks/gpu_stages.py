"""Run the stages of `gpu.sh`, each in a process with its own time limit, so that a failure does not affect the others.

Prints a table and writes results.json with the measurements, the time and the last lines of each stage. The complete
output of each stage is written beside it.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "addopts=--strict-markers"]
MEASURE = [sys.executable, str(HERE / "gpu_measure.py")]


@dataclass(frozen=True)
class Stage:
    name: str
    command: list[str]
    limit: int
    """Time limit in seconds."""
    result: Path | None = None
    """JSON file that the stage writes. None: the last line of its output, if that is JSON."""


def stages(device: str, out: Path) -> list[Stage]:
    """The stages, most important first in case time runs out. On a CPU they use small shapes."""
    gpu = device == "cuda"
    small = [] if gpu else ["--small"]
    marked = sorted(str(file) for file in (HERE.parent / "tests").glob("test_*.py") if "mark.gpu" in file.read_text())
    grid = out / "grid.json"
    shapes = ["H576 V49k", "H1536 V152k"] if gpu else ["H576 V49k"]
    paths = [] if gpu else ["--paths", "ours", "naive", "--threads", "1"]
    fit = ["fit", "--config", "configs/smoke.yaml", "--rollout", "HFRollout", "--trainer.max_steps", "20"]
    fit += ["--trainer.accelerator", "gpu" if gpu else "cpu", "--trainer.precision", "bf16-mixed" if gpu else "32-true"]
    fit += ["--trainer.default_root_dir", str(out / "fit")]
    compare = [sys.executable, str(HERE / "logprob.py"), "--device", device, "--shapes", *shapes, *paths]
    compare += ["--dtypes", "bfloat16", "--active", "1.0", "--repeats", "1", "--json", str(grid)]
    checker = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1"] if gpu else []
    return [
        Stage("versions", [*MEASURE, "versions", device], 40),
        Stage("tests marked gpu", [*PYTEST, "-m", "gpu", *marked], 60),
        Stage("kernel tests", [*PYTEST, "-p", "on_device", "tests/test_kernels.py"], 90),
        Stage("launches", [*MEASURE, "launches", device, *small], 40),
        Stage("micro-batches", [*MEASURE, "micro_batches", device, *small], 60),
        Stage("sampling", [*MEASURE, "sampling", device, *small], 40),
        Stage("fit", [sys.executable, "-m", "lightning_grpo", *fit], 60),
        Stage("memory check", [*checker, *MEASURE, "memory_check", device], 50),
        Stage("kernel grid", compare, 150, grid),
    ]


def run(stage: Stage, limit: float, device: str, out: Path) -> dict:
    """Result of a stage, partial if it did not finish."""
    if limit < 5:
        return {"outcome": "no time left"}
    if shutil.which(stage.command[0]) is None:
        return {"outcome": f"{stage.command[0]} is not installed"}
    log, start = out / f"{stage.name.replace(' ', '_')}.txt", time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            stage.command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"ON_DEVICE": device},
            cwd=HERE.parent,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            outcome = "done" if code == 0 else f"exit code {code}"
        except subprocess.TimeoutExpired:
            outcome = f"not done after {limit:.0f} s"
        finally:
            # Its children as well, also those of a stage that ended.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_text(errors="replace").splitlines()
    return {
        "outcome": outcome,
        "seconds": round(time.monotonic() - start, 1),
        "result": _result(stage, lines),
        "end": lines[-12:],
    }


def _result(stage: Stage, lines: list[str]) -> object:
    try:
        return json.loads(stage.result.read_text() if stage.result else lines[-1])
    except (OSError, IndexError, ValueError):
        return None


def table(results: dict[str, dict]) -> str:
    lines = []
    for name, found in results.items():
        lines.append(f"{name:18}{found['outcome']:24}{found.get('seconds', ''):>8} s")
        result = found.get("result")
        rows = result if isinstance(result, list) else [result] if result else found.get("end", [])[-2:]
        for row in rows:
            text = row
            if isinstance(row, dict):
                shown = {k: v for k, v in row.items() if not isinstance(v, list | dict)}
                text = ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items())
            lines.append(f"    {text}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="run on the CPU, with small shapes, even if there is a GPU")
    parser.add_argument("--seconds", type=float, default=460, help="time limit of all stages together")
    parser.add_argument("--stages", nargs="+", help="names of the stages to run (default: all)")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT", "runs/gpu"), help="folder for the results")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not args.cpu else "cpu"
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.seconds
    results: dict[str, dict] = {}
    for stage in stages(device, out):
        if args.stages is None or stage.name in args.stages:
            results[stage.name] = run(stage, min(stage.limit, end - time.monotonic()), device, out)
            print(f"{stage.name}: {results[stage.name]['outcome']}", flush=True)
            (out / "results.json").write_text(json.dumps(results, indent=1))
    print(table(results))
    return int(any(found["outcome"] != "done" for found in results.values()))


if __name__ == "__main__":
    sys.exit(main())
