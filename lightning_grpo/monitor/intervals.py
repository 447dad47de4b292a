"""95 % intervals of held-out figures. Prompts are the independent samples; completions of one prompt are not."""

import math

from lightning_grpo.metrics import Spread

Z = 1.959964
"""Quantile of the normal distribution for 95 %."""


def interval(prompts: Spread, *, draws: int | None) -> tuple[float, float] | None:
    """The lower and upper limit of a mean over prompts; None if a single prompt does not tell.

    The interval of a share is Wilson's, which stays in [0, 1] and does not vanish if all prompts agree. Its number of
    samples is that for which a binomial distribution has the variance observed between prompts.

    Args:
        prompts: the spread of the prompts' means.
        draws: for a share, the number of independent draws per prompt, which bounds the number of samples. None: the
            figure is not a share, and its interval is that of the normal distribution.
    """
    n = float(prompts.count)
    mean, error = float(prompts.value) / n, float(prompts.compute()) / math.sqrt(n)
    if draws is None:
        return (mean - Z * error, mean + Z * error) if n > 1 else None
    variance = mean * (1 - mean)
    samples = min(variance / error**2, n * draws) if error > 0 else n
    center = (mean + Z**2 / (2 * samples)) / (1 + Z**2 / samples)
    half = Z / (1 + Z**2 / samples) * math.sqrt(variance / samples + Z**2 / (4 * samples**2))
    return max(0.0, center - half), min(1.0, center + half)
