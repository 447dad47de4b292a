"""What an in-process engine leaves behind: resident memory after it is closed, and processes after Ctrl-C.

Claim: closing frees most of the engine's memory; a SIGINT while it samples ends `fit` within seconds, and no process
is left. Needs models/SmolLM2-135M-Instruct (`make quickstart`), or --model.
"""

import argparse
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from lightning_grpo.rollout import SampleRequest, VLLMEngine

ROOT = Path(__file__).parent.parent
MAX_SECONDS, MIN_FREED = 10.0, 0.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="has no effect: the benchmark takes about a minute")
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"fail if the exit takes over {MAX_SECONDS} s or less than {MIN_FREED:.0%} of the memory is freed",
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--model", default=str(ROOT / "models" / "SmolLM2-135M-Instruct"))
    args = parser.parse_args()
    figures = measure_memory(args.model) | measure_interrupt(args.model)
    for name, value in figures.items():
        print(f"{name:44} {value:10.3f}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    freed, seconds = figures["share of the engine's memory freed"], figures["from SIGINT to the end, s"]
    left = figures["processes left"]
    print(
        f"engine_cleanup: {freed:.0%} of the memory freed, exit {seconds:.1f} s after SIGINT, {left:.0f} processes left"
    )
    if args.check and (freed < MIN_FREED or seconds > MAX_SECONDS or left):
        sys.exit(1)


def measure_memory(model: str) -> dict[str, float]:
    """The first engine loads libraries and code, which stay; the second shows what an engine itself takes and frees."""

    def resident() -> float:
        gc.collect()
        return psutil.Process().memory_info().rss / 2**30

    figures = {}
    for turn in ("first", "second"):
        before = resident()
        with tempfile.TemporaryDirectory() as folder:
            engine = VLLMEngine(
                model,
                eos_token_ids=[0],
                log_file=Path(folder) / "vllm.log",
                engine_args={"enforce_eager": True, "max_model_len": 256, "kv_cache_memory_bytes": 1 << 30},
            )
            engine.generate(SampleRequest(prompts=[[1, 2, 3]] * 64, seeds=[[i] for i in range(64)], max_tokens=32))
            during = resident()
            engine.close()
            del engine
        after = resident()
        figures |= {
            f"{turn} engine: {when}, GiB": x
            for when, x in zip(("before", "with", "after"), (before, during, after), strict=True)
        }
    figures["share of the engine's memory freed"] = (during - after) / (during - before)
    return figures


def measure_interrupt(model: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "lightning_grpo", "fit", "--config", "configs/quickstart.yaml",
            "--model.model", model, "--trainer.default_root_dir", folder, "--rollout", "VLLMRollout",
            "--trainer.num_sanity_val_steps", "0", "--model.max_completion_length", "400",
        ]  # fmt: skip
        log = Path(folder) / "output"
        with log.open("w") as out:
            run = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True)
        while "VLLMEngine is ready" not in log.read_text():
            if run.poll() is not None:
                raise RuntimeError(f"the run ended before it was interrupted: {log.read_text()[-2000:]}")
            time.sleep(0.2)
        # Well inside the first rollout, which takes tens of seconds at this length.
        time.sleep(5)
        children = psutil.Process(run.pid).children(recursive=True)
        start = time.perf_counter()
        os.kill(run.pid, signal.SIGINT)
        run.wait(timeout=120)
        seconds = time.perf_counter() - start
        _, alive = psutil.wait_procs(children, timeout=1)
        return {
            "from SIGINT to the end, s": seconds,
            "exit code": run.returncode,
            "processes left": len(alive),
        }


if __name__ == "__main__":
    main()
