"""The result of planning."""

from dataclasses import dataclass

from lightning_grpo.configure.cost import Cost
from lightning_grpo.configure.memory import Memory
from lightning_grpo.configure.prompts import PromptStatistics
from lightning_grpo.configure.recommendations import Choice
from lightning_grpo.configure.workload import Workload
from lightning_grpo.devices import Hardware


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A complete run: its choices with their reasons, and the predicted memory, time and cost."""

    task: str
    preset: str
    model: str
    revision: str | None
    hardware: Hardware
    workload: Workload
    choices: dict[str, Choice]
    """By option name."""
    memory: Memory
    cost: Cost
    max_steps: int
    memory_savers: tuple[str, ...]
    """What was changed to make the run fit."""
    prompts: str | None
    columns: dict[str, str]
    reward: str | None
    prompt_statistics: PromptStatistics | None
    budget_hours: float | None
    notes: tuple[str, ...] = ()

    @property
    def hours(self) -> float:
        """Wall-clock hours of the whole run."""
        return self.cost.total / self.workload.updates_per_rollout * self.max_steps / 3600

    @property
    def device_hours(self) -> float:
        """Hours of all devices together."""
        return self.hours * self.workload.ranks

    @property
    def tokens(self) -> float:
        """Tokens sampled in the whole run."""
        return self.cost.generated_tokens * self.max_steps / self.workload.updates_per_rollout
