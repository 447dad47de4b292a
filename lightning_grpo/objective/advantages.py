"""Advantages from rewards: subtract a baseline, and optionally divide by a scale.

Shapes: B prompts, G generations, N = B·G completions (prompt-major), R reward functions, T completion length. NaN means
"no reward".
All computations are in float64.
"""

from dataclasses import dataclass
from math import comb
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_grpo.errors import UserError
from lightning_grpo.ranges import check_ranges

Estimator = Literal[
    "group",
    "leave_one_out",
    "reinforce_pp",
    "reinforce_pp_baseline",
    "max_rl",
    "pass_at_k",
    "opo",
    "optimal_token_baseline",
    "gpg",
    "lite_ppo",
]
Scale = Literal["none", "group", "batch"]
RewardAggregation = Literal["sum_then_normalize", "normalize_then_sum"]
TurnCredit = Literal["episode", "return_to_go"]

EPSILON = 1e-4


@dataclass(frozen=True, kw_only=True)
class AdvantageConfig:
    """Computes advantages from rewards."""

    estimator: Estimator = "group"
    """Baseline and form; see docs/objectives.md. The default, the group's mean, is unbiased up to a factor (G−1)/G."""
    scale_rewards: Scale = "none"
    """Divide by the standard deviation (with Bessel's correction) of the group or the batch, plus 1e-4. ``none`` does
    not change the relative weight of easy and hard prompts (Dr. GRPO)."""
    aggregation: RewardAggregation = "sum_then_normalize"
    """Sum the weighted rewards and then normalize; or z-score each reward within its group first, so that all have the
    same influence, sum them with their weights, and z-score the sum over the batch."""
    k: int | None = None
    """k of pass_at_k, which rewards the best of k completions."""
    turn_credit: TurnCredit = "episode"
    """episode gives every token of a completion the same advantage. return_to_go, with an environment, leaves out of a
    turn's reward what the environment gave for earlier turns, and compares it with the same turn of the group's other
    completions (turn-level credit, arXiv:2505.11821)."""

    def __post_init__(self) -> None:
        choices_of = {
            "estimator": Estimator,
            "scale_rewards": Scale,
            "aggregation": RewardAggregation,
            "turn_credit": TurnCredit,
        }
        for name, choices in choices_of.items():
            if (value := getattr(self, name)) not in get_args(choices):
                raise UserError(f"advantage.{name} is {value!r}; set one of {', '.join(get_args(choices))}")
        if self.estimator not in ("group", "leave_one_out", "opo") and self.scale_rewards != "none":
            raise UserError(
                f"advantage.scale_rewards is {self.scale_rewards!r}, which estimator {self.estimator!r} does not"
                " support; set scale_rewards to none"
            )
        if self.aggregation == "normalize_then_sum" and self.estimator != "group":
            raise UserError(
                f"advantage.aggregation is 'normalize_then_sum', which centres and scales by itself, but estimator is"
                f" {self.estimator!r}; set estimator to group, or aggregation to sum_then_normalize"
            )
        check_ranges(self, {"k": "[1, inf)"}, prefix="advantage.")
        if (self.k is not None) != (self.estimator == "pass_at_k"):
            raise UserError(
                f"advantage.k is {self.k}, but estimator is {self.estimator!r}; set k with pass_at_k, and only then"
            )
        if self.turn_credit == "return_to_go" and self.needs_grad_norms:
            raise UserError(
                f"advantage.turn_credit is 'return_to_go', which compares turns, but estimator is {self.estimator!r},"
                " which compares tokens; set turn_credit to episode, or another estimator"
            )
        if self.turn_credit == "return_to_go" and self.spans_batch:
            raise UserError(
                "advantage.turn_credit is 'return_to_go', which compares turns within a group, but the other options of"
                " advantage take statistics over the batch; set estimator to group, scale_rewards to none or group, and"
                " aggregation to sum_then_normalize"
            )

    @property
    def needs_groups(self) -> bool:
        """Whether the advantages of groups with one completion are all 0."""
        return self.estimator != "reinforce_pp"

    @property
    def needs_grad_norms(self) -> bool:
        """Whether the policy must score the completions before their advantages are known, for `Rollout.grad_norms`."""
        return self.estimator == "optimal_token_baseline"

    @property
    def spans_batch(self) -> bool:
        """Whether statistics are taken over the batch, so that rewards (and lengths) of all ranks must be gathered."""
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
        grad_norms: Tensor | None = None,
    ) -> Tensor:
        """Return advantages [N], in the precision of ``rewards`` (at least float32); optimal_token_baseline: [N, T].

        A reward of NaN does not apply: it is left out of the sum of its row. A row whose rewards are all NaN gets A = 0
        and is left out of all statistics. Rounding noise (below 1e-10) becomes exactly 0, so that groups without signal
        can be skipped.

        Args:
            rewards: [N, R] (or [N]), prompt-major.
            num_generations: G.
            weights: [R], the weight of each reward; None: 1 each.
            lengths: [N], tokens of each completion; required by opo.
            grad_norms: [N, T], squared norm of ∂log-prob/∂logits of each token, NaN if the policy did not sample it;
                required by optimal_token_baseline.

        Raises:
            UserError: a wrong shape, an infinite reward, or an option that does not fit the rewards.
        """
        rewards = rewards[:, None] if rewards.dim() == 1 else rewards
        (N, R), G = rewards.shape, num_generations
        if N % G:
            raise UserError(f"{N} rewards can't be divided into groups: num_generations is {G}")
        if rewards.isinf().any():
            raise UserError("a reward is infinite; return a finite number, or None if the reward does not apply")
        if weights is not None and len(weights) != R:
            raise UserError(f"weights has {len(weights)} values for {R} reward functions; give one for each")
        if self.k is not None and self.k > G:
            raise UserError(f"advantage.k is {self.k}, but num_generations is {G}; set k ≤ num_generations")
        if self.estimator == "opo" and lengths is None:
            raise UserError("advantage.estimator is 'opo', whose baseline weights rewards by length; give lengths [N]")
        if self.needs_grad_norms and grad_norms is None:
            raise UserError(
                f"advantage.estimator is {self.estimator!r}, whose baseline weights rewards by the gradients of tokens;"
                " give grad_norms [N, T]"
            )
        values = rewards.double()
        weights = torch.ones(R) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
        weights = weights.to(values)

        if self.aggregation == "normalize_then_sum":
            grouped = values.view(-1, G, R)
            z_scores = centre(grouped, 1) / (std(grouped, 1) + EPSILON)
            total = total_rewards(z_scores.view(N, R), weights)
            A = centre(total, 0) / (std(total, 0) + EPSILON)
        else:
            total = total_rewards(values, weights)
            grouped = total.view(-1, G)
            A = ESTIMATORS[self.estimator](grouped, grad_norms if self.needs_grad_norms else lengths, self.k)
            if self.scale_rewards != "none":
                spread = std(grouped, 1) if self.scale_rewards == "group" else std(total, 0)
                A = A / (spread + EPSILON)
            A = A.reshape(N, *A.shape[2:])
        A = A.nan_to_num(nan=0.0)
        A = torch.where(A.abs() < 1e-10, 0.0, A)
        return A.to(rewards.dtype if rewards.dtype == torch.float64 else torch.float32)


