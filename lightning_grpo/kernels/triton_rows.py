"""The row arithmetic of `torch_rows` as Triton kernels for CUDA and ROCm, with one program per row.

The logits are read once or twice. Names, arguments and results are those of `torch_rows`. A row is read and written
with its padding: if that extends rows to a multiple of 64 columns, every access is 128 bits wide.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightning_grpo.kernels.pointers import block_rows, check_written, read_values, written_rows
from lightning_grpo.kernels.softmax import FLOOR, Softmax, Statistics, Transform

WARPS = 8
# Columns that a program keeps in registers: eight per lane, which are 128-bit accesses for 2 and for 4 bytes.
TILE = 8 * WARPS * (64 if torch.version.hip else 32)


@triton.jit
def _logits(a_ptr, columns, width, room, factor, cap, FLOOR: tl.constexpr, CAPPED: tl.constexpr):
    z = tl.load(a_ptr + columns, mask=columns < room, other=0.0).to(tl.float32) * factor
    if CAPPED:
        # tanh by exp needs no device library, and saturates for large |z| without NaN.
        z = cap * (1 - 2 / (1 + tl.exp(2 * z / cap)))
    # maximum would hide NaN. Padding is set last, because a softcap would raise it.
    return tl.where((z < FLOOR) | (columns >= width), FLOOR, z)


@triton.jit
def _chain(g, z, cap, CAPPED: tl.constexpr):
    if CAPPED:
        share = z / cap
        g = g * (1 - tl.minimum(share * share, 1.0))
    return g


@triton.jit
def _accumulate_kernel(
    a_ptr,
    a_stride,
    w_ptr,
    w_stride,
    targets_ptr,
    factor_ptr,
    cap_ptr,
    m_ptr,
    s_ptr,
    t_ptr,
    y_ptr,
    q_ptr,
    old_ptr,
    first,
    width,
    room,
    FLOOR: tl.constexpr,
    CAPPED: tl.constexpr,
    WEIGHTS: tl.constexpr,
    SQUARES: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    a_ptr += row * a_stride
    target = (tl.load(targets_ptr + row) - first).to(tl.int32)
    factor = tl.load(factor_ptr + row)
    cap = tl.load(cap_ptr + row) if CAPPED else 1.0
    # Read before the loops: with weights, the second one overwrites the block.
    if (target >= 0) & (target < width):
        tl.store(y_ptr + row, _logits(a_ptr, target, width, room, factor, cap, FLOOR, CAPPED))
    before = tl.load(m_ptr + row)
    m = before
    s = tl.zeros([TILE], tl.float32)
    t = tl.zeros([TILE], tl.float32)
    q = tl.zeros([TILE], tl.float32)
    for start in range(0, width, TILE):
        columns = start + tl.arange(0, TILE)
        z = _logits(a_ptr, columns, width, room, factor, cap, FLOOR, CAPPED)
        z = tl.where(columns == target, FLOOR, z)
        largest = tl.maximum(m, tl.max(z, 0))
        shrink = tl.exp(m - largest)
        e = tl.exp(z - largest)
        s = s * shrink + e
        t = t * shrink + e * z
        if SQUARES:
            q = q * (shrink * shrink) + e * e
        m = largest
    old = tl.exp(before - m)
    tl.store(m_ptr + row, m)
    tl.store(s_ptr + row, tl.load(s_ptr + row) * old + tl.sum(s, 0))
    tl.store(t_ptr + row, tl.load(t_ptr + row) * old + tl.sum(t, 0))
    if SQUARES:
        tl.store(q_ptr + row, tl.load(q_ptr + row) * (old * old) + tl.sum(q, 0))
    if WEIGHTS:
        tl.store(old_ptr + row, old)
        w_ptr += row * w_stride
        for start in range(0, width, TILE):
            columns = start + tl.arange(0, TILE)
            z = _logits(a_ptr, columns, width, room, factor, cap, FLOOR, CAPPED)
            w = tl.where(columns == target, 0.0, _chain(tl.exp(z - m), z, cap, CAPPED))
            tl.store(w_ptr + columns, w.to(w_ptr.dtype.element_ty), mask=columns < room)


@triton.jit
def _gradient_kernel(
    a_ptr,
    a_stride,
    out_ptr,
    out_stride,
    targets_ptr,
    factor_ptr,
    cap_ptr,
    lse_ptr,
    rest_ptr,
    entropy_ptr,
    c_logprob_ptr,
    c_entropy_ptr,
    first,
    width,
    room,
    FLOOR: tl.constexpr,
    CAPPED: tl.constexpr,
    ENTROPY: tl.constexpr,
    TILE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    a_ptr += row * a_stride
    out_ptr += row * out_stride
    target = (tl.load(targets_ptr + row) - first).to(tl.int32)
    factor = tl.load(factor_ptr + row)
    cap = tl.load(cap_ptr + row) if CAPPED else 1.0
    lse = tl.load(lse_ptr + row)
    c = tl.load(c_logprob_ptr + row)
    at_target = c * tl.load(rest_ptr + row)
    if ENTROPY:
        c_entropy = tl.load(c_entropy_ptr + row)
        entropy = tl.load(entropy_ptr + row)
    for start in range(0, width, TILE):
        columns = start + tl.arange(0, TILE)
        z = _logits(a_ptr, columns, width, room, factor, cap, FLOOR, CAPPED)
        p = tl.exp(z - lse)
        g = tl.where(columns == target, at_target, -c * p)
        if ENTROPY:
            g -= c_entropy * p * (z - lse + entropy)
        g = _chain(g, z, cap, CAPPED)
        tl.store(out_ptr + columns, g.to(out_ptr.dtype.element_ty), mask=columns < room)


def accumulate(
    a: Tensor, ids: slice, targets: Tensor, transform: Transform, stats: Statistics, weights: Tensor | None = None
) -> Tensor | None:
    """See `torch_rows.accumulate`."""
    n = len(a)
    check_written(*stats)
    joins = None if weights is None else torch.ones(2, n, dtype=torch.float32, device=a.device)
    block, factor = block_rows(a), read_values(transform.factor)
    with written_rows(block if weights is None else weights) as target:
        if n:
            _accumulate_kernel[(n,)](
                block,
                block.stride(0),
                target,
                target.stride(0),
                read_values(targets),
                factor,
                factor if transform.cap is None else read_values(transform.cap),
                stats.m,
                stats.s,
                stats.t,
                stats.y,
                stats.m if stats.q is None else stats.q,
                stats.m if joins is None else joins[0],
                ids.start,
                ids.stop - ids.start,
                min(a.shape[1], target.shape[1]),
                FLOOR=FLOOR,
                CAPPED=transform.cap is not None,
                WEIGHTS=weights is not None,
                SQUARES=stats.q is not None,
                TILE=TILE,
                num_warps=WARPS,
            )
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
    """See `torch_rows.gradient`."""
    n = len(a)
    block, factor, c = block_rows(a), read_values(transform.factor), read_values(c_logprob)
    with written_rows(out) as target:
        if n:
            _gradient_kernel[(n,)](
                block,
                block.stride(0),
                target,
                target.stride(0),
                read_values(targets),
                factor,
                factor if transform.cap is None else read_values(transform.cap),
                read_values(softmax.lse),
                read_values(softmax.rest),
                read_values(softmax.entropy),
                c,
                c if c_entropy is None else read_values(c_entropy),
                ids.start,
                ids.stop - ids.start,
                min(a.shape[1], target.shape[1]),
                FLOOR=FLOOR,
                CAPPED=transform.cap is not None,
                ENTROPY=c_entropy is not None,
                TILE=TILE,
                num_warps=WARPS,
            )
