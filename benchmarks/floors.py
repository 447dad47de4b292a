"""Time of each stage of a training step, compared with its floor on this processor.

The work is that of step.py, by ours with `HFRollout`. For each precision a separate process takes three optimizer
steps: one to warm up, one whose stages are timed, and one in which each operation of PyTorch is timed and counted. The
stages are prefill, decode and sampling of tokens in the rollout, weight sync, rewards, scoring, then forward and
backward of the trunk, attention and the output head in the update, the measurements of the gradient, and the optimizer.

The floor of a stage is the time of its matrix products if each ran at the rate of large ones, or moved its operands at
the bandwidth of a copy if that takes longer; for the optimizer and the measurements of the gradient it is their bytes
at that bandwidth. Both rates are measured in the same process. All other operations count 0. The table is sorted by
seconds above the floor and shows what the stage does: products, elementwise operations, copies (including casts and
fills), the rest (Python, dispatch and kernels in C++), and memory touched for the first time (page faults). On one
thread seconds are CPU time, on which other work has little effect.

`--isa avx2` limits this processor's instructions to those of AVX2, through oneDNN's and PyTorch's variables.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import step

ISA = {"avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"}}
GOAL = 1.5
"""Seconds of rollout, scoring and update relative to their floors."""
ROLLOUT, UPDATE = (
    ("prefill", "decode", "sampling"),
    ("forward", "backward", "attention", "head", "gradient", "optimizer"),
)
PHASES = {"rollout": ROLLOUT, "sync": ("sync",), "score": ("score",), "update": (*UPDATE, "other")}
MOVES = {"gradient", "optimizer"}
"""Stages whose floor is that of the bytes that they move."""
COPIES = {"_to_copy", "copy_", "clone", "fill_", "zero_", "cat", "index", "stack", "zeros", "zeros_like"}
OPERATIONS = 8
"""Number of operations that are listed besides matrix products."""


# --- the rates of this machine ----------------------------------------------------------------------------------------


def clock() -> float:
    """CPU time of a single thread, on which other work has little effect, or else wall time."""
    import torch

    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def page_faults() -> int:
    """Pages of memory that this process has touched for the first time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def best_of(function, tries: int = 8) -> float:
    """Seconds of the fastest of several calls."""
    best = math.inf
    for _ in range(tries):
        start = clock()
        function()
        best = min(best, clock() - start)
    return best


def machine_rates(dtype) -> tuple[float, float]:
    """FLOP/s of a large matrix product, by the faster of the two routines in use, and bytes per second of a copy."""
    import torch

    from lightning_grpo.kernels.products import product

    size = 1536
    x, y = (torch.randn(size, size).to(dtype) for _ in range(2))
    flops = 2 * size**3 / min(best_of(lambda: x @ y), best_of(lambda: product(x, y)))
    source = torch.ones(1 << 26)
    target = source.clone()
    return flops, 2 * source.nbytes / best_of(lambda: target.copy_(source))


# --- counting the operations of a step --------------------------------------------------------------------------------


