"""The row arithmetic of `torch_rows` in C++ for CPUs, which is several times as fast: see cpp_rows.cpp.

It is compiled for this processor at the first use, which takes a fraction of a second per process.
"""

import ctypes
import functools
import logging
import os
import shlex
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from lightning_grpo.kernels import torch_rows
from lightning_grpo.kernels.pointers import block_rows, check_written, read_values, written_rows
from lightning_grpo.kernels.softmax import FLOOR, Softmax, Statistics, Transform

log = logging.getLogger(__name__)

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-shared"]
# Flags that not every compiler supports, best first: Apple's Clang has no OpenMP library, and some compilers select the
# processor with -mcpu.
PROCESSORS = [["-march=native"], ["-mcpu=native"], []]
THREADS = [["-fopenmp"], ["-fopenmp-simd"], []]

# Only the path of GPUs uses it.
join = torch_rows.join


def takes(a: Tensor, out: Tensor | None, transform: Transform) -> bool:
    """Whether the compiled functions support reading the block ``a`` and writing to ``out``."""
    same_dtype = out is None or out.dtype == a.dtype
    return a.dtype in NAMES and same_dtype and a.stride(1) == 1 and transform.cap is None and _library() is not None


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Return the compiled functions; log a warning and return None if they can't be compiled."""
    try:
        compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
        with tempfile.TemporaryDirectory() as folder:
            *tunings, plain = (processor + threads for threads in THREADS for processor in PROCESSORS)
            for tuning in tunings:
                with suppress(OSError, subprocess.CalledProcessError):
                    return _compile([*compiler, *FLAGS, *tuning], Path(folder))
            return _compile([*compiler, *FLAGS, *plain], Path(folder))
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        reason = (getattr(error, "stderr", None) or "").strip() or str(error)
        log.warning(
            f"could not compile the CPU kernels ({reason.splitlines()[-1]}); using PyTorch instead, about 20 % slower"
        )
        return None


def _compile(command: list[str], folder: Path) -> ctypes.CDLL:
    source, file = Path(__file__).with_suffix(".cpp"), folder / "cpp_rows.so"
    subprocess.run([*command, source, "-o", file], check=True, capture_output=True, text=True, errors="replace")
    return ctypes.CDLL(str(file))


def accumulate(
    a: Tensor,
    ids: slice,
    targets: Tensor,
    transform: Transform,
    stats: Statistics,
    weights: Tensor | None = None,
    joins: Tensor | None = None,
) -> None:
    """See `torch_rows.accumulate`."""
    check_written(*stats)
    a = block_rows(a)
    with written_rows(a if weights is None else weights) as out:
        written = (*stats, None if joins is None else joins[0])
        _call("accumulate", a, None if weights is None else out, ids, targets, (transform.factor,), written)


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
    """See `torch_rows.gradient`."""
    read = (transform.factor, softmax.lse, softmax.rest, softmax.entropy, c_logprob, c_entropy)
    with written_rows(out) as memory:
        _call("gradient", a, memory, ids, targets, read)


def _call(
    name: str,
    a: Tensor,
    out: Tensor | None,
    ids: slice,
    targets: Tensor,
    read: tuple[Tensor | None, ...],
    written: tuple[Tensor | None, ...] = (),
) -> None:
    """Call a compiled function with pointers to ``a`` and ``out``, and to the values [N] in the order it expects."""
    # Keep references to the tensors until the function has returned.
    a = block_rows(a)
    values = [read_values(targets), *(None if x is None else read_values(x) for x in read), *written]
    pointer = lambda x: None if x is None else ctypes.c_void_p(x.data_ptr())
    block = lambda x: (pointer(x), ctypes.c_int64(0 if x is None else x.stride(0)))
    sizes = (ctypes.c_int64(n) for n in (len(a), ids.stop - ids.start, ids.start))
    function = getattr(_library(), f"{name}_{NAMES[a.dtype]}")
    # The compiler may use another OpenMP library than torch, so the number of threads is passed explicitly.
    threads = ctypes.c_int(torch.get_num_threads())
    function(*block(a), *block(out), *sizes, threads, ctypes.c_float(FLOOR), *map(pointer, values))
