"""Published objectives by name: each combines parts with the values of its paper. docs/objectives.md lists them."""

from dataclasses import dataclass, field
from typing import Literal

from lightning_grpo.objective.aggregation import Aggregation
from lightning_grpo.objective.kl import KLEstimator
from lightning_grpo.objective.surrogate import CISPO, DPPO, GMPO, SAPO, VESPO, Clipped, Reinforce, Surrogate

RatioLevel = Literal["token", "sequence"]


@dataclass(frozen=True, kw_only=True)
class Preset:
    """The parts of a published objective, and its source."""

    surrogate: Surrogate = field(default_factory=Clipped)
    importance_sampling_level: RatioLevel = "token"
    aggregation: Aggregation
    beta: float = 0.0
    kl_estimator: KLEstimator = "k3"
    paper: str
    use: str
    """When to use it, in one line."""


PRESETS: dict[str, Preset] = {
    "dr_grpo": Preset(
        aggregation="constant",
        paper="Dr. GRPO, arXiv:2503.20783",
        use="The default. No bias towards short or long completions; step sizes are stable.",
    ),
    "grpo": Preset(
        aggregation="sequence_mean",
        beta=0.04,
        paper="DeepSeekMath, arXiv:2402.03300",
        use="To reproduce DeepSeekMath, the paper that introduced GRPO, with its reference policy.",
    ),
    "bnpo": Preset(
        aggregation="local_tokens",
        paper="TRL's token mean over the micro-batch",
        use="To match runs that used it. The loss depends on the split into micro-batches.",
    ),
    "dapo": Preset(
        surrogate=Clipped(epsilon=0.2, epsilon_high=0.28),
        aggregation="global_tokens",
        paper="DAPO, arXiv:2503.14476",
        use="Long reasoning: every token has the same weight, and unlikely tokens can become likely.",
    ),
    "gspo": Preset(
        surrogate=Clipped(epsilon=3e-4, epsilon_high=4e-4),
        importance_sampling_level="sequence",
        aggregation="sequence_mean",
        paper="GSPO, arXiv:2507.18071",
        use="Mixture-of-experts policies with several updates per rollout; no benefit with one.",
    ),
    "luspo": Preset(
        surrogate=Clipped(epsilon=2e-3, epsilon_high=2.5e-3),
        importance_sampling_level="sequence",
        aggregation="sequence_sum",
        paper="LUSPO, arXiv:2602.05261",
        use="GSPO without its bias against long completions.",
    ),
    "cispo": Preset(
        surrogate=CISPO(),
        aggregation="global_tokens",
        paper="MiniMax-M1, arXiv:2506.13585; cap of ScaleRL, arXiv:2510.13786",
        use="Large off-policy runs: large ratios are capped, and no token loses its gradient.",
    ),
    "sapo": Preset(
        surrogate=SAPO(),
        aggregation="sequence_mean",
        paper="SAPO, arXiv:2511.20347",
        use="If hard clipping discards too much or destabilises: the gate decays smoothly.",
    ),
    "vespo": Preset(
        surrogate=VESPO(),
        aggregation="global_tokens",
        paper="VESPO, arXiv:2602.10693",
        use="Stale or asynchronous rollouts: completions are weighted by how far the policy has moved.",
    ),
    "gmpo": Preset(
        surrogate=GMPO(),
        importance_sampling_level="sequence",
        aggregation="sequence_mean",
        paper="GMPO, arXiv:2507.20673",
        use="Robustness to outlier tokens, which hardly change a geometric mean.",
    ),
    "dppo": Preset(
        surrogate=DPPO(),
        aggregation="global_tokens",
        paper="DPPO, arXiv:2602.04879",
        use="Large vocabularies: a trust region on probabilities does not bind rare tokens harder.",
    ),
    "reinforce": Preset(
        surrogate=Reinforce(),
        aggregation="global_tokens",
        paper="Williams 1992; with group baselines, GPG, arXiv:2504.02546",
        use="Strictly on-policy steps: no clipping and no old log-probs.",
    ),
}
