"""The current values of β and the entropy coefficient."""

from dataclasses import replace
from math import isnan

from lightning_grpo.objective.config import ObjectiveConfig


class Coefficients:
    """The current values of β and the entropy coefficient; call `step` once per optimizer step."""

    def __init__(self, config: ObjectiveConfig) -> None:
        self.base = config
        self.beta = config.resolved.beta
        self.entropy_coef = config.entropy_coef
        self.bonus = config.adaptive_entropy is None

    @property
    def config(self) -> ObjectiveConfig:
        """The objective with the current coefficients, for `policy_loss`."""
        if self.base.adaptive_beta is None and self.base.adaptive_entropy is None:
            return self.base
        return replace(
            self.base,
            beta=self.beta,
            adaptive_beta=None,
            entropy_coef=self.entropy_coef if self.bonus else 0.0,
            adaptive_entropy=None,
        )

    @property
    def adaptive(self) -> dict[str, float]:
        """Current values of the coefficients that are adaptive, by the names of their metrics."""
        values = {}
        if self.base.adaptive_beta is not None:
            values["beta"] = self.beta
        if self.base.adaptive_entropy is not None:
            values["entropy_coef"] = self.entropy_coef if self.bonus else 0.0
        return values

    def step(self, *, kl: float | None = None, entropy: float | None = None) -> None:
        """Update the adaptive coefficients from the means of KL and entropy over the step's tokens on all ranks.

        None or NaN, as after a step without any token in the loss, changes nothing.
        """
        kl, entropy = (None if x is None or isnan(x) else x for x in (kl, entropy))
        if (control := self.base.adaptive_beta) is not None and kl is not None:
            self.beta = control.step(self.beta, kl)
        if (bonus_control := self.base.adaptive_entropy) is not None and entropy is not None:
            self.entropy_coef = bonus_control.step(self.entropy_coef, entropy)
            self.bonus = entropy <= bonus_control.target

    def state_dict(self) -> dict[str, float | bool]:
        return {"beta": self.beta, "entropy_coef": self.entropy_coef, "bonus": self.bonus}

    def load_state_dict(self, state: dict[str, float | bool]) -> None:
        self.beta, self.entropy_coef, self.bonus = state["beta"], state["entropy_coef"], bool(state["bonus"])
