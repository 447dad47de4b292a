"""Advantages: each estimator by hand, properties for any rewards, and what is refused."""

from itertools import combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_grpo.objective import AdvantageConfig, group_advantages

NAN = float("nan")
ESTIMATORS = {
    "group": {},
    "leave_one_out": {},
    "reinforce_pp": {},
    "reinforce_pp_baseline": {},
    "max_rl": {},
    "pass_at_k": {"k": 2},
    "opo": {},
    "gpg": {},
    "lite_ppo": {},
}


def advantages(rewards: list, G: int, **options) -> torch.Tensor:
    return group_advantages(torch.tensor(rewards, dtype=torch.float64), G, **options)


def assert_close(actual: torch.Tensor, expected, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=1e-9, atol=atol)


# ---- by hand ----

R = torch.tensor([1.0, 0.0, 0.0, 3.0, 2.0, 2.0, 2.0, 2.0], dtype=torch.float64)
GROUP = torch.tensor([0.0, -1.0, -1.0, 2.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, GROUP),
        ({"scale_rewards": "group"}, GROUP / (2**0.5 + 1e-4)),
        ({"scale_rewards": "batch"}, GROUP / (R.std() + 1e-4)),
        ({"estimator": "lite_ppo"}, GROUP / (R.std() + 1e-4)),
        ({"estimator": "leave_one_out"}, GROUP * 4 / 3),
        ({"estimator": "reinforce_pp"}, (R - R.mean()) / (R.std() + 1e-4)),
        ({"estimator": "reinforce_pp_baseline"}, GROUP / (GROUP.std() + 1e-4)),
        ({"estimator": "max_rl"}, GROUP),
        ({"estimator": "gpg"}, GROUP * 8 / 4),
    ],
)
def test_estimators_by_hand(options, expected):
    assert_close(group_advantages(R, 4, **options), expected)


def test_leave_one_out_subtracts_the_mean_of_the_others():
    got = advantages([1.0, 5.0, 0.0, NAN], 4, estimator="leave_one_out")
    assert_close(got, [1 - 2.5, 5 - 0.5, 0 - 3.0, 0.0])


def test_max_rl_divides_by_the_mean_and_leaves_hopeless_groups_alone():
    got = advantages([1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], 4, estimator="max_rl")
    assert_close(got, [3.0, -1.0, -1.0, -1.0, 0.0, 0.0, 0.0, 0.0])


def test_opo_weighs_its_baseline_by_length():
    got = advantages([1.0, 0.0, NAN], 3, estimator="opo", lengths=torch.tensor([30, 10, 500]))
    assert_close(got, [0.25, -0.75, 0.0])


