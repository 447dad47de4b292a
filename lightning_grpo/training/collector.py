"""One rollout and its rewards: synchronize the engine, sample, score, and replace groups without any advantage.

With ``rollout_ahead`` the next rollout is sampled in the background meanwhile.

Shapes: B prompts, G generations, N = B·G completions on this rank, R rewards.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from lightning import Trainer
from torch import Tensor

from lightning_grpo.data import PromptBatch
from lightning_grpo.errors import RunError
from lightning_grpo.metrics import Total, Window
from lightning_grpo.monitor.observe import observe_groups
from lightning_grpo.objective import total_rewards
from lightning_grpo.rollout import Rollout, SyncedEngine
from lightning_grpo.stopping import abandonable
from lightning_grpo.training.pending import PendingRollout


class RolloutHooks(Protocol):
    """What `Collector` asks of the module."""

    trainer: Trainer
    engine: SyncedEngine | None

    def rollout(self, batch: PromptBatch) -> Rollout: ...
    def compute_rewards(self, rollout: Rollout, batch: PromptBatch) -> Tensor: ...
    def contributions(self, rewards: Tensor) -> Tensor: ...


class Collector:
    """Collects rollouts and their rewards with the module's hooks ``rollout`` and ``compute_rewards``.

    Args:
        module: the hooks, the engine and the trainer.
        num_generations: completions per prompt (G).
        pass_threshold: a completion is right if its first reward is at least this value.
        resampling_rounds: how many times groups whose rewards are all equal are replaced.
        in_flight_updates: send the weights to the engine after every optimizer step while it samples.
    """

    def __init__(
        self,
        module: RolloutHooks,
        *,
        num_generations: int,
        pass_threshold: float,
        resampling_rounds: int,
        in_flight_updates: bool,
    ) -> None:
        self.module = module
        self.num_generations = num_generations
        self.pass_threshold = pass_threshold
        self.resampling_rounds = resampling_rounds
        self.in_flight_updates = in_flight_updates
        self.pending: PendingRollout | None = None

    def collect(self, batch: PromptBatch, window: Window) -> tuple[Rollout, Tensor]:
        """N completions of the batch's B prompts and their rewards [N, R].

        Groups whose rewards are all equal are replaced by groups of further prompts, up to ``resampling_rounds`` times.
        """
        G, trainer = self.num_generations, self.module.trainer
        rollout, rewards = self._sample(batch, window)
        if G > 1:
            right = rewards[:, 0] >= self.pass_threshold
            observe_groups(window, self._totals(rewards).view(-1, G), right.view(-1, G))
        for _ in range(self.resampling_rounds):
            flat = flat_groups(self._totals(rewards), G).nonzero().flatten().tolist()
            count = torch.tensor(len(flat), device=trainer.strategy.root_device)
            missing = int(trainer.strategy.reduce(count, reduce_op="sum"))
            further = trainer.datamodule.more_prompts(missing) if missing else None
            if not further:
                break
            others, other_rewards = self._sample(further, window)
            mixed = (~flat_groups(self._totals(other_rewards), G)).nonzero().flatten().tolist()
            rollout, rewards = replace_groups(
                (rollout, rewards), flat[: len(mixed)], (others, other_rewards), mixed[: len(flat)], G
            )
        return rollout, rewards

    def _sample(self, batch: PromptBatch, window: Window) -> tuple[Rollout, Tensor]:
        module, trainer = self.module, self.module.trainer
        if self.pending is not None:
            self.sync_in_flight(window)
            with window.timed("rollout"), abandonable(trainer):
                rollout, self.pending = self.pending.take(batch), None
        else:
            with window.timed("sync"):
                module.engine.sync()
            with window.timed("rollout"), abandonable(trainer):
                rollout = module.rollout(batch)
        rollout.sources = [row.source for row in batch.rows for _ in range(self.num_generations)]
        with window.timed("reward"), abandonable(trainer):
            rewards = module.compute_rewards(rollout, batch)
        rollout.early_rewards = None  # ``rewards`` contains them
        window.log(rollout.reward_metrics)
        rollout.reward_metrics = {}
        window.add({"rollout_tokens": Total(rollout.completion_mask.sum())})
        trainer.datamodule.observe(batch.prompt_indices, self._totals(rewards).view(len(batch), -1).nanmean(1))
        return rollout, rewards

    def _totals(self, rewards: Tensor) -> Tensor:
        """[N]: the weighted sums of ``rewards`` [N, R]."""
        return total_rewards(self.module.contributions(rewards))

    # ── One rollout ahead ─────────────────────────────────────────────────────────────────────────────────────────

    def start_next(self, window: Window) -> None:
        """Sample the next rollout in the background, with the policy's current weights."""
        module = self.module
        batch = module.trainer.datamodule.next_prompts()
        with window.timed("sync"):
            future = module.engine.run_in_background(lambda: module.rollout(batch))
        self.pending = PendingRollout(number=batch.rollout_number, prompt_indices=batch.prompt_indices, future=future)

    def sync_in_flight(self, window: Window) -> None:
        """With ``in_flight_updates``, send the newest weights to the engine if it is still sampling on any rank."""
        is_sampling = self.pending is not None and not self.pending.future.done()
        if self.in_flight_updates and self.module.trainer.strategy.reduce_boolean_decision(is_sampling, all=False):
            with window.timed("sync"):
                self.module.engine.sync(in_flight=True)


def require_recent(rollout: Rollout, *, step: int, limit: int) -> None:
    """Check that no token was sampled more than ``limit`` optimizer steps before ``step``.

    Raises:
        RunError: the engine was not synchronized in time.
    """
    age = int((step - rollout.versions)[rollout.completion_mask].amax())
    if age > limit:
        raise RunError(
            f"the rollout contains tokens that are {age} optimizer steps old, and rollout_ahead allows at most "
            f"{limit}: the engine was not synchronized in time. The policy was not trained on them; resume from the "
            "last checkpoint"
        )


def flat_groups(totals: Tensor, num_generations: int) -> Tensor:
    """[B] bool: which groups of ``totals`` [N] have no spread. A total of NaN (no reward applied) is ignored."""
    groups = totals.view(-1, num_generations)
    low = groups.nan_to_num(nan=float("inf")).amin(1)
    high = groups.nan_to_num(nan=float("-inf")).amax(1)
    return ~(high > low)


def replace_groups(
    into: tuple[Rollout, Tensor], places: Sequence[int], source: tuple[Rollout, Tensor], taken: Sequence[int], G: int
) -> tuple[Rollout, Tensor]:
    """Replace the groups ``places`` of ``into`` by the groups ``taken`` of ``source``.

    ``into`` and ``source`` are each a rollout and its rewards [N, R].
    """
    if not places:
        return into
    (rollout, rewards), (other, other_rewards) = into, source
    N = len(rewards)
    order = torch.arange(N).view(-1, G)
    order[list(places)] = N + torch.arange(len(other_rewards)).view(-1, G)[list(taken)]
    return rollout.join(other).rows(order.flatten().tolist()), torch.cat([rewards, other_rewards])[order.flatten()]
