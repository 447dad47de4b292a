"""Cutting a rollout into micro-batches, taking rows of it, putting groups into it."""

from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise

import pytest
import torch
from fitting import done, experience
from hypothesis import given
from hypothesis import strategies as st

from lightning_grpo.rollout import Rollout
from lightning_grpo.rollout.types import COMPLETION_TOKENS, PROMPT_TOKENS, extents
from lightning_grpo.training.collector import flat_groups, replace_groups
from lightning_grpo.training.experience import Experience, cut_windows, redistribute
from lightning_grpo.training.work import Lengths, even_parts


@given(
    st.integers(1, 3).flatmap(
        lambda windows: st.integers(1, 3).flatmap(
            lambda accumulate: st.tuples(
                st.just(windows),
                st.just(accumulate),
                st.lists(st.sampled_from([0.0, 0.0, 1.0, -1.0]), min_size=windows * accumulate * 4,
                         max_size=windows * accumulate * 4),
                st.lists(st.integers(0, 5), min_size=windows * accumulate * 4, max_size=windows * accumulate * 4),
            )
        )
    ),
    st.booleans(),
)  # fmt: skip
def test_every_row_that_matters_is_in_one_micro_batch_of_its_window(sizes, skip):
    windows, accumulate, advantages, lengths = sizes
    ready = experience(lengths, advantages, G=2)
    batches = cut_windows(ready, windows=windows, accumulate=accumulate, micro_batch_size=4, skip_zero_advantage=skip)
    assert len(batches) == windows * accumulate
    for window in range(windows):
        mine = range(window * accumulate * 4, (window + 1) * accumulate * 4)
        dealt = [row for batch in batches[window * accumulate : (window + 1) * accumulate] for row in batch]
        wanted = {row for row in mine if not skip or advantages[row] != 0}
        # a row without an advantage may fill several micro-batches
        assert sorted(row for row in dealt if row in wanted) == sorted(wanted) and set(dealt) <= set(mine)
        # what else is there only fills micro-batches that would be empty
        assert all(advantages[row] == 0 for row in set(dealt) - wanted)
        assert len(set(dealt) - wanted) <= max(0, accumulate - len(wanted))
    assert all(batches)


@given(st.lists(st.integers(0, 30), min_size=24, max_size=24), st.sampled_from([2, 3, 4, 6, 12]), st.booleans())
def test_micro_batches_have_even_numbers_of_tokens(lengths, accumulate, share_prompt):
    ready = experience(lengths, [1.0] * 24, G=6)
    options = {
        "windows": 1,
        "accumulate": accumulate,
        "micro_batch_size": 24 // accumulate,
        "share_prompt": share_prompt,
    }
    batches = cut_windows(ready, **options, skip_zero_advantage=False)
    tokens = Lengths.of(ready, share_prompt=share_prompt).tokens
    queue = [row for batch in batches for row in batch]
    size = 24 // accumulate
    equal_counts = [queue[i : i + size] for i in range(0, 24, size)]
    assert max(map(tokens, batches)) <= max(map(tokens, equal_counts))


def test_long_completions_are_fewer_per_micro_batch():
    """Groups stay together as long as they fit."""
    ready = experience([20, 20, 1, 1, 1, 1, 1, 1], [1.0] * 8, G=2)
    batches = cut_windows(ready, windows=1, accumulate=2, micro_batch_size=4, skip_zero_advantage=False)
    assert batches == [[0, 1], [6, 7, 4, 5, 2, 3]]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 9))
def test_the_largest_of_even_parts_is_as_small_as_possible(costs, parts):
    found = even_parts(costs, parts, sum)
    assert [cost for part in found for cost in part] == costs and len(found) == min(parts, len(costs)) and all(found)
    cuts = combinations(range(1, len(costs)), len(found) - 1)
    best = min(max(sum(costs[start:end]) for start, end in pairwise((0, *places, len(costs)))) for places in cuts)
    assert max(map(sum, found)) == best


def test_a_rollout_that_does_not_fill_the_windows_is_refused():
    with pytest.raises(ValueError, match="4 completions don't fill 1 optimizer steps of 2 micro-batches of 4"):
        cut_windows(
            experience([1] * 4, [1.0] * 4, 2), windows=1, accumulate=2, micro_batch_size=4, skip_zero_advantage=False
        )


