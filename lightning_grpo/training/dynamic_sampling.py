"""Groups whose rewards are all equal have no advantage and teach nothing: find them, and put others in their place.

Shapes: B prompts, G generations, N = B·G completions, R rewards.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_grpo.rollout.types import Rollout


def flat_groups(totals: Tensor, num_generations: int) -> Tensor:
    """[B] bool: which groups of ``totals`` [N] have no spread. A total of NaN (no reward applied) counts nowhere."""
    groups = totals.view(-1, num_generations)
    low = groups.nan_to_num(nan=float("inf")).amin(1)
    high = groups.nan_to_num(nan=float("-inf")).amax(1)
    return ~(high > low)


def replace_groups(
    into: tuple[Rollout, Tensor], places: Sequence[int], source: tuple[Rollout, Tensor], taken: Sequence[int], G: int
) -> tuple[Rollout, Tensor]:
    """Put the groups ``taken`` of ``source`` at ``places`` of ``into``; both are a rollout and its rewards [N, R]."""
    if not places:
        return into
    (rollout, rewards), (other, other_rewards) = into, source
    N = len(rewards)
    order = torch.arange(N).view(-1, G)
    order[list(places)] = N + torch.arange(len(other_rewards)).view(-1, G)[list(taken)]
    order = order.flatten()
    joined = {}
    for name, mine in vars(rollout).items():
        if mine is None:
            continue
        its = getattr(other, name)
        if mine.dim() == 2:
            width = max(mine.shape[1], its.shape[1])
            # prompts are padded on the left, completions on the right; what fills them is masked
            mine, its = (
                pad(x, (width - x.shape[1], 0) if name.startswith("prompt") else (0, width - x.shape[1]))
                for x in (mine, its)
            )
        joined[name] = torch.cat([mine, its])[order]
    return Rollout(**joined), torch.cat([rewards, other_rewards])[order]
