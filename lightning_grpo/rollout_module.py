"""Groups of completions and their rewards: in turn with the update or one rollout ahead, flat groups replaced.

Shapes: B prompts and N = B·G completions on this rank, R rewards.
"""

from typing import Any

import torch
from torch import Tensor

from lightning_grpo.data import PromptBatch
from lightning_grpo.errors import UserError
from lightning_grpo.metrics import Total, Window
from lightning_grpo.monitor.observe import observe_groups
from lightning_grpo.objective import total_rewards
from lightning_grpo.policy_module import PolicyModule
from lightning_grpo.ranges import check_ranges
from lightning_grpo.rollout import Rollout, RolloutCallback
from lightning_grpo.stopping import abandonable
from lightning_grpo.training.ahead import Ahead
from lightning_grpo.training.dynamic_sampling import flat_groups, replace_groups


class RolloutModule(PolicyModule):
    """A policy that samples G completions of each training prompt and has them judged.

    Args:
        num_generations: completions sampled of each prompt (G). At least 2: the advantage is relative to the group.
        resampling_rounds: how often groups whose rewards are all equal, which teach nothing, are replaced by groups of
            further prompts before the update (dynamic sampling, DAPO, arXiv:2503.14476). 0 keeps them: their share is
            logged as frac_reward_zero_std and, where the objective allows, their compute is skipped.
        rollout_ahead: 1 samples the next rollout while the policy trains on this one, from weights that are one rollout
            older than the update. It needs an engine with a device of its own (`VLLMProcessRollout`,
            `VLLMServerRollout`), and objective.rollout_correction, which makes up for the age of the samples. 0 samples
            and trains in turn.
        in_flight_updates: with rollout_ahead, give the engine the weights of every optimizer step while it samples: the
            tokens after that come from them. What is sampled then depends on timing.
        kwargs: those of `PolicyModule`.
    """

    def __init__(
        self,
        *args: Any,
        num_generations: int = 8,
        resampling_rounds: int = 0,
        rollout_ahead: int = 0,
        in_flight_updates: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_ranges(locals(), {"num_generations": "[1, inf)", "resampling_rounds": "[0, inf)"})
        if num_generations < 2:
            raise UserError(
                f"num_generations is {num_generations}: an advantage is relative to its group; set 2 or more"
            )
        if self.sampling.temperature == 0:
            raise UserError(
                "sampling.temperature is 0 (greedy): the completions of a group would all be the same; set 1.0"
            )
        if self.sampling.truncations:
            options = ", ".join(f"sampling.{name} = {value:g}" for name, value in self.sampling.truncations.items())
            raise UserError(
                f"{options}: the engine would sample from another distribution than the one trained, which biases the "
                "gradient; leave it off in training (validation_sampling may have it)"
            )
        if rollout_ahead not in (0, 1):
            raise UserError(f"rollout_ahead is {rollout_ahead}; set 0, or 1 to sample one rollout ahead")
        if in_flight_updates and not rollout_ahead:
            raise UserError("in_flight_updates is true, but rollout_ahead is 0: nothing is in flight; set it to 1")
        self.num_generations = num_generations
        self.resampling_rounds = resampling_rounds
        self.rollout_ahead = rollout_ahead
        self.in_flight_updates = in_flight_updates
        self.ahead: Ahead | None = None
        self.window = Window()

    def rollout(self, batch: PromptBatch) -> Rollout:
        """Sample G completions of each of the batch's B prompts: N rows, those of a prompt next to each other.

        With rollout_ahead it runs in another thread, beside the update.
        """
        return self.generate(batch, self.num_generations, self.sampling, number=batch.rollout)

    def sample(self, batch: PromptBatch) -> tuple[Rollout, Tensor]:
        """Completions and their rewards [N, R]; groups without spread replaced, as far as asked."""
        G, data = self.num_generations, self.trainer.datamodule
        rollout, rewards = self._sample_once(batch)
        observe_groups(self.window, total_rewards(rewards, self.reward_weights), G)
        for _ in range(self.resampling_rounds):
            flat = flat_groups(total_rewards(rewards, self.reward_weights), G).nonzero().flatten().tolist()
            missing = int(self.trainer.strategy.reduce(torch.tensor(len(flat), device=self.device), reduce_op="sum"))
            further = data.more_prompts(missing) if missing else []
            if not len(further):
                break
            found = self._sample_once(further)
            mixed = (~flat_groups(total_rewards(found[1], self.reward_weights), G)).nonzero().flatten().tolist()
            rollout, rewards = replace_groups((rollout, rewards), flat[: len(mixed)], found, mixed[: len(flat)], G)
        return rollout, rewards

    def _sample_once(self, batch: PromptBatch) -> tuple[Rollout, Tensor]:
        if self.ahead is not None:
            self.update_in_flight()
            with self.window.timed("rollout"), abandonable(self.trainer):
                rollout, self.ahead = self.ahead.take(batch), None
        else:
            with self.window.timed("sync"):
                self.engine.sync()
            with self.window.timed("rollout"), abandonable(self.trainer):
                rollout = self.rollout(batch)
        with self.window.timed("reward"), abandonable(self.trainer):
            rewards = self.compute_rewards(rollout, batch)
            rollout.early_rewards = None  # they are among the rewards
        totals = total_rewards(rewards, self.reward_weights)
        self.window.add({"rollout_tokens": Total(rollout.completion_mask.sum())})
        self.trainer.datamodule.observe(batch.prompt_indices, totals.view(len(batch), -1).nanmean(1))
        return rollout, rewards

    def sample_ahead(self) -> None:
        """Let the engine sample the next rollout, with the weights of now."""
        batch = self.trainer.datamodule.next_prompts()
        with self.window.timed("sync"):
            rollout = self.engine.run_in_background(lambda: self.rollout(batch))
        self.ahead = Ahead(number=batch.rollout, prompt_indices=batch.prompt_indices, rollout=rollout)

    def update_in_flight(self) -> None:
        """Give the engine the newest weights, if that is asked for and any rank's is still sampling ahead."""
        samples = self.ahead is not None and not self.ahead.is_sampled
        if self.in_flight_updates and self.trainer.strategy.reduce_boolean_decision(samples, all=False):
            with self.window.timed("sync"):
                self.engine.sync(in_flight=True)

    def on_validation_start(self) -> None:
        """Validation inside an optimizer step is no part of its time."""
        self.window.pause()

    def on_validation_end(self) -> None:
        self.window.go_on()

    def setup(self, stage: str) -> None:
        """Check that the engine can do beside the update what is asked of it."""
        super().setup(stage)
        if stage != "fit":
            return
        for callback in (c for c in self.trainer.callbacks if isinstance(c, RolloutCallback)):
            for name, able in (("rollout_ahead", "runs_in_background"), ("in_flight_updates", "updates_in_flight")):
                if getattr(self, name) and not getattr(callback.engine_class, able):
                    raise UserError(
                        f"{name} is {getattr(self, name)}, but {type(callback).__name__}'s engine works in turn with "
                        "the update; use VLLMProcessRollout or VLLMServerRollout, or leave it off"
                    )