def group_advantages(
    rewards: Tensor,
    num_generations: int,
    *,
    weights: Tensor | list[float] | None = None,
    lengths: Tensor | None = None,
    grad_norms: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Return advantages [N] of ``rewards`` [N, R]; ``options`` are the fields of `AdvantageConfig`."""
    config = AdvantageConfig(**options)
    return config(rewards, num_generations, weights=weights, lengths=lengths, grad_norms=grad_norms)


def total_rewards(rewards: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    """[N]: the weighted sum of the ``rewards`` [N, R] that apply; NaN for a row without any."""
    return (rewards * weights).nansum(1).masked_fill(rewards.isnan().all(1), torch.nan)


def centre(x: Tensor, dim: int) -> Tensor:
    """x − mean, ignoring NaN; exactly 0 if all values are equal, in spite of rounding in the mean."""
    mean = x.nanmean(dim, keepdim=True)
    deviation = x - mean
    return torch.where(deviation.abs() <= 1e-14 * x.shape[dim] * mean.abs(), 0.0, deviation)


def std(x: Tensor, dim: int) -> Tensor:
    """The standard deviation with Bessel's correction, ignoring NaN; 0 for fewer than two values. Keeps ``dim``."""
    count = (~x.isnan()).sum(dim, keepdim=True)
    return (centre(x, dim).square().nansum(dim, keepdim=True) / (count - 1).clamp(min=1)).sqrt()


def group(r: Tensor, lengths: Tensor | None, k: int | None) -> Tensor:
    """r − mean of the group (Dr. GRPO, arXiv:2503.20783; with scale_rewards group: GRPO, arXiv:2402.03300)."""
    return centre(r, 1)


def leave_one_out(r: Tensor, lengths: Tensor | None, k: int | None) -> Tensor:
    """r − mean of the others in the group (RLOO, arXiv:2402.14740). Unbiased, which matters in small groups."""
    count = (~r.isnan()).sum(1, keepdim=True)
    return centre(r, 1) * count / (count - 1).clamp(min=1)


def whiten(r: Tensor) -> Tensor:
    """(r − mean) / standard deviation, both of the whole batch."""
    flat = r.reshape(-1)
    return (centre(flat, 0) / (std(flat, 0) + EPSILON)).view_as(r)


def reinforce_pp(r: Tensor, lengths: Tensor | None, k: int | None) -> Tensor:
    """r whitened over the batch, regardless of groups (REINFORCE++, arXiv:2501.03262). Allows num_generations: 1."""
    return whiten(r)


def reinforce_pp_baseline(r: Tensor, lengths: Tensor | None, k: int | None) -> Tensor:
    """r − mean of the group, whitened over the batch (REINFORCE++ with baseline, arXiv:2501.03262)."""
    return whiten(centre(r, 1))


def max_rl(r: Tensor, lengths: Tensor | None, k: int | None) -> Tensor:
    """(r − μ)/μ with μ the mean of the group, 0 if μ = 0 (MaxRL, arXiv:2602.02710). Favours hard prompts; requires
    rewards ≥ 0."""
    if (r < 0).any():
        raise UserError(
            f"advantage.estimator is 'max_rl', which requires rewards ≥ 0, but one is {r.nan_to_num().min()}"
        )
    mean = r.nanmean(1, keepdim=True)
    return centre(r, 1) / torch.where(mean > 0, mean, 1.0)


def opo(r: Tensor, lengths: Tensor | None, k: int | None) -> Tensor:
    """r − length-weighted mean of the group (OPO, arXiv:2505.23585). The least variance on-policy."""
    weight = lengths.to(r).view_as(r) * ~r.isnan()
    return r - (weight * r.nan_to_num()).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)


