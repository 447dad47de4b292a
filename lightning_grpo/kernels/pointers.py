"""Tensors in the layout that compiled row functions expect: contiguous rows, and contiguous fp32 values per row."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_grpo.errors import UserError


def block_rows(a: Tensor) -> Tensor:
    """Return ``a`` [N, W], or a copy if its rows are not contiguous."""
    return a if a.stride(1) == 1 else a.contiguous()


@contextmanager
def written_rows(out: Tensor) -> Iterator[Tensor]:
    """Yield ``out`` [N, W]; if its rows are not contiguous, yield a buffer and copy it to ``out`` at the end."""
    memory = out if out.stride(1) == 1 else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    yield memory
    if memory is not out:
        out.copy_(memory)


def read_values(x: Tensor) -> Tensor:
    """Return ``x`` [N] contiguous, integers as int64 and floating-point numbers as fp32."""
    return x.to(torch.float32 if x.is_floating_point() else torch.int64).contiguous()


def check_written(*values: Tensor | None) -> None:
    """Raise `UserError` unless the values [N], which are written in place, are contiguous fp32."""
    if not all(x is None or (x.is_contiguous() and x.dtype == torch.float32) for x in values):
        raise UserError("statistics must be contiguous fp32, as created by Statistics.empty")
