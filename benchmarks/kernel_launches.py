"""Count the launches, synchronizations and bytes of the log-prob kernel on a GPU, and predict its time, without one.

The GPU's own code path runs on fake tensors, which have shapes and types but no data. Every operator except views
counts as one launch (some make two or three), and every result that the host waits for as a synchronization. Rows are
printed for each step of the path's development, last the path in use. Times are predictions for an H100, not
measurements: an operator takes the longer of its FLOPs and its bytes at the published rates, and a path the longer of
the sum of these and 6 µs per launch. Peers are predicted from the bytes per logit that their operators read and write.
`--check` fails unless the path in use does not wait for the device (it does once if a coefficient is known and not all
gradients can be kept), and, for hidden sizes from 1,536, its launches take less time than its products, and a head
whose coefficient is known is predicted to take at most 1.35 times as long as these.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_grpo.devices import GPUS
from lightning_grpo.kernels import blocks, blockwise, chunkwise, linear, products, triton_rows
from lightning_grpo.kernels.blocks import Budget, MiB
from lightning_grpo.kernels.linear import _LinearLogprob
from lightning_grpo.kernels.softmax import Transform

CARD = GPUS["h100"]
# (H, V) of the heads of SmolLM2-135M, Qwen2.5-0.5B, 1.5B and 7B, and tokens of a micro-batch.
SHAPES = {
    "Qwen2.5-1.5B": (1536, 151_936, 4096),
    "SmolLM2-135M": (576, 49_152, 4096),
    "Qwen2.5-0.5B": (896, 151_936, 4096),
    "Qwen2.5-7B": (3584, 152_064, 4096),
    "Qwen2.5-1.5B, long": (1536, 151_936, 16_384),
}
# Products of [N, H] by [H, V] that a path can't do without.
PRODUCTS = {"known ahead": 3, "any loss": 3, "frozen head": 2, "scoring": 1}
LAUNCH_S = 6e-6
# Bytes per logit that a peer reads and writes outside of its products, and the FLOP/s of its products in the backward.
PEERS = {
    "naive, fp32 softmax": (52, CARD.flops),
    "TRL selective (one fused kernel each way)": (6, CARD.flops),
    "Liger fused linear (fp32 backward)": (90, CARD.flops_fp32),
}
# These take memory, and launch nothing.
MEMORY = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "lift_fresh")


def _add_separately(out: Tensor, x: Tensor, y: Tensor, *, add: bool) -> None:
    """`products.write` without accumulation inside the product."""
    out.add_(torch.mm(x, y)) if add else out.copy_(torch.mm(x, y))


@dataclass(frozen=True)
class Step:
    """A state of the path's development."""

    name: str
    head: ModuleType = chunkwise
    budget: Budget = blocks.budget(itemsize=2, memory=CARD.memory)  # noqa: RUF009
    write: Callable = products.write
    reads: int = 1
    """How often the row kernel reads logits whose weights it writes."""


STEPS = [
    Step("blocks of 16 MiB", blockwise, Budget(16 * MiB, 256 * MiB, 256 * MiB), reads=2),
    Step("blocks of 128 MiB", blockwise, Budget(128 * MiB, 640 * MiB, 640 * MiB), reads=2),
    Step("one matrix per chunk", write=_add_separately, reads=2),
    Step("sums inside products", reads=2),
    Step("logits read once"),
]
IN_USE = STEPS[-1]


@dataclass
class Found:
    """Counts of one forward and backward pass."""

    launches: int = 0
    synchronizations: int = 0
    bytes: float = 0
    device_s: float = 0
    """Time of the operators at the published rates of the card, one after another."""

    @property
    def predicted_s(self) -> float:
        return max(self.device_s, self.launches * LAUNCH_S)


