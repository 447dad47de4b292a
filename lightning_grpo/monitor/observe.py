"""What a step's completions and rewards add to its metrics, and the memory in use."""

from collections.abc import Sequence

import psutil
import torch
from torch import Tensor

from lightning_grpo.metrics import Max, Min, Spread, Window
from lightning_grpo.objective import total_rewards
from lightning_grpo.objective.advantages import std


def memory_in_use(device: torch.device) -> float:
    """GiB: the most that this process has allocated on a GPU since the last call, or what it holds in main memory."""
    if device.type != "cuda":
        return psutil.Process().memory_info().rss / 2**30
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def observe_completions(window: Window, lengths: Tensor, truncated: Tensor) -> None:
    """TRL's ``completions/…`` of completions with ``lengths`` [n] tokens, ``truncated`` [n] where cut off."""
    lengths = lengths.double()
    window.mean("completions/mean_length", lengths)
    window.mean("completions/clipped_ratio", truncated)
    window.add({"completions/min_length": Min(lengths.min()), "completions/max_length": Max(lengths.max())})
    if len(ended := lengths[~truncated]):
        window.mean("completions/mean_terminated_length", ended)
        window.add({"completions/min_terminated_length": Min(ended.min())})
        window.add({"completions/max_terminated_length": Max(ended.max())})


def observe_rewards(window: Window, rewards: Tensor, names: Sequence[str], weights: Tensor) -> None:
    """TRL's ``reward``, ``reward_std`` and ``rewards/…`` of ``rewards`` [n, R], R ``names`` and ``weights`` [R]."""
    totals = total_rewards(rewards, weights)
    window.mean("reward", totals)
    window.add({"reward_std": Spread.of(totals)})
    for name, column in zip(names, rewards.T, strict=True):
        window.mean(f"rewards/{name}/mean", column)
        window.add({f"rewards/{name}/std": Spread.of(column)})


def observe_groups(window: Window, totals: Tensor, num_generations: int) -> None:
    """``group_reward_std``, the mean spread within a group of ``totals`` [B·G], and TRL's ``frac_reward_zero_std``."""
    spread = std(totals.double().view(-1, num_generations), 1)
    window.mean("group_reward_std", spread)
    window.mean("frac_reward_zero_std", spread < 1e-8)