def test_rows_drop_what_is_padding_in_all_of_them():
    ready = experience([1, 2, 5, 3], [0.1, 0.2, 0.3, 0.4], G=2)
    ready.old_logprobs = torch.arange(20.0).view(4, 5)
    cut = ready.rows([1, 0])
    assert cut.prompt_ids.tolist() == [[10], [10]]
    assert cut.completion_mask.tolist() == [[True, True], [True, False]]
    assert cut.advantages.tolist() == pytest.approx([0.2, 0.1])
    assert cut.old_logprobs.tolist() == [[5, 6], [0, 1]]
    assert cut.ref_logprobs is None and cut.number == 0


def test_rows_keep_tokens_behind_others_that_the_policy_did_not_write():
    ready = experience([4, 2], [0.1, 0.2], G=2)
    ready.completion_mask = torch.tensor([[True, False, False, True], [False, True, False, False]])
    ready.prompt_mask, ready.prompt_ids = torch.tensor([[True, False], [False, True]]), torch.tensor([[1, 2], [3, 4]])
    cut = ready.rows([0])
    assert cut.completion_mask.tolist() == [[True, False, False, True]] and cut.completion_ids.shape == (1, 4)
    assert cut.prompt_ids.tolist() == [[1, 2]]
    cut = ready.rows([1])
    assert cut.completion_mask.tolist() == [[False, True]] and cut.rollout_logprobs.shape == (1, 2)
    assert cut.prompt_ids.tolist() == [[4]]
    assert extents(ready.completion_mask).tolist() == [4, 2]
    assert extents(torch.zeros(2, 3, dtype=torch.bool)).tolist() == [0, 0]


@dataclass(kw_only=True)
class Distilled(Experience):
    """A user's columns: a value per completion token, several per token, and several per prompt token."""

    teacher_logprobs: torch.Tensor = field(metadata=COMPLETION_TOKENS)
    teacher_top: torch.Tensor = field(metadata=COMPLETION_TOKENS)
    prompt_weights: torch.Tensor = field(metadata=PROMPT_TOKENS)


def distilled(lengths):
    """Values that say to which token they belong: the row times 10 plus the position counted from the padded side's
    opposite end."""
    plain = experience(lengths, [0.1 * i for i in range(len(lengths))], G=2)
    (N, T), P = plain.completion_ids.shape, plain.prompt_ids.shape[1]
    token = torch.arange(N)[:, None] * 10.0 + torch.arange(T)
    # as many rewards as tokens: shapes alone would not tell them apart
    return Distilled(
        **vars(plain) | {"rewards": token.clone()},
        teacher_logprobs=token,
        teacher_top=torch.stack([token, -token], dim=2),
        prompt_weights=torch.arange(N)[:, None] * 10.0 + torch.arange(P).flip(0),
    )


def test_columns_of_a_subclass_are_cut():
    cut = distilled([1, 3]).rows([0])
    assert isinstance(cut, Distilled)
    assert cut.teacher_logprobs.tolist() == [[0.0]] and cut.rewards.shape == (1, 3)
    assert cut.teacher_top.tolist() == [[[0.0, 0.0]]]
    cut = distilled([1, 3, 2, 2]).rows([1, 0])
    assert cut.teacher_logprobs.tolist() == [[10, 11, 12], [0, 1, 2]] and cut.prompt_weights.tolist() == [[10], [0]]


def test_columns_of_a_subclass_are_joined():
    short, long = distilled([1, 1]), distilled([2, 3, 1, 1])
    short.rewards, long.rewards = short.rewards[:, :1], long.rewards[:, :1]
    both = short.join(long)
    assert isinstance(both, Distilled) and len(both) == 6
    assert both.teacher_logprobs[:3].tolist() == [[0, 0, 0], [10, 0, 0], [0, 1, 2]]
    assert both.teacher_top.shape == (6, 3, 2) and both.teacher_top[2, 2].tolist() == [2, -2]
    assert both.prompt_weights[:3].tolist() == [[0, 0], [0, 10], [1, 0]]
    # joining and cutting are inverse
    again = both.rows(range(2))
    assert all(torch.equal(x, getattr(again, name)) for name, x in vars(short).items() if torch.is_tensor(x))


