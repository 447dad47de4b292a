"""Find groups whose rewards are all equal, which have no advantage and no gradient, and replace them.

Shapes: B prompts, G generations, N = B·G completions, R rewards.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_grpo.rollout.types import Rollout


def flat_groups(totals: Tensor, num_generations: int) -> Tensor:
    """[B] bool: which groups of ``totals`` [N] have no spread. A total of NaN (no reward applied) is ignored."""
    groups = totals.view(-1, num_generations)
    low = groups.nan_to_num(nan=float("inf")).amin(1)
    high = groups.nan_to_num(nan=float("-inf")).amax(1)
    return ~(high > low)


def replace_groups(
    into: tuple[Rollout, Tensor], places: Sequence[int], source: tuple[Rollout, Tensor], taken: Sequence[int], G: int
) -> tuple[Rollout, Tensor]:
    """Replace the groups ``places`` of ``into`` by the groups ``taken`` of ``source``.

    ``into`` and ``source`` are each a rollout and its rewards [N, R].
    """
    if not places:
        return into
    (rollout, rewards), (other, other_rewards) = into, source
    N = len(rewards)
    order = torch.arange(N).view(-1, G)
    order[list(places)] = N + torch.arange(len(other_rewards)).view(-1, G)[list(taken)]
    return rollout.join(other).rows(order.flatten().tolist()), torch.cat([rewards, other_rewards])[order.flatten()]
