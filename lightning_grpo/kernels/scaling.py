"""Factors that keep gradients in the range of float16. They are powers of two, which cause no rounding."""

import torch
from torch import Tensor

# Bound of sums, well below 65,504, the largest number in float16.
LARGEST_SUM = 2.0**14


def power_above(x: Tensor) -> Tensor:
    """Return the power of two in (x, 2x] for each x > 0, and 1 for 0 and NaN."""
    mantissa, _ = torch.frexp(x)
    return torch.where(x > 0, x / mantissa, 1.0)


def in_range(coefficient: Tensor, hidden: Tensor, factor: Tensor) -> Tensor:
    """Return a multiple of the coefficient [N] for which the gradients of the head are in the range of float16.

    A coefficient is about 1 / tokens, and GradScaler's factor is only applied in the backward, so gradients that the
    forward computes would underflow. The coefficient is scaled to 1, or less if a sum over all tokens could overflow.
    In other precisions it is returned unchanged.

    Args:
        coefficient: [N] fp32, ∂loss/∂logprob.
        hidden: [N, H].
        factor: [N] fp32, of `Transform`.
    """
    if hidden.dtype != torch.float16 or not len(hidden):
        return coefficient
    size = (coefficient * factor).abs()
    summed = torch.where(size > 0, hidden.abs().amax(1) * size, 0.0).sum()
    return coefficient / power_above(torch.maximum(size.amax(), summed / LARGEST_SUM))