def test_optimal_token_baseline_is_the_weighted_mean_of_the_others_at_each_token():
    """Against the definition in loops, with completions without a reward, and with tool output between the tokens."""
    g = torch.Generator().manual_seed(0)
    G, T = 4, 7
    r, norms = torch.randn(2 * G, generator=g).double(), torch.rand(2 * G, T, generator=g).double()
    r[1], r[5:7] = NAN, NAN
    for row, length in enumerate([2, 7, 4, 6, 3, 3, 5, 7]):
        norms[row, length:] = NAN
    norms[3, 1:3], norms[7, 2] = NAN, NAN  # such as the output of a tool
    expected = torch.zeros(2 * G, T).double()
    tokens = [[(t, float(w)) for t, w in enumerate(row) if w == w] for row in norms]
    for i, t in product(range(2 * G), range(T)):
        others = [j for j in range(i // G * G, i // G * G + G) if j != i and r[j] == r[j]]
        if r[i] != r[i] or t >= len(tokens[i]) or not others:
            continue
        weights = [sum(w for _, w in tokens[j][: t + 1]) if t < len(tokens[j]) else 0.0 for j in others]
        weights = weights if any(weights) else [1.0] * len(others)
        baseline = sum(w * r[j] for w, j in zip(weights, others, strict=True)) / sum(weights)
        expected[i, tokens[i][t][0]] = r[i] - baseline
    got = group_advantages(r, G, estimator="optimal_token_baseline", grad_norms=norms)
    assert_close(got, expected, atol=1e-6)


class TinyPolicy:
    """Three logits for each prefix of up to two tokens; token 0 ends a completion, as does the third token."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(0)
        prefixes = [(), (1,), (2,), (1, 1), (1, 2), (2, 1), (2, 2)]
        p = torch.randn(len(prefixes), 3, generator=g).double().mul(1.5).softmax(1)
        texts = [
            c for n in (1, 2, 3) for c in product(range(3), repeat=n) if 0 not in c[:-1] and (n == 3 or c[-1] == 0)
        ]
        self.probability = torch.ones(len(texts)).double()
        self.scores = torch.zeros(len(texts), 3, *p.shape).double()
        for i, text in enumerate(texts):
            for t, token in enumerate(text):
                state = prefixes.index(text[:t])
                self.scores[i, t, state] = torch.eye(3)[token] - p[state]
                self.probability[i] *= p[state, token]
        norms = self.scores.square().sum((2, 3))
        self.norms = norms.where(torch.arange(3) < torch.tensor([[len(text)] for text in texts]), torch.nan)
        self.rewards = 2 + torch.randn(len(texts), generator=g).double()

    def gradients(self, groups: torch.Tensor, estimator: str | None) -> torch.Tensor:
        """[B, states, 3] from groups [B, G] of completions; without an estimator the advantage is the reward."""
        rewards, norms = self.rewards[groups].flatten(), self.norms[groups].flatten(0, 1)
        A = rewards
        if estimator:
            A = group_advantages(rewards, groups.shape[1], estimator=estimator, grad_norms=norms)
        return torch.einsum("bgt,bgtsv->bsv", A.view(*groups.shape, -1).expand(*groups.shape, 3), self.scores[groups])


def test_optimal_token_baseline_leaves_the_gradient_unbiased():
    """Its mean over all groups of three that the policy may sample is that without a baseline, and it varies less."""
    policy = TinyPolicy()
    groups = torch.tensor(list(product(range(len(policy.rewards)), repeat=3)))
    probability = policy.probability[groups].prod(1)
    plain, found = (policy.gradients(groups, estimator) for estimator in (None, "optimal_token_baseline"))
    assert_close(
        torch.einsum("b,bsv->sv", probability, found), torch.einsum("b,bsv->sv", probability, plain), atol=1e-7
    )
    assert probability @ found.square().sum((1, 2)) < 0.9 * probability @ plain.square().sum((1, 2))


def test_optimal_token_baseline_has_less_variance_than_the_mean_in_large_groups():
    policy = TinyPolicy()
    generator = torch.Generator().manual_seed(1)
    groups = torch.multinomial(policy.probability, 2000 * 32, replacement=True, generator=generator).view(2000, 32)
    variances = [
        policy.gradients(groups, estimator).var(0).sum() for estimator in ("optimal_token_baseline", "leave_one_out")
    ]
    assert variances[0] < 0.98 * variances[1]


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "rewards", [[1.0, 0.0, 0.0, 1.0, 0.0], [0.3, -1.0, 2.0, 2.0, 0.1], [0.5, NAN, 0.2, 0.9, 0.1, 0.7]]
)
def test_pass_at_k_is_the_gain_over_all_subsets(k, rewards):
    scored = [i for i, r in enumerate(rewards) if r == r]
    subsets = list(combinations(scored, k))
    best = torch.tensor([max(rewards[i] for i in s) for s in subsets], dtype=torch.float64)
    expected = torch.zeros(len(rewards), dtype=torch.float64)
    for i in scored:
        with_i = torch.tensor([i in s for s in subsets])
        spread = best.std(unbiased=False)
        expected[i] = (best[with_i].mean() - best.mean()) / spread if spread > 0 else 0
    assert_close(advantages(rewards, len(rewards), estimator="pass_at_k", k=k), expected)


def test_pass_at_k_of_fewer_than_k_scored_completions_is_zero():
    assert_close(advantages([1.0, 0.0, NAN], 3, estimator="pass_at_k", k=3), [0.0, 0.0, 0.0])


def test_rewards_are_weighted_and_those_that_do_not_apply_left_out():
    rewards = [[1.0, 2.0], [NAN, 4.0], [3.0, NAN], [NAN, NAN]]
    assert_close(advantages(rewards, 4, weights=[1.0, 0.5]), [2 - 7 / 3, 2 - 7 / 3, 3 - 7 / 3, 0.0])


def test_normalize_then_sum_lets_no_reward_outweigh_another():
    small = advantages([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]], 4, aggregation="normalize_then_sum")
    large = advantages([[1.0, 0.0], [0.0, 900.0], [1.0, 900.0], [0.0, 0.0]], 4, aggregation="normalize_then_sum")
    assert_close(small, large, atol=1e-3)
    assert small[0].abs() < 1e-10 and small[2] == -small[3] > 0


# ---- properties ----

finite = st.floats(-10, 10, allow_nan=False).map(lambda x: round(x, 3))


@st.composite
def rewards_in_groups(draw, low: float = -10.0, missing: bool = True, least: int = 1):
    """Rewards [B, G] as a tensor; NaN where there is none."""
    B, G = draw(st.integers(1, 4)), draw(st.integers(least, 6))
    value = st.floats(low, 10).map(lambda x: round(x, 3))
    value = st.one_of(value, st.just(NAN)) if missing else value
    rows = draw(st.lists(st.lists(value, min_size=G, max_size=G), min_size=B, max_size=B))
    return torch.tensor(rows, dtype=torch.float64)


def of(r: torch.Tensor, **options) -> torch.Tensor:
    return group_advantages(r.reshape(-1), r.shape[1], **options).view_as(r)


@settings(deadline=None, max_examples=50)
@given(rewards_in_groups())
def test_every_group_sums_to_zero(r):
    for options in (
        {},
        {"scale_rewards": "group"},
        {"scale_rewards": "batch"},
        {"estimator": "leave_one_out"},
        {"estimator": "reinforce_pp_baseline"},
        {"estimator": "gpg"},
        {"estimator": "lite_ppo"},
    ):
        assert_close(of(r, **options).sum(1), torch.zeros(r.shape[0]), atol=1e-7)


@settings(deadline=None, max_examples=50)
@given(rewards_in_groups(missing=False, least=2), st.integers(1, 2))
def test_pass_at_k_sums_to_zero_in_every_group(r, k):
    assert_close(of(r, estimator="pass_at_k", k=k).sum(1), torch.zeros(r.shape[0]), atol=1e-6)


@settings(deadline=None, max_examples=50)
@given(rewards_in_groups(), finite)
def test_a_shift_of_all_rewards_changes_nothing(r, shift):
    for options in (
        *({"scale_rewards": scale} for scale in ("none", "group", "batch")),
        {"estimator": "leave_one_out"},
        {"estimator": "reinforce_pp"},
        {"estimator": "opo", "lengths": torch.arange(1, r.numel() + 1)},
        {"aggregation": "normalize_then_sum"},
    ):
        assert_close(of(r + shift, **options), of(r, **options), atol=1e-7)


@settings(deadline=None, max_examples=50)
@given(rewards_in_groups(), st.floats(0.1, 10))
def test_a_scale_of_all_rewards_passes_through_or_cancels(r, scale):
    for estimator in ("group", "leave_one_out", "gpg"):
        assert_close(of(scale * r, estimator=estimator), scale * of(r, estimator=estimator), atol=1e-7)
    lengths = torch.arange(1, r.numel() + 1)
    assert_close(
        of(scale * r, estimator="opo", lengths=lengths), scale * of(r, estimator="opo", lengths=lengths), atol=1e-7
    )
    positive = r.abs()
    assert_close(of(scale * positive, estimator="max_rl"), of(positive, estimator="max_rl"), atol=1e-6)


@settings(deadline=None, max_examples=50)
@given(st.lists(finite, min_size=1, max_size=4), st.integers(1, 6))
def test_groups_of_equal_rewards_give_exactly_zero(values, G):
    r = torch.tensor(values, dtype=torch.float64)[:, None].expand(-1, G)
    for estimator, options in ESTIMATORS.items():
        if estimator == "reinforce_pp":
            continue  # compares with the whole batch, not with the group
        if estimator == "max_rl":
            r = r.abs()
        k = {"k": 1} if "k" in options else {}
        assert (of(r, estimator=estimator, lengths=torch.ones(r.numel()), **k) == 0).all()
    for scale in ("group", "batch"):
        assert (of(r, scale_rewards=scale) == 0).all()
    assert (of(r, aggregation="normalize_then_sum") == 0).all()


@settings(deadline=None, max_examples=50)
@given(rewards_in_groups(), st.randoms())
def test_rows_without_reward_get_zero_and_are_out_of_the_statistics(r, random):
    for options in ({}, {"scale_rewards": "group"}, {"scale_rewards": "batch"}, {"estimator": "reinforce_pp_baseline"}):
        A = of(r, **options)
        assert A.isfinite().all()
        assert (A[r.isnan()] == 0).all()
        kept = r[0][~r[0].isnan()]
        if options.get("scale_rewards", "group") == "group" and "estimator" not in options and len(kept):
            assert_close(A[0][~r[0].isnan()], of(kept[None], **options)[0])


@settings(deadline=None, max_examples=50)
@given(rewards_in_groups(missing=False), st.randoms())
def test_the_order_of_groups_and_of_completions_does_not_matter(r, random):
    rows = random.sample(range(r.shape[0]), r.shape[0])
    columns = random.sample(range(r.shape[1]), r.shape[1])
    r = r.abs()
    for estimator, options in ESTIMATORS.items():
        if options.get("k", 0) > r.shape[1]:
            continue
        shuffled = of(r[rows][:, columns], estimator=estimator, lengths=torch.ones(r.numel()), **options)
        expected = of(r, estimator=estimator, lengths=torch.ones(r.numel()), **options)[rows][:, columns]
        assert_close(shuffled, expected, atol=1e-7)


def test_float32_rewards_of_equal_groups_are_exactly_zero_too():
    r = torch.full((12,), 0.1)
    for options in ({}, {"scale_rewards": "group"}, {"scale_rewards": "batch"}, {"aggregation": "normalize_then_sum"}):
        A = group_advantages(r, 3, **options)
        assert A.dtype == torch.float32 and (A == 0).all()
    # rounding noise that a division by (0 + 1e-4), twice, would blow up
    assert (advantages([0.0] * 6 + [2.191] * 6, 6, aggregation="normalize_then_sum") == 0).all()


def test_a_single_generation_or_a_single_scored_one_teaches_nothing():
    for estimator, options in ESTIMATORS.items():
        if estimator == "reinforce_pp":
            continue
        k = {"k": 1} if "k" in options else {}
        A = advantages([2.0, 3.0], 1, estimator=estimator, lengths=torch.tensor([1, 2]), **k)
        assert (A == 0).all()
        A = advantages([NAN, 3.0], 2, estimator=estimator, lengths=torch.tensor([1, 2]), **k)
        assert (A == 0).all()


# ---- across ranks, and refusals ----


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("scale_rewards", ["none", "group", "batch"])
def test_the_config_says_truly_which_statistics_span_the_batch(estimator, scale_rewards):
    if scale_rewards != "none" and estimator not in ("group", "leave_one_out", "opo"):
        return
    config = AdvantageConfig(estimator=estimator, scale_rewards=scale_rewards, k=ESTIMATORS[estimator].get("k"))
    r = torch.tensor([[1.0], [0.0], [0.5], [2.0], [3.0], [3.0], [7.0], [7.0]], dtype=torch.float64)
    lengths = torch.arange(1, 9)
    whole = config(r, 2, lengths=lengths)
    ranks = torch.cat([config(r[rows], 2, lengths=lengths[rows]) for rows in (slice(0, 4), slice(4, 8))])
    assert torch.allclose(whole, ranks) != config.spans_batch


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"estimator": "gae"}, ["estimator", "'gae'", "leave_one_out"]),
        ({"scale_rewards": "std"}, ["scale_rewards", "'std'", "batch"]),
        ({"aggregation": "sum"}, ["aggregation", "'sum'", "normalize_then_sum"]),
        ({"estimator": "gpg", "scale_rewards": "group"}, ["scale_rewards", "'group'", "'gpg'", "none"]),
        ({"estimator": "opo", "aggregation": "normalize_then_sum"}, ["aggregation", "'opo'", "group"]),
        (
            {"estimator": "optimal_token_baseline", "scale_rewards": "group"},
            ["scale_rewards", "optimal_token_baseline"],
        ),
        ({"estimator": "optimal_token_baseline", "turn_credit": "return_to_go"}, ["return_to_go", "episode"]),
        ({"estimator": "pass_at_k"}, ["k is None", "pass_at_k"]),
        ({"k": 2}, ["k is 2", "pass_at_k"]),
        ({"estimator": "pass_at_k", "k": 0}, ["k is 0"]),
    ],
)
def test_contradictions_are_refused_where_they_are_made(options, words):
    for build in (lambda: AdvantageConfig(**options), lambda: advantages([1.0, 2.0], 2, **options)):
        with pytest.raises(ValueError) as error:
            build()
        assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("rewards", "options", "words"),
    [
        ([1.0, 2.0, 3.0], {}, ["3 rewards", "num_generations is 2"]),
        ([1.0, float("inf")], {}, ["infinite", "None"]),
        ([1.0, 2.0], {"weights": [1.0, 1.0]}, ["weights", "2 values", "1 reward"]),
        ([1.0, 2.0], {"estimator": "opo"}, ["opo", "lengths"]),
        ([1.0, 2.0], {"estimator": "optimal_token_baseline"}, ["optimal_token_baseline", "grad_norms"]),
        ([1.0, -2.0], {"estimator": "max_rl"}, ["max_rl", "-2"]),
        ([1.0, 0.0], {"estimator": "pass_at_k", "k": 3}, ["k is 3", "num_generations is 2"]),
    ],
)
def test_rewards_that_do_not_fit_are_refused(rewards, options, words):
    with pytest.raises(ValueError) as error:
        advantages(rewards, 2, **options)
    assert all(word in str(error.value) for word in words), error.value
