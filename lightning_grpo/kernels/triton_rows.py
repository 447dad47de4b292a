"""The row arithmetic of `torch_rows` as Triton kernels for CUDA and ROCm, with one program per row.

Names and arguments are those of `torch_rows`. A row is read and written with its padding: if that extends rows to a
multiple of 64 columns, every access is 128 bits wide.
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
# How far a logit may exceed the reference of its row: weights up to exp(8) fit in float16.
SLACK = 8.0


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
    SLACK: tl.constexpr,
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
    if (target >= 0) & (target < width):
        tl.store(y_ptr + row, _logits(a_ptr, target, width, room, factor, cap, FLOOR, CAPPED))
    before = tl.load(m_ptr + row)
    m = before
    s = tl.zeros([TILE], tl.float32)
    t = tl.zeros([TILE], tl.float32)
    q = tl.zeros([TILE], tl.float32)
    # Weights in columns before `stale` are relative to an earlier reference.
    stale = 0
    for start in range(0, width, TILE):
        columns = start + tl.arange(0, TILE)
        z = _logits(a_ptr, columns, width, room, factor, cap, FLOOR, CAPPED)
        z = tl.where(columns == target, FLOOR, z)
        largest = tl.max(z, 0)
        raised = tl.where(largest > m + SLACK, largest, m)
        stale = tl.where(raised > m, start, stale)
        shrink = tl.exp(m - raised)
        e = tl.exp(z - raised)
        if WEIGHTS:
            _write_weights(w_ptr, row * w_stride, columns, room, e, z, cap, CAPPED)
        s = s * shrink + e
        t = t * shrink + e * z
        if SQUARES:
            q = q * (shrink * shrink) + e * e
        m = raised
    old = tl.exp(before - m)
    tl.store(m_ptr + row, m)
    tl.store(s_ptr + row, tl.load(s_ptr + row) * old + tl.sum(s, 0))
    tl.store(t_ptr + row, tl.load(t_ptr + row) * old + tl.sum(t, 0))
    if SQUARES:
        tl.store(q_ptr + row, tl.load(q_ptr + row) * (old * old) + tl.sum(q, 0))
    if WEIGHTS:
        tl.store(old_ptr + row, old)
        for start in range(0, stale, TILE):
            columns = start + tl.arange(0, TILE)
            z = _logits(a_ptr, columns, width, room, factor, cap, FLOOR, CAPPED)
            z = tl.where(columns == target, FLOOR, z)
            _write_weights(w_ptr, row * w_stride, columns, room, tl.exp(z - m), z, cap, CAPPED)


@triton.jit
def _write_weights(w_ptr, offset, columns, room, e, z, cap, CAPPED: tl.constexpr):
    w = _chain(e, z, cap, CAPPED)
    # In a row with NaN the statistics are NaN. Its weights are 0, so that a row may be left out by a scale of 0.
    w = tl.where(w == w, w, 0.0)
    tl.store(w_ptr + offset + columns, w.to(w_ptr.dtype.element_ty), mask=columns < room)


@triton.jit
def _join_kernel(
    g_ptr, g_stride, scales_ptr, targets_ptr, at_target_ptr, rows, blocks, block, room, TILE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    g_ptr += row * g_stride
    for k in range(0, blocks):
        scale = tl.load(scales_ptr + k * rows + row)
        # Rare, because the reference of a row rarely changes after the first block. NaN is neither.
        if (scale < 1) | (scale > 1):
            for start in range(k * block, tl.minimum((k + 1) * block, room), TILE):
                columns = start + tl.arange(0, TILE)
                inside = columns < tl.minimum((k + 1) * block, room)
                g = tl.load(g_ptr + columns, mask=inside, other=0.0).to(tl.float32) * scale
                tl.store(g_ptr + columns, g.to(g_ptr.dtype.element_ty), mask=inside)
    # Written last, since other threads may have rescaled the target's column.
    tl.debug_barrier()
    at_target = tl.load(at_target_ptr + row)
    at_target = tl.where(at_target == at_target, at_target, 0.0)
    tl.store(g_ptr + tl.load(targets_ptr + row), at_target.to(g_ptr.dtype.element_ty))


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
    idle = c == 0
    if ENTROPY:
        c_entropy = tl.load(c_entropy_ptr + row)
        entropy = tl.load(entropy_ptr + row)
        idle = idle & (c_entropy == 0)
    for start in range(0, width, TILE):
        columns = start + tl.arange(0, TILE)
        z = _logits(a_ptr, columns, width, room, factor, cap, FLOOR, CAPPED)
        p = tl.exp(z - lse)
        g = tl.where(columns == target, at_target, -c * p)
        if ENTROPY:
            g -= c_entropy * p * (z - lse + entropy)
        g = tl.where(idle, 0.0, _chain(g, z, cap, CAPPED))
        tl.store(out_ptr + columns, g.to(out_ptr.dtype.element_ty), mask=columns < room)


def accumulate(
    a: Tensor,
    ids: slice,
    targets: Tensor,
    transform: Transform,
    stats: Statistics,
    weights: Tensor | None = None,
    joins: Tensor | None = None,
) -> None:
    """See `torch_rows.accumulate`.

    The reference m of a row is not the largest logit so far, but at most `SLACK` less, and so rarely changes. Logits
    are then read once, although the weights that are written are relative to m.
    """
    n = len(a)
    check_written(*stats, joins)
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
                SLACK=SLACK,
                CAPPED=transform.cap is not None,
                WEIGHTS=weights is not None,
                SQUARES=stats.q is not None,
                TILE=TILE,
                num_warps=WARPS,
            )


def join(g: Tensor, width: int, scales: Tensor, targets: Tensor, at_target: Tensor) -> None:
    """See `torch_rows.join`; blocks with a scale of 1 are not read."""
    if len(g):
        _join_kernel[(len(g),)](
            g,
            g.stride(0),
            scales,
            read_values(targets),
            read_values(at_target),
            len(g),
            len(scales),
            width,
            g.shape[1],
            TILE=TILE,
            num_warps=WARPS,
        )


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
