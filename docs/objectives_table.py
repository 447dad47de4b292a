"""Generate docs/objectives.md: ``python docs/objectives_table.py > docs/objectives.md``."""

from collections.abc import Sequence
from dataclasses import fields
from inspect import getdoc

from lightning_grpo.objective.advantages import ESTIMATORS
from lightning_grpo.objective.aggregation import aggregate
from lightning_grpo.objective.kl import kl_divergence
from lightning_grpo.objective.presets import PRESETS
from lightning_grpo.objective.surrogate import CISPO, DPPO, GMPO, SAPO, VESPO, Clipped, Reinforce, Surrogate

TOP = """\
# Objectives

<!-- Generated from the code by `python docs/objectives_table.py`. -->

An objective consists of independent parts:

    surrogate(ratio, advantage) × masks × rollout weight + β·KL, aggregated, minus the entropy bonus

`objective.loss_type` names a published objective and selects its parts. Every other option replaces one of them:

```yaml
model:
  objective:
    loss_type: dapo
    beta: 0.01
    rollout_correction: {level: token, mode: truncate, upper: 2.0}
  advantage:
    estimator: leave_one_out
```
"""

OWN = """\
To use a surrogate of your own, write a small class and set its class path:

```python
from dataclasses import dataclass

import torch

from lightning_grpo.objective import Surrogate, Terms


@dataclass(frozen=True, kw_only=True)
class Tempered(Surrogate):
    power: float = 0.5

    def __call__(self, terms: Terms) -> torch.Tensor:
        return -(terms.ratio**self.power) * terms.advantages
```

```yaml
model:
  objective:
    surrogate: {class_path: my_project.Tempered, init_args: {power: 0.7}}
```
"""

OPTIONS = {
    "mask_truncated_completions": "Excludes completions truncated at the length limit from the loss.",
    "top_entropy_quantile": "Restricts the policy term to this share of tokens, those with the highest entropy in the"
    " micro-batch.",
    "off_policy_mask_threshold": "Drops completions with A < 0 if the mean of log π_rollout − log π exceeds this.",
    "rollout_correction": "Multiplies by ρ = π_old/π_engine of a token (`token`), its product (`sequence`) or its"
    " `geometric` mean over the completion. Outside `lower` and `upper`, ρ is clamped (`truncate`) or set to 0"
    " (`mask`). IcePop is `token`, `mask`, 0.5, 5.",
    "beta": "Weight of the KL to the reference.",
    "kl_placement": "Adds the KL to the loss, or subtracts it from the reward.",
    "use_bias_correction_kl": "Multiplies the KL in the loss by the ratio.",
    "adaptive_beta": "Adjusts β once per optimizer step to reach a target KL.",
    "entropy_coef": "Weight of the entropy bonus, the mean over tokens with every aggregation.",
    "adaptive_entropy": "Adjusts the weight of the bonus once per optimizer step to reach a target entropy.",
}


def first(thing: object) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join(getdoc(thing).split("\n\n")[0].split()).replace("|", "\\|")


def listing(thing: object) -> str:
    """The bullet list in a docstring."""
    return "\n".join(line for line in getdoc(thing).splitlines() if line.startswith(("- ", "  ")))


def numbers(surrogate: Surrogate) -> str:
    """The expression that constructs a surrogate, without options that are None."""
    given = {f.name: getattr(surrogate, f.name) for f in fields(surrogate)}
    return f"{type(surrogate).__name__}({', '.join(f'{k}={v:g}' for k, v in given.items() if v is not None)})"


def table(head: Sequence[str], body: Sequence[Sequence[object]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, ["---"] * len(head), *body])


def page() -> str:
    """The whole page, as Markdown."""
    presets = [
        (
            f"`{name}`",
            f"`{numbers(p.surrogate)}`",
            p.importance_sampling_level,
            p.aggregation,
            f"{p.beta:g}",
            p.paper,
            p.use,
        )
        for name, p in PRESETS.items()
    ]
    surrogates = [(f"`{s.__name__}`", first(s)) for s in (Clipped, Reinforce, CISPO, SAPO, VESPO, GMPO, DPPO)]
    estimators = [(f"`{name}`", first(function)) for name, function in ESTIMATORS.items()]
    return "\n".join(
        [
            TOP,
            "## Published objectives\n",
            table(("name", "surrogate", "ratio", "aggregation", "β", "paper", "when to use it"), presets),
            "\n## Surrogates\n",
            "w is the ratio π/π_old of a token or a completion, A is the advantage, sg[·] stops the gradient.\n",
            table(("class", "loss"), surrogates),
            "",
            OWN,
            "## Aggregations\n",
            listing(aggregate),
            "\n## KL\n",
            "With x = log π_ref − log π, `kl_estimator` is one of:\n",
            listing(kl_divergence),
            "",
            "## Masks, corrections and bonuses\n",
            "Masks and the rollout weight apply to the policy term and not to the KL.\n",
            table(("option", "what it does"), [(f"`{name}`", what) for name, what in OPTIONS.items()]),
            "",
            "## Advantages\n",
            "`advantage.estimator` selects one of the table. A reward of None is left out of the sum of a completion's",
            "rewards; a completion without any reward has the advantage 0.",
            "`advantage.scale_rewards` divides by the standard deviation of the group or the batch, plus 1e-4.",
            "`advantage.aggregation: normalize_then_sum` z-scores each reward in its group, sums the results with",
            "their weights, and z-scores the sum over the batch.",
            "`advantage.turn_credit: return_to_go` gives the turns of a completion in an environment different",
            "advantages: a turn's reward leaves out what the environment gave for earlier turns, and is compared with",
            "the same turn of the group's other completions (arXiv:2505.11821).\n",
            table(("estimator", "advantage"), estimators),
            "",
        ]
    )


if __name__ == "__main__":
    print(page(), end="")
