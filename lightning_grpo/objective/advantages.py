"""From rewards to advantages: a baseline, and a scale.

Shapes: B prompts, G generations, N = B·G completions (prompt-major), R reward functions. NaN stands for "no reward".
Everything is computed in float64.
"""

from dataclasses import dataclass
from math import comb
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_grpo.errors import UserError
from lightning_grpo.ranges import check_ranges

Estimator = Literal[
    "group", "leave_one_out", "reinforce_pp", "reinforce_pp_baseline", "max_rl", "pass_at_k", "opo", "gpg", "lite_ppo"
]
Scale = Literal["none", "group", "batch"]
RewardAggregation = Literal["sum_then_normalize", "normalize_then_sum"]

EPSILON = 1e-4


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """How rewards become advantages."""

    estimator: Estimator = "group"
    """Baseline and form; see `group_advantages`. The default, the group's mean, is unbiased up to (G−1)/G."""
    scale_rewards: Scale = "none"
    """Divide by the standard deviation of the group or the batch, plus 1e-4. None gives easy and hard prompts the
    weight they have (Dr. GRPO)."""
    aggregation: RewardAggregation = "sum_then_normalize"
    """Sum the weighted rewards first, or z-score each in its group first, so that none outweighs the others."""
    k: int | None = None
    """k of pass_at_k: the reward is that of the best of k."""

    def __post_init__(self) -> None:
        check_options(self.estimator, self.scale_rewards, self.aggregation, self.k)

    @property
    def spans_batch(self) -> bool:
        """Whether statistics span the batch: gather rewards (and lengths) of all ranks first, then slice."""
        return (
            self.scale_rewards == "batch"
            or self.aggregation == "normalize_then_sum"
            or self.estimator in ("reinforce_pp", "reinforce_pp_baseline", "gpg", "lite_ppo")
        )

    def __call__(
        self,
        rewards: Tensor,
        num_generations: int,
        *,
        weights: Tensor | list[float] | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Advantages [N] of rewards [N, R] with weights [R] (each reward's own)."""
        return group_advantages(
            rewards,
            num_generations,
            scale_rewards=self.scale_rewards,
            aggregation=self.aggregation,
            weights=weights,
            estimator=self.estimator,
            lengths=lengths,
            k=self.k,
        )


def check_options(estimator: str, scale_rewards: str, aggregation: str, k: int | None) -> None:
    """Raise ValueError for names that are unknown or contradict each other."""
    for name, value, kind in (
        ("estimator", estimator, Estimator),
        ("scale_rewards", scale_rewards, Scale),
        ("aggregation", aggregation, RewardAggregation),
    ):
        if value not in get_args(kind):
            raise UserError(f"advantage.{name} is {value!r}; set one of {', '.join(get_args(kind))}")
    if estimator not in ("group", "leave_one_out", "opo") and scale_rewards != "none":
        raise UserError(
            f"advantage.scale_rewards is {scale_rewards!r}, but estimator {estimator!r} has its own scale;"
            " set it to none"
        )
    if aggregation == "normalize_then_sum" and estimator != "group":
        raise UserError(
            f"advantage.aggregation is 'normalize_then_sum', which centres and scales itself, but estimator is"
            f" {estimator!r}; set estimator to group, or aggregation to sum_then_normalize"
        )
    check_ranges({"k": k}, {"k": "[1, inf)"}, prefix="advantage.")
    if (k is not None) != (estimator == "pass_at_k") or (k is not None and k < 1):
        raise UserError(f"advantage.k is {k} and estimator {estimator!r}; set k ≥ 1 with pass_at_k, and only there")


def group_advantages(
    rewards: Tensor,
    num_generations: int,
    *,
    scale_rewards: Scale = "none",
    aggregation: RewardAggregation = "sum_then_normalize",
    weights: Tensor | list[float] | None = None,
    estimator: Estimator = "group",
    lengths: Tensor | None = None,
    k: int | None = None,
) -> Tensor:
    """Advantages [N], in the precision of ``rewards`` (at least float32).

    A reward of NaN does not apply: it is left out of its row's sum. A row whose rewards are all NaN gets A = 0 and is
    out of all statistics. Rounding noise (below 1e-10) is exactly 0, so that groups without signal can be skipped.

    The estimators are the functions of `ESTIMATORS`, each with its formula and source; docs/objectives.md lists them.

    Args:
        rewards: [N, R] (or [N]); prompt-major.
        num_generations: G.
        scale_rewards: Divide by (standard deviation + 1e-4), Bessel's, of the group or of the batch.
        aggregation: normalize_then_sum z-scores each reward in its group, sums with weights, z-scores over the batch.
        weights: [R].
        lengths: [N] tokens.
        k: of pass_at_k.

    Raises:
        ValueError: A contradiction, a wrong shape, or an infinite reward.
    """
    check_options(estimator, scale_rewards, aggregation, k)
    rewards = rewards[:, None] if rewards.dim() == 1 else rewards
    N, R = rewards.shape
    G = num_generations
    if N % G:
        raise UserError(f"{N} rewards are no whole number of groups; num_generations is {G}")
    if rewards.isinf().any():
        raise UserError("a reward is infinite; return a finite number, or None where the reward does not apply")
    if weights is not None and len(weights) != R:
        raise UserError(f"weights has {len(weights)} values for {R} reward functions; give one for each")
    if k is not None and k > G:
        raise UserError(f"advantage.k is {k}, but num_generations is {G}; set k ≤ num_generations")
    if estimator == "opo" and lengths is None:
        raise UserError("advantage.estimator is 'opo', whose baseline weighs by length; give lengths [N]")
    values = rewards.double()
    weights = torch.ones(R) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
    weights = weights.to(values)

    if aggregation == "normalize_then_sum":
        grouped = values.view(-1, G, R)
        z = centre(grouped, 1) / (std(grouped, 1) + EPSILON)
        total = total_rewards(z.view(N, R), weights)
        A = centre(total, 0) / (std(total, 0) + EPSILON)
    else:
        total = total_rewards(values, weights)
        grouped = total.view(-1, G)
        A = ESTIMATORS[estimator](grouped, lengths, k)
        if scale_rewards != "none":
            spread = std(grouped, 1) if scale_rewards == "group" else std(total, 0)
            A = A / (spread + EPSILON)
        A = A.reshape(N)
    A = A.nan_to_num(nan=0.0)
    A = torch.where(A.abs() < 1e-10, 0.0, A)
    return A.to(rewards.dtype if rewards.dtype == torch.float64 else torch.float32)


def total_rewards(rewards: Tensor, weights: Tensor) -> Tensor:
    """[N]: the weighted sum of ``rewards`` [N, R] that apply; NaN for a row to which none does."""
    return (rewards * weights).nansum(1).masked_fill(rewards.isnan().all(1), torch.nan)


def centre(x: Tensor, dim: int) -> Tensor:
    """x − mean, leaving NaN out; exactly 0 where all are equal, whatever the mean's rounding."""
    mean = x.nanmean(dim, keepdim=True)
    deviation = x - mean
    return torch.where(deviation.abs() <= 1e-14 * x.shape[dim] * mean.abs(), 0.0, deviation)


def std(x: Tensor, dim: int) -> Tensor:
    """Bessel's standard deviation, leaving NaN out; 0 where there are fewer than two values. Keeps ``dim``."""
    count = (~x.isnan()).sum(dim, keepdim=True)
    return (centre(x, dim).square().nansum(dim, keepdim=True) / (count - 1).clamp(min=1)).sqrt()


def group(r: Tensor, lengths: Tensor | None, k: int | None) -> Tensor:
    """r − mean of the group (Dr. GRPO, arXiv:2503.20783; over its std: GRPO, arXiv:2402.03300). The default."""
    return centre(r, 1)


def leave_one_out(r: Tensor, lengths: Tensor | None, k: int | None) -> Tensor:
    """r − mean of the others in the group (RLOO, arXiv:2402.14740). For small groups: unbiased."""
    count = (~r.isnan()).sum(1, keepdim=True)
    return centre(r, 1) * count / (count - 1).clamp(min=1)


def whiten(r: Tensor) -> Tensor:
    """``r`` less its mean, over its standard deviation, of the whole batch."""
    flat = r.reshape(-1)
    return (centre(flat, 0) / (std(flat, 0) + EPSILON)).view_as(r)


def reinforce_pp(r: Tensor, lengths: Tensor | None, k: int | None) -> Tensor:
    """r whitened over the batch, whatever its group (REINFORCE++, arXiv:2501.03262)."""
    return whiten(r)


def reinforce_pp_baseline(r: Tensor, lengths: Tensor | None, k: int | None) -> Tensor:
    """r − mean of the group, whitened over the batch (REINFORCE++ with baseline, arXiv:2501.03262)."""
    return whiten(centre(r, 1))


def max_rl(r: Tensor, lengths: Tensor | None, k: int | None) -> Tensor:
    """(r − μ)/μ with μ the mean of the group, 0 where μ = 0 (MaxRL, arXiv:2602.02710). For rewards ≥ 0: favours hard
    prompts."""
    if (r < 0).any():
        raise UserError(f"advantage.estimator is 'max_rl', which needs rewards ≥ 0, but one is {r.nan_to_num().min()}")
    mean = r.nanmean(1, keepdim=True)
    return centre(r, 1) / torch.where(mean > 0, mean, 1.0)


def opo(r: Tensor, lengths: Tensor | None, k: int | None) -> Tensor:
    """r − length-weighted mean of the group (OPO, arXiv:2505.23585). Least variance on-policy; needs lengths."""
    weight = lengths.to(r).view_as(r) * ~r.isnan()
    return r - (weight * r.nan_to_num()).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)


def gpg(r: Tensor, lengths: Tensor | None, k: int | None) -> Tensor:
    """r − mean of the group, times the share of rows in groups with any spread, inverted (GPG, arXiv:2504.02546)."""
    scored = ~r.isnan()
    mixed = (std(r, 1) > 1e-10) & scored
    return centre(r, 1) * scored.sum() / mixed.sum().clamp(min=1)


def lite_ppo(r: Tensor, lengths: Tensor | None, k: int | None) -> Tensor:
    """r − mean of the group, over the batch's std (Lite PPO, arXiv:2508.08221)."""
    return centre(r, 1) / (std(r.reshape(-1), 0) + EPSILON)


def pass_at_k(r: Tensor, lengths: Tensor | None, k: int) -> Tensor:
    """What having this sample among k adds to the best of k, over the std of the best of k (arXiv:2508.10751 for 0/1
    rewards, and its generalisation to any). For exploration.
    """
    return torch.stack([best_of_k(row, k) for row in r])


def best_of_k(r: Tensor, k: int) -> Tensor:
    """(E[max of a k-subset with i] − E[max of any k-subset]) / its standard deviation, [G].

    0 where the best of k has no spread, so also where fewer than k completions are scored.
    """
    scored = ~r.isnan()
    n = int(scored.sum())
    if n < k:
        return torch.zeros_like(r)
    value, order = r[scored].sort()
    # the chance that the j-th smallest is the best: alone, and together with a given smaller one
    best = value.new_tensor([comb(j, k - 1) / comb(n, k) for j in range(n)])
    best_with = value.new_tensor([comb(j - 1, k - 2) / comb(n - 1, k - 1) if j and k > 1 else 0.0 for j in range(n)])
    itself = value.new_tensor([comb(j, k - 1) / comb(n - 1, k - 1) for j in range(n)])
    mean = (best * value).sum()
    spread = (best * (value - mean).square()).sum().sqrt()
    above = (best_with * value).flip(0).cumsum(0).flip(0) - best_with * value
    gain = (itself * value + above - mean) / spread if spread > 1e-10 else torch.zeros_like(value)
    out = torch.zeros_like(r)
    out[scored.nonzero()[:, 0][order]] = gain
    return out


ESTIMATORS = {
    "group": group,
    "leave_one_out": leave_one_out,
    "reinforce_pp": reinforce_pp,
    "reinforce_pp_baseline": reinforce_pp_baseline,
    "max_rl": max_rl,
    "pass_at_k": pass_at_k,
    "opo": opo,
    "gpg": gpg,
    "lite_ppo": lite_ppo,
}
