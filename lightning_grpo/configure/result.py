"""What planning comes to."""

from dataclasses import dataclass, field

from lightning_grpo.configure.cost import Cost
from lightning_grpo.configure.devices import Hardware
from lightning_grpo.configure.memory import Memory
from lightning_grpo.configure.prompts import PromptStatistics
from lightning_grpo.configure.recommendations import Choice
from lightning_grpo.configure.workload import Workload


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A complete run: its choices with their reasons, and what it will need. `render` makes YAML and tables of it."""

    task: str
    preset: str
    model: str
    hardware: Hardware
    workload: Workload
    choices: dict[str, Choice]
    """By option name; the values are those of the run."""
    memory: Memory
    cost: Cost
    max_steps: int
    levers: tuple[str, ...]
    """What was pulled to make the run fit."""
    prompts: str | None
    reward: str | None
    prompt_statistics: PromptStatistics | None
    budget_hours: float | None
    notes: tuple[str, ...] = field(default=())

    @property
    def step_seconds(self) -> float:
        """Of one optimizer step, its share of the rollout included."""
        return self.cost.total / self.workload.updates_per_rollout

    @property
    def hours(self) -> float:
        """Of the whole run, on the clock."""
        return self.step_seconds * self.max_steps / 3600

    @property
    def device_hours(self) -> float:
        """Of all devices together."""
        return self.hours * self.workload.ranks

    @property
    def tokens(self) -> float:
        """Tokens sampled in the whole run."""
        return self.cost.generated_tokens * self.max_steps / self.workload.updates_per_rollout
