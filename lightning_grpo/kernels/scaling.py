"""Factors that keep gradients within float16: powers of two, which round nothing."""

import torch
from torch import Tensor

# Sums stay this far below float16's largest number, 65,504.
LARGEST_SUM = 2.0**14


def power_above(x: Tensor) -> Tensor:
    """For each x ≥ 0 the power of two in (x, 2x]; 1 for 0 and NaN."""
    mantissa, _ = torch.frexp(x)
    return torch.where(x > 0, x / mantissa, 1.0)


def in_range(coefficient: Tensor, hidden: Tensor, factor: Tensor) -> Tensor:
    """A multiple of the coefficient [N] for which the head's gradients fit float16; itself in other precisions.

    A coefficient is about 1 / tokens, and GradScaler's factor comes only with the backward: in float16 what is made
    before would be rounded to nothing. It is brought to 1, or less if a sum over all tokens could overflow.

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
