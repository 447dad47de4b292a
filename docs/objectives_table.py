"""Writes docs/objectives.md from the code: ``python docs/objectives_table.py > docs/objectives.md``."""

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

An objective is a product of parts, each written once:

    surrogate(ratio, advantage) × masks × rollout weight + β·KL, aggregated, less the entropy bonus

A name (`objective.loss_type`) chooses the parts of its published form; every other option replaces one of them:

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
A surrogate of your own is one small class, found by its class path:

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
    "mask_truncated_completions": "Leaves completions that ended for their length out of the loss.",
    "top_entropy_quantile": "The policy term keeps this share of tokens, those of highest entropy. Local by intent:"
    " within a micro-batch.",
    "off_policy_mask_threshold": "Drops completions with A < 0 that have drifted this far from their sampler.",
    "rollout_correction": "Weighs by ρ = π_old/π_engine, per `token`, `sequence`, or `geometric` mean of a completion."
    " Outside `lower` and `upper` it is clamped (`truncate`) or dropped (`mask`). IcePop: `token`, `mask`, 0.5, 5.",
    "beta": "Weight of the KL to the reference.",
    "kl_placement": "The KL in the loss, or in the reward.",
    "use_bias_correction_kl": "Multiplies the KL in the loss by the ratio.",
    "adaptive_beta": "Moves β towards a target KL, once per optimizer step.",
    "entropy_coef": "Entropy bonus: the mean over tokens, whatever the aggregation.",
    "adaptive_entropy": "Moves the bonus towards a target entropy, once per optimizer step.",
}


def first(thing: object) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join(getdoc(thing).split("\n\n")[0].split()).replace("|", "\\|")


def listing(thing: object) -> str:
    """The bullet list in a docstring."""
    return "\n".join(line for line in getdoc(thing).splitlines() if line.startswith(("- ", "  ")))


def numbers(surrogate: Surrogate) -> str:
    """A surrogate as it would be constructed, without what is off."""
    given = {f.name: getattr(surrogate, f.name) for f in fields(surrogate)}
    return f"{type(surrogate).__name__}({', '.join(f'{k}={v:g}' for k, v in given.items() if v is not None)})"


def table(head: tuple[str, ...], body: list[tuple[str, ...]]) -> str:
    """The page's table of presets, in Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ("---",) * len(head), *body])


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
            "## Names\n",
            table(("name", "surrogate", "ratio", "aggregation", "β", "paper", "when to use it"), presets),
            "\n## Surrogates\n",
            "w is the ratio π/π_old of a token or a completion, A the advantage, sg[·] stops the gradient.\n",
            table(("class", "loss"), surrogates),
            "",
            OWN,
            "## Aggregations\n",
            listing(aggregate),
            "\n## KL\n",
            "x = log π_ref − log π; `kl_estimator` is one of:\n",
            listing(kl_divergence),
            "",
            "## Masks, corrections, bonuses\n",
            "The masks and the rollout weight act on the policy term and leave the KL alone.\n",
            table(("option", "what it does"), [(f"`{name}`", what) for name, what in OPTIONS.items()]),
            "",
            "## Advantages\n",
            "`advantage.estimator`; a reward that is None is left out, a completion without any reward gets 0.",
            "`advantage.scale_rewards` divides by the standard deviation of the group or the batch (+ 1e-4);",
            "`advantage.aggregation: normalize_then_sum` z-scores each reward in its group, sums them by",
            "their weights, and z-scores the sum over the batch.\n",
            table(("estimator", "advantage"), estimators),
            "",
        ]
    )


if __name__ == "__main__":
    print(page(), end="")
