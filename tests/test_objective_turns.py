"""Advantages of turns, by hand."""

import pytest
import torch

from lightning_grpo.errors import UserError
from lightning_grpo.objective import AdvantageConfig, turn_advantages

NAN = float("nan")
# two completions of two turns, one of one turn, and one to which no reward applies
MASK = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 1, 0], [1, 1, 1, 0, 0], [1, 0, 1, 0, 0]]).bool()
TURN_REWARDS = torch.tensor([[0.0, 1, 0, 0, 4], [2, 0, 0, 0, 0], [0, 0, 3, 0, 0], [5, 0, 5, 0, 0]])
REWARDS = torch.tensor([[5.0], [2.0], [3.0], [NAN]])


def advantages(weight=1.0, **options):
    return turn_advantages(
        AdvantageConfig(turn_credit="return_to_go", **options),
        REWARDS,
        num_generations=4,
        turn_rewards=TURN_REWARDS,
        turn_weight=weight,
        mask=MASK,
        weights=torch.tensor([weight]),
    )


def test_a_turn_gets_what_came_after_its_beginning():
    # first turns: 5, 2, 3, mean 10/3; second turns: 5 − 1 = 4 and 2 − 2 = 0, mean 2
    first, second = [5 / 3, -4 / 3, -1 / 3], [2.0, -2.0]
    expected = torch.tensor(
        [
            [first[0], first[0], 0, second[0], second[0]],
            [first[1], 0, 0, second[1], 0],
            [first[2], first[2], first[2], 0, 0],
            [0, 0, 0, 0, 0],
        ]
    )
    torch.testing.assert_close(advantages(), expected)
    torch.testing.assert_close(advantages(0.5), expected / 2)
    leave_one_out = advantages(estimator="leave_one_out")
    torch.testing.assert_close(leave_one_out[:, :2], expected[:, :2] * 3 / 2)
    torch.testing.assert_close(leave_one_out[:2, 3:], expected[:2, 3:] * 2)


def test_single_turns_have_the_advantages_of_episodes():
    mask = torch.tensor([[1, 1], [1, 0], [1, 1], [1, 1]]).bool()
    rewards = torch.tensor([[1.0], [0.0], [0.0], [3.0]])
    for options in ({}, {"scale_rewards": "group"}, {"estimator": "leave_one_out"}, {"estimator": "max_rl"}):
        config = AdvantageConfig(turn_credit="return_to_go", **options)
        turn_rewards = torch.zeros(4, 2).scatter(1, mask.sum(1, keepdim=True) - 1, rewards)
        found = turn_advantages(
            config, rewards, num_generations=2, turn_rewards=turn_rewards, turn_weight=1.0, mask=mask,
            weights=torch.ones(1),
        )  # fmt: skip
        expected = config(rewards, 2)
        assert expected.any()
        assert torch.equal(found, expected[:, None] * mask)


@pytest.mark.parametrize("options", [{"scale_rewards": "batch"}, {"estimator": "reinforce_pp"}])
def test_statistics_of_the_batch_are_refused(options):
    with pytest.raises(UserError, match="turn_credit is 'return_to_go', which compares turns within a group"):
        AdvantageConfig(turn_credit="return_to_go", **options)
