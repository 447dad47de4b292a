"""The row arithmetic of `torch_rows` in C++ for CPUs, several times as fast: see cpp_rows.cpp.

The machine's own compiler makes it, for the machine's own instructions, when it is first used: a fraction of a second,
once in each process.
"""

import ctypes
import functools
import logging
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from lightning_grpo.errors import UserError
from lightning_grpo.kernels.softmax import FLOOR, Softmax, Statistics, Transform

log = logging.getLogger(__name__)

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
FLAGS = ["-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"]


def takes(a: Tensor, transform: Transform) -> bool:
    """Whether there is a compiled row function for this block."""
    return a.dtype in NAMES and a.stride(1) == 1 and transform.cap is None and _library() is not None


@functools.cache
def _library() -> ctypes.CDLL | None:
    compiler = os.environ.get("CXX", "c++")
    with tempfile.TemporaryDirectory() as folder:
        source, file = Path(__file__).with_suffix(".cpp"), Path(folder) / "cpp_rows.so"
        try:
            subprocess.run([compiler, *FLAGS, source, "-o", file], check=True, capture_output=True, text=True)
            return ctypes.CDLL(file)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip().splitlines()[-1]
            log.warning(
                f"no C++ compiler could make the CPU's row kernels, plain torch takes about a fifth longer: {reason}"
            )
            return None


def accumulate(
    a: Tensor, ids: slice, targets: Tensor, transform: Transform, stats: Statistics, weights: Tensor | None = None
) -> Tensor | None:
    """`torch_rows.accumulate`."""
    joins = None if weights is None else torch.ones(2, len(a))
    written = (*stats, None if joins is None else joins[0])
    _call("accumulate", a, weights, ids, targets, (transform.factor,), written)
    return joins


def gradient(
    a: Tensor,
    out: Tensor,
    ids: slice,
    targets: Tensor,
    transform: Transform,
    softmax: Softmax,
    c_logprob: Tensor,
    c_entropy: Tensor | None,
) -> None:
    """`torch_rows.gradient`."""
    read = (transform.factor, softmax.lse, softmax.rest, softmax.entropy, c_logprob, c_entropy)
    _call("gradient", a, out, ids, targets, read)


def _call(
    name: str,
    a: Tensor,
    out: Tensor | None,
    ids: slice,
    targets: Tensor,
    read: tuple[Tensor | None, ...],
    written: tuple[Tensor | None, ...] = (),
) -> None:
    """Hand over pointers: rows of ``a`` and ``out``, then [N] of each of the others, in the function's order."""
    if not all(x is None or (x.is_contiguous() and x.dtype == torch.float32) for x in written):
        raise UserError("statistics must be contiguous fp32, as Statistics.empty lays them out")
    # Held until the function has returned.
    values = [targets.long().contiguous(), *(None if x is None else x.float().contiguous() for x in read), *written]
    pointer = lambda x: None if x is None else ctypes.c_void_p(x.data_ptr())
    block = lambda x: (pointer(x), ctypes.c_int64(0 if x is None else x.stride(0)))
    sizes = (ctypes.c_int64(n) for n in (len(a), ids.stop - ids.start, ids.start))
    function = getattr(_library(), f"{name}_{NAMES[a.dtype]}")
    # torch may have another OpenMP library than the compiler, which would not know its number of threads.
    threads = ctypes.c_int(torch.get_num_threads())
    function(*block(a), *block(out), *sizes, threads, ctypes.c_float(FLOOR), *map(pointer, values))
