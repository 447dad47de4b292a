"""The metrics of completions, rewards and memory."""

from collections.abc import Sequence

import psutil
import torch
from torch import Tensor

from lightning_grpo.metrics import Max, Min, Spread, Window
from lightning_grpo.objective import total_rewards
from lightning_grpo.objective.advantages import std


def memory_in_use(device: torch.device) -> float:
    """Return the peak of GPU memory allocated since the last call, or this process's resident memory, in GiB."""
    if device.type != "cuda":
        return psutil.Process().memory_info().rss / 2**30
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def observe_completions(window: Window, lengths: Tensor, truncated: Tensor) -> None:
    """Add TRL's ``completions/…`` metrics of completions with ``lengths`` [n] in tokens, ``truncated`` [n] or not."""
    lengths = lengths.double()
    window.mean("completions/mean_length", lengths)
    window.mean("completions/clipped_ratio", truncated)
    window.add({"completions/min_length": Min(lengths.min()), "completions/max_length": Max(lengths.max())})
    if len(terminated := lengths[~truncated]):
        window.mean("completions/mean_terminated_length", terminated)
        window.add({"completions/min_terminated_length": Min(terminated.min())})
        window.add({"completions/max_terminated_length": Max(terminated.max())})


def observe_rewards(window: Window, rewards: Tensor, names: Sequence[str], weights: Tensor) -> None:
    """Add TRL's ``reward``, ``reward_std`` and ``rewards/…`` of ``rewards`` [n, R] with R ``names`` and ``weights``."""
    totals = total_rewards(rewards, weights)
    window.mean("reward", totals)
    window.add({"reward_std": Spread.of(totals)})
    for name, column in zip(names, rewards.T, strict=True):
        window.mean(f"rewards/{name}/mean", column)
        window.add({f"rewards/{name}/std": Spread.of(column)})


def observe_groups(window: Window, totals: Tensor, num_generations: int) -> None:
    """Add ``group_reward_std``, the mean standard deviation within groups of ``totals`` [B·G], and TRL's
    ``frac_reward_zero_std``.
    """
    spread = std(totals.double().view(-1, num_generations), 1)
    window.mean("group_reward_std", spread)
    window.mean("frac_reward_zero_std", spread < 1e-8)