def test_columns_of_a_subclass_are_replaced_and_redistributed():
    ready, other = distilled([2, 3, 1, 1]), distilled([1, 1, 4, 2])
    ready.rewards, other.rewards = ready.rewards[:, :1], other.rewards[:, :1]
    mixed, _ = replace_groups((ready, ready.rewards), [0], (other, other.rewards), [1], 2)
    assert mixed.teacher_logprobs.tolist() == [[20, 21, 22, 23], [30, 31, 32, 33], [20, 21, 22, 0], [30, 31, 32, 0]]
    first, second = redistribute([ready], 2, 2)
    assert second.teacher_logprobs.tolist() == [[20], [30]] and first.prompt_weights.tolist() == [[0], [10]]
    assert torch.equal(redistribute([first, second], 1, 2)[0].teacher_logprobs[:2], ready.teacher_logprobs[:2])


def test_sources_are_cut_joined_and_redistributed():
    one, other = experience([1, 2, 3, 1], [0.1] * 4, G=2), experience([2, 2], [0.1] * 2, G=2)
    one.sources, other.sources = ["a", "a", "b", "b"], ["c", "c"]
    assert one.rows([3, 0]).sources == ["b", "a"]
    mixed, _ = replace_groups((one, one.rewards), [0], (other, other.rewards), [0], 2)
    assert mixed.sources == ["c", "c", "b", "b"]
    assert [share.sources for share in redistribute([mixed], 2, 2)] == [["c", "c"], ["b", "b"]]
    one.sources = other.sources = None
    assert one.join(other).sources is None


def test_flat_groups_look_at_scored_completions_alone():
    nan = float("nan")
    totals = torch.tensor([1.0, 1.0, 0.0, 1.0, nan, 1.0, nan, nan])
    assert flat_groups(totals, 2).tolist() == [True, False, True, True]


def test_groups_are_replaced_with_their_padding():
    ready = Rollout.collate(
        [[1], [2, 2]], [[done(3), done(3)], [done(4), done(4, 4)]], pad_id=0
    ), torch.tensor([[1.0], [1.0], [0.0], [1.0]])  # fmt: skip
    other = Rollout.collate(
        [[6, 6, 6], [7]], [[done(8), done(8)], [done(9, 9, 9), done(9)]], pad_id=0
    ), torch.tensor([[2.0], [2.0], [3.0], [4.0]])  # fmt: skip
    rollout, rewards = replace_groups(ready, [0], other, [1], 2)
    assert rewards.flatten().tolist() == [3, 4, 0, 1]
    assert rollout.completion_ids.tolist() == [[9, 9, 9], [9, 0, 0], [4, 0, 0], [4, 4, 0]]
    assert rollout.completion_mask.sum(1).tolist() == [3, 1, 1, 2]
    assert [ids[mask].tolist() for ids, mask in zip(rollout.prompt_ids, rollout.prompt_mask, strict=True)] == [
        [7], [7], [2, 2], [2, 2],
    ]  # fmt: skip
    assert replace_groups(ready, [], other, [], 2) is ready


@pytest.mark.parametrize(
    ("short", "message"),
    [({"logprobs": [0.0]}, "1 log-probs for a completion of 2 tokens"), ({"versions": [0]}, "1 versions for")],
)
def test_an_engine_that_gives_too_few_values_is_refused(short, message):
    with pytest.raises(ValueError, match=message):
        Rollout.collate([[1]], [[replace(done(1, 2), **short)]], pad_id=0)


def test_every_token_keeps_the_version_that_sampled_it():
    mixed = replace(done(4, 5, 6), versions=[3, 3, 4])
    rollout = Rollout.collate([[1], [2]], [[mixed], [replace(done(7), versions=[4])]], pad_id=0)
    assert rollout.versions.tolist() == [[3, 3, 4], [4, 0, 0]]
    assert rollout.rows([1]).versions.tolist() == [[4]]
