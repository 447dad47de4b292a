"""Prints the table of docs/report.md: how often intervals of paired differences exclude zero."""

import numpy as np

from lightning_grpo.report.statistics import RESAMPLES, paired_interval

PAIRS = (4, 5, 6, 8, 10)
COMPARISONS = 1000


def percentile_excludes_zero(differences: np.ndarray, random: np.random.Generator) -> bool:
    """Whether the 95 % percentile interval of the mean excludes zero."""
    n = differences.size
    means = differences[random.integers(0, n, (RESAMPLES, n))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return low > 0 or high < 0


def main() -> None:
    """Print the table."""
    rows: dict[str, list[float]] = {"percentile bootstrap": [], "symmetric studentized bootstrap": [], "power": []}
    for pairs in PAIRS:
        random = np.random.default_rng(pairs)
        equal = random.standard_normal((COMPARISONS, pairs))
        intervals = [paired_interval(row) for row in equal]
        shifted = [paired_interval(row + 2) for row in equal]
        rows["percentile bootstrap"].append(np.mean([percentile_excludes_zero(row, random) for row in equal]))
        rows["symmetric studentized bootstrap"].append(np.mean([bool(i and i.excludes_zero) for i in intervals]))
        rows["power"].append(np.mean([bool(i and i.low > 0) for i in shifted]))
    rows["the same, true difference of two standard deviations"] = rows.pop("power")
    print("| pairs | " + " | ".join(map(str, PAIRS)) + " |\n|" + "---|" * (len(PAIRS) + 1))
    for name, shares in rows.items():
        print(f"| {name} | " + " | ".join(f"{100 * share:.0f} %" for share in shares) + " |")


if __name__ == "__main__":
    main()
