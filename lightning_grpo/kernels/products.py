"""Matrix products with blocks of the vocabulary, by the fastest routine of the device."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def logits_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of logits: fp32 if the matrix product supports it as output."""
    return torch.float32 if hidden.is_cuda else hidden.dtype


def block_memory(hidden: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Allocate a block of logits [N, W]. On a GPU rows are padded to multiples of 128 bytes for aligned access."""
    return torch.empty(len(hidden), width + (-width % 64 if hidden.is_cuda else 0), dtype=dtype, device=hidden.device)


def view(memory: Tensor, shape: torch.Size) -> Tensor:
    """Return the first elements of ``memory`` in this shape."""
    return memory.view(-1)[: shape.numel()].view(shape)


def block_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: slice, memory: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the weights [W, H] of ``ids`` and the head's output [N, ≥ W] for them, if possible in ``memory``."""
    w = weight[ids].to(hidden.dtype)
    b = None if bias is None else bias[ids].to(hidden.dtype)
    if linear := _routine(hidden):
        return w, linear(hidden, w, b)
    a = view(memory, torch.Size((len(hidden), len(w) + (-len(w) % 64 if hidden.is_cuda else 0))))
    out = a[:, : len(w)]
    if b is None:
        torch.mm(hidden, w.T, **_result(out, hidden), out=out)
    else:
        torch.addmm(b, hidden, w.T, **_result(out, hidden), out=out)
    return w, a


def product(x: Tensor, y: Tensor) -> Tensor:
    """x @ y."""
    linear = _routine(x)
    return x @ y if linear is None else linear(x, y.T, None)


def write(out: Tensor, x: Tensor, y: Tensor, *, add: bool) -> None:
    """out = x @ y, or out += x @ y."""
    wider = x.is_cuda and out.dtype == torch.float32
    if _routine(x) or not (out.dtype == x.dtype or wider):
        out.add_(product(x, y)) if add else out.copy_(product(x, y))
    elif add:
        torch.addmm(out, x, y, **_result(out, x), out=out)
    else:
        torch.mm(x, y, **_result(out, x), out=out)


def _result(out: Tensor, x: Tensor) -> dict[str, Any]:
    """Return the argument for products of ``x`` in the dtype of ``out``."""
    return {} if out.dtype == x.dtype else {"out_dtype": out.dtype}


def _routine(x: Tensor) -> Callable | None:
    """Return a routine for x @ yᵀ + b that is faster than torch.mm, or None."""
    fp32 = x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() > 0
    return _onednn_linear() if fp32 else None


@functools.cache
def _onednn_linear() -> Callable | None:
    """Return oneDNN's fp32 product; torch.mm uses MKL, which uses AVX-512 on Intel's CPUs only.

    The operator is private to torch, so it is tested once. Without it torch.mm is used, at half the speed.
    """
    if not torch.backends.mkldnn.is_available():
        return None
    x, y, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]]), torch.tensor([7.0, 8.0])
    try:
        operator = torch.ops.mkldnn._linear_pointwise
        linear = lambda x, y, b: operator(x, y, b, "none", [], "")
        if torch.equal(linear(x, y, b), torch.tensor([[18.0, 25.0]])):
            return linear
        reason = "its result is wrong"
    except (AttributeError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
    log.warning(
        f"torch {torch.__version__} has no usable mkldnn._linear_pointwise ({reason}), so fp32 heads take up to "
        "twice as long"
    )
    return None
