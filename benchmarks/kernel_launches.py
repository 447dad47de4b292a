"""Count the launches, synchronizations and bytes read and written of the log-prob kernel, without a GPU.

The GPU's own code path runs on fake tensors, which have shapes and types but no data. Every operator except views
counts as one launch (some make two or three), and every result that the host waits for as a synchronization. Rows are
printed for blocks of 16 MiB, with 256 MiB kept, and for the budget in use. `--check` fails unless launches, at 6 µs
each, take less time than the matrix products at 800 TFLOP/s wherever the hidden size is 1,536 or more.
"""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_grpo.kernels import blocks, triton_rows
from lightning_grpo.kernels.blocks import Budget
from lightning_grpo.kernels.linear import _LinearLogprob
from lightning_grpo.kernels.softmax import Transform

SHAPES = [(1536, 151_936, 4096), (896, 151_936, 8192), (4096, 128_256, 4096), (576, 49_152, 3072)]
# Products of [N, H] by [H, V] that a path can't do without.
PRODUCTS = {"known ahead": 3, "any loss": 3, "frozen head": 2, "scoring": 1}
BUDGETS = {"16 MiB": Budget(16 << 20, 256 << 20, 256 << 20), "in use": blocks.budget(gpu=True, itemsize=2)}
LAUNCH_S, FLOPS = 6e-6, 800e12
# These take memory, and launch nothing.
MEMORY = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "lift_fresh")


class Count(TorchDispatchMode):
    """Count launches, synchronizations and bytes of the block. The host reads fixed results: all rows take part, all
    checks pass, all numbers are 0."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Counter(launches=0, synchronizations=0, bytes=0)

    def launch(self, *tensors: Tensor) -> None:
        self.found["launches"] += 1
        self.found["bytes"] += sum(x.numel() * x.element_size() for x in tensors)

    def answer(self, tensor: Tensor) -> list[float]:
        """Replacement for ``tolist``."""
        self.found["synchronizations"] += 1
        return [1.0 if tensor.is_floating_point() else 0] * len(tensor)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kind, name = function._schema.name.split("::")
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if name in ("_local_scalar_dense", "nonzero"):
            self.found["synchronizations"] += 1
            if name != "nonzero":
                return True
            self.launch(*read)
            return torch.arange(len(args[0]))[:, None]
        found = function(*args, **kwargs or {})
        made = [x for x in tree_leaves(found) if isinstance(x, Tensor) and all(x is not y for y in read)]
        if kind == "aten" and not function.is_view and name not in MEMORY:
            self.launch(*read, *made)
        return found

    def row_kernel(self, *, reads: int) -> "RowKernel":
        """Replacement for a Triton kernel."""
        return RowKernel(self, reads)


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


def count(path: str, H: int, V: int, N: int, sizes: Budget, masters: bool) -> dict[str, int]:
    """Counts of one forward and backward pass."""
    trained = path in ("known ahead", "any loss")
    recording = path != "scoring"
    counting = Count()
    with (
        FakeTensorMode(),
        torch.no_grad(),
        patch.object(FakeTensor, "is_cuda", True),
        patch.object(FakeTensor, "tolist", lambda tensor: counting.answer(tensor)),
        patch.object(blocks, "budget", lambda **_: sizes),
        patch.object(triton_rows, "_accumulate_kernel", counting.row_kernel(reads=2)),
        patch.object(triton_rows, "_gradient_kernel", counting.row_kernel(reads=1)),
    ):
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
    return dict(counting.found)


def product_seconds(path: str, H: int, V: int, N: int) -> float:
    """Minimum time of the matrix products of a path."""
    return 2 * PRODUCTS[path] * N * H * V / FLOPS


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="only the first shape")
    parser.add_argument("--check", action="store_true", help="exit with 1 if launches take longer than products")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    results, bad = [], 0
    columns = f"{'launches':>9}{'syncs':>6}{'GB':>7}{'ms':>6}{'GEMM ms':>8}"
    print(f"{'H':>5}{'V':>8}{'N':>6} {'weights':8}{'path':12}{'budget':7}{columns}")
    for H, V, N in SHAPES[: 1 if args.quick else None]:
        for masters in (False, True):
            for path in PRODUCTS:
                floor = product_seconds(path, H, V, N)
                for name, sizes in BUDGETS.items():
                    found = count(path, H, V, N, sizes, masters)
                    row = {"H": H, "V": V, "N": N, "masters": masters, "path": path, "budget": name, **found}
                    results.append(row)
                    time = found["launches"] * LAUNCH_S
                    print(
                        f"{H:5}{V:8}{N:6} {'fp32' if masters else 'bf16':8}{path:12}{name:7}{found['launches']:9}"
                        f"{found['synchronizations']:6}{found['bytes'] / 1e9:7.1f}{1e3 * time:6.1f}{1e3 * floor:8.1f}",
                        flush=True,
                    )
                bad += H >= 1536 and time > floor
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    print(f"{bad} of the paths in use spend more time on launches than on products")
    return int(bad > 0 and args.check)


if __name__ == "__main__":
    sys.exit(main())
