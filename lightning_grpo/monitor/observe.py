"""The metrics of completions, rewards, groups and memory.

Shapes: n completions, B groups of G, R rewards.
"""

import os
from collections.abc import MutableMapping, Sequence
from functools import cache
from math import comb

import psutil
import torch
from torch import Tensor

from lightning_grpo.metrics import Correlation, Max, Min, Percentile, Spread, Window
from lightning_grpo.objective import total_rewards
from lightning_grpo.objective.advantages import std

_SPREAD = "contribution_std/"
"""Prefix of standard deviations that are not logged."""


def memory_in_use(device: torch.device) -> float:
    """Return the peak of GPU memory allocated since the last call, or this process's resident memory, in GiB."""
    if device.type != "cuda":
        return _process(os.getpid()).memory_info().rss / 2**30
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return peak


_process = cache(psutil.Process)  # takes longer than reading from it


def observe_completions(window: Window, lengths: Tensor, truncated: Tensor) -> None:
    """Add TRL's ``completions/…`` metrics of completions with ``lengths`` [n] in tokens, ``truncated`` [n] or not, and
    percentiles of the lengths."""
    lengths = lengths.double()
    window.mean("completions/mean_length", lengths)
    window.mean("completions/clipped_ratio", truncated)
    window.add({"completions/min_length": Min(lengths.min()), "completions/max_length": Max(lengths.max())})
    for percent in (10, 50, 90, 99):
        window.add(
            {f"completions/p{percent}_length": Percentile(lengths, torch.tensor(percent / 100, dtype=torch.float64))}
        )
    if len(terminated := lengths[~truncated]):
        window.mean("completions/mean_terminated_length", terminated)
        window.add({"completions/min_terminated_length": Min(terminated.min())})
        window.add({"completions/max_terminated_length": Max(terminated.max())})


def observe_rewards(window: Window, rewards: Tensor, contributions: Tensor, names: Sequence[str]) -> None:
    """Add TRL's ``reward``, ``reward_std`` and ``rewards/…``, and for several rewards what each contributes to the sum.

    Args:
        rewards: [n, R].
        contributions: [n, R], weighted rewards; those of completions for which they do not count are 0.
        names: of the R rewards.
    """
    totals = total_rewards(contributions)
    window.mean("reward", totals)
    window.add({"reward_std": Spread.of(totals)})
    for name, column in zip(names, rewards.T, strict=True):
        window.mean(f"rewards/{name}/mean", column)
        window.add({f"rewards/{name}/std": Spread.of(column)})
    if len(names) > 1:
        for name, column in zip(names, contributions.T, strict=True):
            window.mean(f"rewards/{name}/contribution", column)
            window.add({f"{_SPREAD}{name}": Spread.of(column)})


def variance_shares(values: MutableMapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """``rewards/NAME/variance_share``: the share of each contribution in the sum of their variances. Empty for a single
    reward, or if none varies. The standard deviations that `observe_rewards` added are removed from ``values``."""
    variances = {name: values.pop(f"{_SPREAD}{name}", 0.0) ** 2 for name in names}
    if not (total := sum(variances.values())) > 0:
        return {}
    return {f"rewards/{name}/variance_share": variance / total for name, variance in variances.items()}


def observe_repetition(window: Window, ids: Tensor, mask: Tensor, length: int = 4) -> None:
    """Add ``completions/repetition``: the share of a completion's n-grams of ``length`` tokens that occurred earlier in
    it, as a mean over the completions that have at least one.

    Args:
        ids: [n, T], tokens of the completions.
        mask: [n, T] bool, tokens that the policy sampled.
    """
    if ids.shape[1] < length:
        return
    valid = mask.unfold(1, length, 1).all(2)
    # a hash of 64 bits in place of each n-gram: products overflow, which mixes all bits
    grams = ids.unfold(1, length, 1) @ (0x5851F42D4C957F2D ** torch.arange(length))
    padding = torch.iinfo(grams.dtype).max
    ordered = grams.masked_fill(~valid, padding).sort(1).values
    differs = torch.ones_like(valid)
    differs[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    distinct = (differs & (ordered != padding)).sum(1)
    window.mean("completions/repetition", 1 - distinct.double() / valid.sum(1))


def observe_groups(window: Window, totals: Tensor, right: Tensor) -> None:
    """Add ``group_reward_std``, the mean standard deviation within groups of ``totals`` [B, G], TRL's
    ``frac_reward_zero_std``, and the shares of groups in which all, none or some of the completions are ``right``.
    """
    spread = std(totals.double(), 1)
    window.mean("group_reward_std", spread)
    window.mean("frac_reward_zero_std", spread < 1e-8)
    window.mean("groups/all_right", right.all(1))
    window.mean("groups/all_wrong", ~right.any(1))
    window.mean("groups/mixed", mixed(right))


def mixed(right: Tensor) -> Tensor:
    """[B] bool: which groups have both right and wrong completions, from ``right`` [B, G]."""
    return right.any(1) & ~right.all(1)


def observe_sources(window: Window, sources: Sequence[str], totals: Tensor, lengths: Tensor, right: Tensor) -> None:
    """Add ``sources/NAME/…`` of B groups.

    Args:
        sources: for each group the name of its prompt's source; groups without a name are left out.
        totals: [B, G], rewards.
        lengths: [B, G], tokens per completion.
        right: [B, G] bool.
    """
    for name in filter(None, dict.fromkeys(sources)):
        of_source = torch.tensor([source == name for source in sources])
        window.mean(f"sources/{name}/reward", totals[of_source])
        window.mean(f"sources/{name}/mean_length", lengths[of_source])
        window.mean(f"sources/{name}/mixed", mixed(right[of_source]))


def reward_length_correlation(totals: Tensor, lengths: Tensor) -> Correlation:
    """The correlation of rewards ``totals`` [B, G] (NaN: none) with ``lengths`` [B, G] within groups, after subtracting
    the means of each group."""
    scored = ~totals.isnan()
    x, y = (
        (v - v.where(scored, torch.nan).nanmean(1, keepdim=True)).where(scored, 0.0)
        for v in (totals.double(), lengths.double())
    )
    # groups without spread leave rounding errors
    x = x.where(x.abs() > 1e-9, 0.0)
    return Correlation((x * y).sum(), x.square().sum(), y.square().sum())


def pass_at(right: Tensor, k: int) -> Tensor:
    """[B]: the probability that at least one of k completions, drawn from the G of a group without replacement, is
    right. This is the unbiased estimate of pass@k of Chen et al. 2021 (arXiv:2107.03374).

    Args:
        right: [B, G] bool.
        k: from 1 to G.
    """
    G = right.shape[1]
    by_count = [1 - comb(G - count, k) / comb(G, k) for count in range(G + 1)]
    return torch.tensor(by_count, dtype=torch.float64)[right.sum(1)]


def powers_of_two(limit: int) -> list[int]:
    """1, 2, 4, … up to ``limit``."""
    return [2**i for i in range(limit.bit_length())]
