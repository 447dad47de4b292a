"""Tensors as compiled row functions read them: columns of a row side by side, values of rows side by side, in fp32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_grpo.errors import UserError


def block_rows(a: Tensor) -> Tensor:
    """``a`` [N, W], or a copy of it if columns do not lie side by side."""
    return a if a.stride(1) == 1 else a.contiguous()


@contextmanager
def written_rows(out: Tensor) -> Iterator[Tensor]:
    """Memory in the place of ``out`` [N, W], which is written there in the end if its columns lie apart."""
    memory = out if out.stride(1) == 1 else torch.empty(out.shape, dtype=out.dtype, device=out.device)
    yield memory
    if memory is not out:
        out.copy_(memory)


def read_values(x: Tensor) -> Tensor:
    """[N] for reading: integers as int64, numbers as fp32."""
    return x.to(torch.float32 if x.is_floating_point() else torch.int64).contiguous()


def check_written(*values: Tensor) -> None:
    """Say so if [N] values that are written in place do not lie as they should."""
    if not all(x.is_contiguous() and x.dtype == torch.float32 for x in values):
        raise UserError("statistics must be contiguous fp32, as Statistics.empty lays them out")