class Counts:
    """Seconds, floors and bytes of new memory, by stage and by kind of operation."""

    def __init__(self, flops: float, bandwidth: float) -> None:
        self.flops, self.bandwidth = flops, bandwidth
        self.stages: list[str] = []
        self.seconds: dict[str, float] = defaultdict(float)
        self.new: dict[str, float] = defaultdict(float)
        self.kinds: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.others: dict[str, float] = defaultdict(float)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time ``name``, without the stages inside it."""
        outer, start, faults = self.stages[-1:], clock(), page_faults()
        self.stages.append(name)
        try:
            yield
        finally:
            self.stages.pop()
            took, new = clock() - start, (page_faults() - faults) * resource.getpagesize()
            for stage, sign in [(name, 1), *((stage, -1) for stage in outer)]:
                self.seconds[stage] += sign * took
                self.new[stage] += sign * new

    def mode(self):
        """A context in which each operation of PyTorch is timed and counted."""
        import torch
        from torch.utils._python_dispatch import TorchDispatchMode

        counts = self

        class Counting(TorchDispatchMode):
            def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
                # Autograd sums gradients in place, except in such a mode.
                sums = operation is torch.ops.aten.add.Tensor and torch._C._current_autograd_node() is None
                if sums and counts.stages[-1:] == ["backward"]:
                    operation = torch.ops.aten.add_.Tensor
                start = clock()
                result = operation(*args, **kwargs or {})
                counts.add(operation, args, kwargs or {}, result, clock() - start)
                return result

        return Counting()

    def add(self, operation, args, kwargs, result, seconds: float) -> None:
        stage = self.stages[-1] if self.stages else "other"
        found, name = self.kinds[stage], operation.overloadpacket.__name__
        flops = products_flops(operation, args, kwargs, result)
        moved = 0 if operation.is_view else sum(x.nbytes for x in tensors((args, kwargs, result)))
        if flops:
            found["floor"] += max(flops / self.flops, moved / self.bandwidth)
            found["flops"] += flops
        elif stage in MOVES:
            found["floor"] += moved / self.bandwidth
        found["products" if flops else "copies" if name in COPIES else "elementwise"] += seconds
        if not flops:
            self.others[f"{name} ({stage})"] += seconds


def tensors(x) -> list:
    """The distinct tensors in nested tuples, lists and dictionaries."""
    from torch import Tensor
    from torch.utils._pytree import tree_leaves

    return list({id(leaf): leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor)}.values())


def products_flops(operation, args, kwargs, result) -> float:
    """Floating-point operations of matrix products; 0 of other operations."""
    from torch.utils.flop_counter import flop_registry

    if "_linear_pointwise" in str(operation):
        return 2.0 * args[0].numel() * args[1].shape[0]
    count = flop_registry.get(operation.overloadpacket)
    return 0.0 if count is None else float(count(*args, **kwargs, out_val=result))


# --- one precision, in its own process --------------------------------------------------------------------------------


def worker(job: dict) -> dict:
    import torch

    torch.set_num_threads(job["threads"])
    dtype = torch.float32 if job["precision"] == "fp32" else torch.bfloat16
    flops, bandwidth = machine_rates(dtype)
    plain, counted = Counts(flops, bandwidth), Counts(flops, bandwidth)
    steps = Steps(plain, counted)
    instrument(steps)
    step.run_ours(job, steps)
    stages = []
    for name, seconds in plain.seconds.items():
        kinds = counted.kinds[name]
        parts = {kind: kinds[kind] for kind in ("products", "elementwise", "copies")}
        rest = max(0.0, seconds - sum(parts.values()))
        stages.append(
            {"stage": name, "seconds": seconds, "floor": kinds["floor"], **parts, "rest": rest, "new": plain.new[name]}
        )
        stages[-1]["flops"] = kinds["flops"]
    others = dict(sorted(counted.others.items(), key=lambda item: -item[1])[:OPERATIONS])
    found = {"flops": flops, "bandwidth": bandwidth, "step": steps.steps[1]["total"], "peak": step.status("VmHWM")}
    return {**found, "stages": stages, "others": others}


class Steps(step.Clock):
    """Uses ``plain`` for the second optimizer step, and ``counted`` with its mode for the third."""

    def __init__(self, plain: Counts, counted: Counts) -> None:
        super().__init__()
        self.counts, self.plain, self.counted = Counts(1, 1), plain, counted
        self.mode, self.start = None, clock()

    def step(self) -> None:
        super().step()
        rest = clock() - self.start - sum(self.counts.seconds.values())
        self.counts.seconds["other"] = rest
        if self.mode is not None:
            self.mode.__exit__(None, None, None)
            self.mode = None
        if len(self.steps) < 3:
            self.counts = self.plain if len(self.steps) == 1 else self.counted
        if len(self.steps) == 2:
            self.mode = self.counted.mode()
            self.mode.__enter__()
        self.start = clock()

    def wrap(self, owner, method: str, name) -> None:
        """Make calls of ``owner.method`` a stage of the current step."""
        setattr(owner, method, self.staged(name, getattr(owner, method)))

    def staged(self, name, function):
        """``function`` as part of the stage ``name``, which may depend on its arguments.

        What scoring computes belongs to no other stage.
        """

        def call(*args, **kwargs):
            inside = name(*args) if callable(name) else name
            with self.counts.stage("score" if "score" in self.counts.stages else inside):
                return function(*args, **kwargs)

        return call


def instrument(steps: Steps) -> None:
    """Make stages of the functions that a step consists of."""
    import torch
    from lightning.pytorch.strategies import SingleDeviceStrategy

    from lightning_grpo import GRPOModule
    from lightning_grpo.kernels import attention, linear
    from lightning_grpo.policy.head import Head
    from lightning_grpo.rollout import SyncedEngine
    from lightning_grpo.rollout.hf import HFEngine
    from lightning_grpo.training.scorer import Scorer
    from lightning_grpo.training.step import StepMonitor

    steps.wrap(GRPOModule, "rollout", "sampling")
    steps.wrap(HFEngine, "forward", lambda engine, ids, *_: "prefill" if ids.shape[1] > 1 else "decode")
    steps.wrap(SyncedEngine, "sync", "sync")
    steps.wrap(GRPOModule, "compute_rewards", "rewards")
    for method in ("score", "score_with_norms", "score_reference"):
        steps.wrap(Scorer, method, "score")
    steps.wrap(GRPOModule, "training_step", "forward")
    steps.wrap(SingleDeviceStrategy, "backward", "backward")
    steps.wrap(Head, "logprobs", "head")
    for module, name in ((linear, "head"), (attention, "attention")):
        for function in vars(module).values():
            if isinstance(function, type) and issubclass(function, torch.autograd.Function):
                for method in ("forward", "backward"):
                    setattr(function, method, staticmethod(steps.staged(name, getattr(function, method))))
    for method in ("measure_gradient", "observe_backward", "clip_gradient"):
        steps.wrap(StepMonitor, method, "gradient")
    steps.wrap(torch.optim.AdamW, "step", "optimizer")


# --- all of them ------------------------------------------------------------------------------------------------------


def measure(job: dict, isa: str | None) -> dict:
    """The stages of one case, measured in a process of its own."""
    env = os.environ | {"OMP_NUM_THREADS": str(job["threads"]), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(step.ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, __file__, "--worker", json.dumps(job | {"folder": folder}), "--json", str(result)]
        done = subprocess.run(command, capture_output=True, text=True, env=env | ISA.get(isa or "", {}))
        if done.returncode:
            sys.exit(done.stderr)
        return json.loads(result.read_text())


def show(found: dict) -> None:
    """Print the stages, those furthest above their floor first, and then the phases."""
    print(
        f"  products {found['flops'] / 1e9:.0f} GFLOP/s, copies {found['bandwidth'] / 1e9:.1f} GB/s; "
        f"{found['step']:.2f} s per step, peak {found['peak']:.2f} GB\n"
        f"  {'stage':14}{'seconds':>9}{'floor':>8}{'ratio':>7}   "
        f"{'products':>9}{'elementwise':>12}{'copies':>8}{'rest':>7}{'GFLOP/s':>9}{'new GB':>8}"
    )
    for row in sorted(found["stages"], key=lambda row: row["floor"] - row["seconds"]):
        rate = row["flops"] / row["products"] / 1e9 if row["products"] else 0
        print(
            f"  {row['stage']:14}{row['seconds']:9.2f}{row['floor']:8.2f}{ratio(row)}   {row['products']:9.2f}"
            f"{row['elementwise']:12.2f}{row['copies']:8.2f}{row['rest']:7.2f}{rate:9.0f}{row['new'] / 1e9:8.2f}"
        )
    most = ", ".join(f"{name} {seconds:.2f}" for name, seconds in found["others"].items())
    print(f"  seconds of other operations: {most}")


def ratio(row: dict) -> str:
    """Seconds relative to the floor, or nothing without products."""
    return f"{row['seconds'] / row['floor']:7.2f}" if row["floor"] > 0.01 * row["seconds"] else f"{'':7}"


def phases(found: dict) -> dict[str, dict]:
    """Seconds and floors of rollout, scoring and update."""
    rows = {row["stage"]: row for row in found["stages"]}
    return {
        phase: {key: sum(rows[name][key] for name in names if name in rows) for key in ("seconds", "floor")}
        for phase, names in PHASES.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=step.ROOT / "models/SmolLM2-135M-Instruct")
    parser.add_argument("--precisions", nargs="+", default=["bf16-mixed", "fp32"], choices=["bf16-mixed", "fp32"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--isa", choices=list(ISA), help="use no instructions beyond these")
    step.add_work_options(parser)
    parser.add_argument("--beta", type=float, default=0.0, help="coefficient of the KL to the reference")
    parser.add_argument("--quick", action="store_true", help="all threads only")
    parser.add_argument(
        "--check", action="store_true", help=f"exit with 1 unless phases take {GOAL} times their floors"
    )
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        args.json.write_text(json.dumps(worker(json.loads(args.worker))))
        return 0
    if args.quick:
        from lightning_grpo.processor import cores

        args.threads = [cores()]
    results, missed, ratios = [], [], []
    names = ("prompts", "stories", "generations", "length", "micro_batch", "lora", "beta")
    with tempfile.TemporaryDirectory() as folder:
        model = step.endless_checkpoint(args.model, Path(folder) / "model")
        base = {name: vars(args)[name] for name in names}
        base |= {"model": str(model), "max_prompt": 64 + 128 * args.stories, "side": "ours", "engine": "hf"}
        base |= {"iterations": 1, "warm_up": 1, "steps": 2}
        for precision in args.precisions:
            for threads in args.threads:
                label = f"{precision}, threads {threads}{f', {args.isa}' if args.isa else ''}"
                print(label, flush=True)
                found = measure(base | {"precision": precision, "threads": threads}, args.isa)
                show(found)
                for phase, row in phases(found).items():
                    if ratio(row).strip():
                        print(f"  {phase}: {row['seconds']:.2f} s, {ratio(row).strip()} times its floor", flush=True)
                        ratios.append(row["seconds"] / row["floor"])
                        missed += [f"{label}: {phase}"] if phase != "sync" and ratios[-1] > GOAL else []
                results.append({"label": label, **found})
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    for line in missed:
        print(f"goal missed: {line} takes more than {GOAL} times its floor")
    print(f"{len(results)} measurements; phases take {min(ratios):.2f} to {max(ratios):.2f} times their floors")
    return int(bool(missed) and args.check)


if __name__ == "__main__":
    sys.exit(main())
