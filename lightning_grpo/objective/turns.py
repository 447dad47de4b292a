"""Advantages of turns: each turn is credited with the rewards that it can still influence.

Shapes: G generations, N completions (prompt-major), R rewards, T completion length.
"""

import torch
from torch import Tensor, nn

from lightning_grpo.objective.advantages import AdvantageConfig


def turn_advantages(
    config: AdvantageConfig,
    rewards: Tensor,
    *,
    num_generations: int,
    turn_rewards: Tensor,
    turn_weight: float,
    mask: Tensor,
    weights: Tensor,
    lengths: Tensor | None = None,
) -> Tensor:
    """Return advantages [N, T] in which a turn's reward is its return-to-go (turn-level credit, arXiv:2505.11821).

    The return-to-go is the completion's total reward without what the environment gave for earlier turns. The k-th
    turns of a group are compared with each other; a turn that no other completion has gets the advantage 0.

    Args:
        config: the estimator.
        rewards: [N, R].
        num_generations: G.
        turn_rewards: [N, T], the environment's reward of each turn at the turn's last token.
        turn_weight: the weight with which the total reward contains the sum of ``turn_rewards``.
        mask: [N, T] bool, tokens that the policy sampled. Other tokens separate the turns.
        weights: [R], the weight of each reward.
        lengths: [N], tokens of each completion.
    """
    turns = (mask & ~nn.functional.pad(mask, (1, 0))[:, :-1]).cumsum(1).masked_fill(~mask, 0)
    earned = turn_weight * (turn_rewards.double().cumsum(1) - turn_rewards)
    weights = nn.functional.pad(weights, (0, 1), value=1.0)
    advantages = torch.zeros_like(turn_rewards)
    for turn in range(1, int(turns.max()) + 1):
        # what was earned before the turn is the same at all of its tokens; it is one more reward, to be subtracted
        earlier = earned.masked_fill(turns != turn, -torch.inf).amax(1, keepdim=True)
        is_left_out = earlier.isinf() | rewards.isnan().all(1, keepdim=True)
        returns = torch.cat([rewards, -earlier], 1).masked_fill(is_left_out, torch.nan)
        A = config(returns, num_generations, weights=weights, lengths=lengths)
        advantages = torch.where(turns == turn, A[:, None].to(advantages), advantages)
    return advantages