def optimal_token_baseline(r: Tensor, grad_norms: Tensor, k: int | None) -> Tensor:
    """r − mean of the others in the group, weighted at a completion's t-th token by Σ ‖∂log π/∂logits‖² over their
    first t tokens (arXiv:2602.07078; unbiased, because a completion is left out of its own baseline). For groups of 16
    or more: in small ones the weights are noisy. The policy scores all completions before the update."""
    r = centre(r, 1)
    sampled = ~grad_norms.isnan()
    # sampled tokens first, so that tool output between them does not count
    order = sampled.long().argsort(dim=1, descending=True, stable=True)
    energy = grad_norms.double().nan_to_num().gather(1, order).cumsum(1) * sampled.gather(1, order)
    # the smallest weight is above 0: where no other completion has a t-th token, the baseline is their plain mean
    weight = ((energy + 1e-8).view(*r.shape, -1) * ~r.isnan()[..., None]).to(r)
    others = 1 - torch.eye(r.shape[1]).to(r)
    baseline = others @ (weight * r.nan_to_num()[..., None]) / (others @ weight)
    A = (r[..., None] - baseline).view(len(order), -1)
    return torch.zeros_like(A).scatter(1, order, A).masked_fill(~sampled, 0.0).view(*r.shape, -1)


def gpg(r: Tensor, lengths: Tensor | None, k: int | None) -> Tensor:
    """(r − mean of the group) / share of completions in groups with any spread (GPG, arXiv:2504.02546)."""
    scored = ~r.isnan()
    mixed = (std(r, 1) > 1e-10) & scored
    return centre(r, 1) * scored.sum() / mixed.sum().clamp(min=1)


def lite_ppo(r: Tensor, lengths: Tensor | None, k: int | None) -> Tensor:
    """(r − mean of the group) / standard deviation of the batch (Lite PPO, arXiv:2508.08221)."""
    return centre(r, 1) / (std(r.reshape(-1), 0) + EPSILON)


def pass_at_k(r: Tensor, lengths: Tensor | None, k: int) -> Tensor:
    """What having this sample among k adds to the expected best of k, divided by the standard deviation of the best
    of k (arXiv:2508.10751 for 0/1 rewards, generalised here to any). Encourages exploration.
    """
    return torch.stack([best_of_k(row, k) for row in r])


def best_of_k(r: Tensor, k: int) -> Tensor:
    """(E[max of a k-subset with i] − E[max of any k-subset]) / its standard deviation, [G].

    0 if the best of k has no spread, and if fewer than k completions are scored.
    """
    scored = ~r.isnan()
    n = int(scored.sum())
    if n < k:
        return torch.zeros_like(r)
    value, order = r[scored].sort()
    # the probability that the j-th smallest is the best: of any k, and of k with a given smaller one
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
    "optimal_token_baseline": optimal_token_baseline,
    "gpg": gpg,
    "lite_ppo": lite_ppo,
}