class Count(TorchDispatchMode):
    """Count launches, synchronizations and bytes of the block. The host reads fixed results: all rows take part, all
    checks pass, all numbers are 0."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Found()

    def launch(self, *tensors: Tensor, flops: float = 0) -> None:
        moved = sum(x.numel() * x.element_size() for x in tensors)
        self.found.launches += 1
        self.found.bytes += moved
        self.found.device_s += max(moved / CARD.bandwidth, flops / CARD.flops)

    def answer(self, tensor: Tensor) -> list[float]:
        """Replacement for ``tolist``."""
        self.found.synchronizations += 1
        return [1.0 if tensor.is_floating_point() else 0] * len(tensor)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kind, name = function._schema.name.split("::")
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name in ("_local_scalar_dense", "nonzero"):
            self.found.synchronizations += 1
            if name != "nonzero":
                return True
            self.launch(*read)
            return torch.arange(len(args[0]))[:, None]
        found = function(*args, **kwargs or {})
        made = [x for x in tree_leaves(found) if isinstance(x, Tensor) and all(x is not y for y in read)]
        if kind == "aten" and not function.is_view and name not in MEMORY:
            x, y = args[name == "addmm" :][:2] if name in ("mm", "addmm") else (None, None)
            self.launch(*read, *made, flops=0 if x is None else 2 * x.numel() * y.shape[1])
        return found


@dataclass
class RowKernel:
    """Counts a launch for a call of ``kernel[grid](block, stride, written, …)``."""

    count: Count
    reads: int
    """How often a row is read if it is written at all."""

    def __getitem__(self, grid: tuple[int]) -> Callable:
        return self.launch

    def launch(self, block: Tensor, stride: int, written: Tensor, *rest: object, **flags: object) -> None:
        writes = flags.get("WEIGHTS", True)
        self.count.launch(*[block] * (self.reads if writes else 1), *[written] * writes)


class JoinKernel(RowKernel):
    """A launch that reads the scales of the blocks, and no rows, since nearly all scales are 1."""

    def launch(self, block: Tensor, stride: int, scales: Tensor, *rest: object, **flags: object) -> None:
        self.count.launch(scales)


@contextmanager
def on_fake_gpu(counting: Count, step: Step) -> Iterator[None]:
    with ExitStack() as stack:
        for change in (
            FakeTensorMode(),
            torch.no_grad(),
            patch.object(FakeTensor, "is_cuda", True),
            patch.object(FakeTensor, "tolist", lambda tensor: counting.answer(tensor)),
            patch.object(blocks, "_gpu_memory", lambda device: CARD.memory),
            patch.object(blocks, "budget", lambda **_: step.budget),
            patch.object(linear, "_head_for", lambda hidden: step.head),
            patch.object(chunkwise, "write", step.write),
            patch.object(triton_rows, "_accumulate_kernel", RowKernel(counting, step.reads)),
            patch.object(triton_rows, "_gradient_kernel", RowKernel(counting, 1)),
            patch.object(triton_rows, "_join_kernel", JoinKernel(counting, 0)),
        ):
            stack.enter_context(change)
        yield


def count(path: str, H: int, V: int, N: int, step: Step, masters: bool) -> Found:
    """Counts of one forward and backward pass with weights in bf16, or in fp32 under autocast (``masters``)."""
    trained = path in ("known ahead", "any loss")
    recording = path != "scoring"
    counting = Count()
    with on_fake_gpu(counting, step):
        hidden = torch.empty(N, H, dtype=torch.bfloat16)
        weight = torch.empty(V, H, dtype=torch.float32 if masters else torch.bfloat16)
        targets, c = torch.empty(N, dtype=torch.int64), torch.empty(N)
        saved = SimpleNamespace(
            needs_input_grad=(recording, trained, False, *[False] * 5),
            set_materialize_grads=lambda _: None,
            mark_non_differentiable=lambda *_: None,
        )
        saved.save_for_backward = lambda *tensors: setattr(saved, "saved_tensors", tensors)
        with counting:
            transform = Transform.build(targets, V, 1.0)
            known = c if path == "known ahead" else None
            _LinearLogprob.forward(saved, hidden, weight, None, targets, transform, False, known, recording)
            if recording:
                _LinearLogprob.backward(saved, c, None)
    return counting.found


def product_seconds(path: str, H: int, V: int, N: int) -> float:
    """Minimum time of the matrix products of a path."""
    return 2 * PRODUCTS[path] * N * H * V / CARD.flops


def peer_seconds(peer: str, H: int, V: int, N: int) -> float:
    """Predicted time of forward and backward of a trained head."""
    per_logit, backward = PEERS[peer]
    return 2 * N * H * V / CARD.flops + 4 * N * H * V / backward + per_logit * N * V / CARD.bandwidth


def table(quick: bool) -> tuple[list[dict], list[str]]:
    """Print a row for each path, step and peer; return the rows and the goals that are missed."""
    results, missed = [], []
    columns = f"{'launches':>9}{'syncs':>6}{'GB':>7}{'launch ms':>10}{'GEMM ms':>8}{'predicted ms':>13}"
    print(f"Predictions for a {CARD.name} at its published rates, which no run on a card has confirmed.")
    for model, (H, V, N) in list(SHAPES.items())[: 1 if quick else None]:
        print(f"{model}: H {H}, V {V}, N {N}, bfloat16\n{'weights':8}{'path':12}{'step':42}{columns}")
        for masters in (False, True):
            for path in PRODUCTS:
                floor = product_seconds(path, H, V, N)
                for step in STEPS:
                    found = count(path, H, V, N, step, masters)
                    row = {"model": model, "H": H, "V": V, "N": N, "masters": masters, "path": path, "step": step.name}
                    row |= {k: getattr(found, k) for k in ("launches", "synchronizations", "bytes", "predicted_s")}
                    results.append(row | {"products_s": floor})
                    print(
                        f"{'fp32' if masters else 'bf16':8}{path:12}{step.name:42}{found.launches:9}"
                        f"{found.synchronizations:6}{found.bytes / 1e9:7.1f}{1e3 * found.launches * LAUNCH_S:10.1f}"
                        f"{1e3 * floor:8.1f}{1e3 * found.predicted_s:13.1f}",
                        flush=True,
                    )
                label = f"{model}, {path}, {'fp32' if masters else 'bf16'}"
                # The gradient of a micro-batch whose matrices are not all kept is compared with the coefficient.
                allowed = int(path == "known ahead" and IN_USE.budget.kept < 2 * N * V)
                if found.synchronizations > allowed:
                    missed.append(f"{label}: {found.synchronizations} synchronizations")
                if H >= 1536 and found.launches * LAUNCH_S > floor:
                    missed.append(f"{label}: launches take longer than products")
                if H >= 1536 and path == "known ahead" and found.predicted_s > 1.35 * floor:
                    missed.append(f"{label}: predicted {found.predicted_s / floor:.2f} times the products")
        for peer in PEERS:
            seconds = peer_seconds(peer, H, V, N)
            results.append({"model": model, "H": H, "V": V, "N": N, "peer": peer, "predicted_s": seconds})
            floor = product_seconds("any loss", H, V, N)
            print(f"{'bf16':8}{'trained':12}{peer:42}{1e3 * floor:40.1f}{1e3 * seconds:13.1f}")
    return results, missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the first shape")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a goal is missed")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    results, missed = table(args.quick)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    for line in missed:
        print("goal missed:", line)
    print(f"{len(results)} rows; {len(missed)} goals missed")
    return int(bool(missed) and args.check)


if __name__ == "__main__":
    sys.exit(main())
