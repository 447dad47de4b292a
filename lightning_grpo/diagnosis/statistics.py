"""Robust statistics of short series [n]. A few outliers don't change them much."""

import numpy as np
from numpy.typing import ArrayLike


def noise(values: ArrayLike) -> float:
    """Return the standard deviation of the noise around a trend, from differences of neighbors. 0 below three values.

    The median of |difference| is 0.954 σ for normal noise.
    """
    x = np.asarray(values, float)
    if len(x) < 3:
        return 0.0
    differences = np.abs(np.diff(x))
    # of metrics that often repeat a value, more than half of the differences may be 0
    return float(np.median(differences) / 0.954) or float(np.sqrt((differences**2).mean() / 2))


def shift(before: ArrayLike, after: ArrayLike) -> float:
    """Return the difference of two medians in standard errors, positive if ``after`` is larger."""
    a, b = np.asarray(before, float), np.asarray(after, float)
    difference = float(np.median(b) - np.median(a))
    # the variance of a median of n normal values is π/2 times that of their mean
    error = np.sqrt(np.pi / 2 * (noise(a) ** 2 / len(a) + noise(b) ** 2 / len(b)))
    if error == 0:
        return float(np.sign(difference)) * np.inf if difference else 0.0
    return float(difference / error)


def trend(values: ArrayLike) -> float:
    """Return Mann and Kendall's z of a monotonic trend: above 2.6, a rise that noise causes in one of 200 cases."""
    x = np.asarray(values, float)
    n = len(x)
    if n < 4:
        return 0.0
    s = float(np.sign(x[None, :] - x[:, None])[np.triu_indices(n, 1)].sum())
    ties = np.unique(x, return_counts=True)[1].astype(float)
    variance = (n * (n - 1) * (2 * n + 5) - (ties * (ties - 1) * (2 * ties + 5)).sum()) / 18
    return float((s - np.sign(s)) / np.sqrt(variance)) if variance > 0 else 0.0
