"""GRPO (Shao et al. 2024, arXiv:2402.03300) as a LightningModule: the algorithm on one page.

One batch of prompts arrives ``steps_per_rollout`` times in a row. At its first arrival its completions are sampled,
rewarded and scored; each arrival then trains on one micro-batch of them::

    on_train_batch_start   rollout → compute_rewards → compute_advantages → score      once a rollout
    training_step          log-probs → compute_loss                                    once a micro-batch

Lightning accumulates, clips, steps, schedules, validates and saves, each with its own meaning. A subclass overrides
`rollout`, `compute_rewards`, `compute_advantages` or `compute_loss`.

Shapes: B prompts and N = B·G completions on this rank, n of them in a micro-batch, R rewards, T completion length.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, distributed
from torch.optim import Optimizer

from lightning_grpo.data import Prompt, PromptBatch
from lightning_grpo.errors import NonFiniteError, RunError, UserError
from lightning_grpo.metrics import Max, Mean, Metric, Window
from lightning_grpo.monitor.observe import memory_in_use, observe_completions, observe_rewards
from lightning_grpo.objective import AdvantageConfig, Coefficients, ObjectiveConfig, kl_penalty, policy_loss
from lightning_grpo.ranges import check_ranges
from lightning_grpo.rewards.check import check_rows
from lightning_grpo.rollout import Rollout
from lightning_grpo.rollout_module import RolloutModule
from lightning_grpo.training.ahead import Ahead
from lightning_grpo.training.batching import check_batch_arithmetic
from lightning_grpo.training.experience import Experience, cut_windows, redistribute
from lightning_grpo.training.position import Position

log = logging.getLogger(__name__)


class GRPOModule(RolloutModule):
    """Trains a policy with GRPO.

    Args:
        micro_batch_size: completions in one forward and backward pass on one rank. Memory follows it; the gradient
            does not, as long as trainer.accumulate_grad_batches makes up for it.
        num_iterations: passes over each rollout (μ).
        objective: the loss.
        advantage: from rewards to advantages.
        kwargs: those of `RolloutModule`.
    """

    def __init__(
        self,
        *args: Any,
        micro_batch_size: int = 8,
        num_iterations: int = 1,
        objective: ObjectiveConfig = ObjectiveConfig(),
        advantage: AdvantageConfig = AdvantageConfig(),
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        check_ranges(locals(), {"micro_batch_size": "[1, inf)", "num_iterations": "[1, inf)"})
        if self.rollout_ahead and objective.rollout_correction is None:
            raise UserError(
                "rollout_ahead is 1, so that samples come from an older policy than the one they train, and "
                "objective.rollout_correction is not set, which makes up for it; set it, for example to "
                "{level: token, mode: truncate, upper: 2}, or rollout_ahead to 0"
            )
        self.micro_batch_size = micro_batch_size
        self.num_iterations = num_iterations
        if objective.max_completion_length is None:
            objective = replace(objective, max_completion_length=self.max_completion_length)
        self.objective = objective
        self.advantage = advantage
        self._begin_anew()

    def _begin_anew(self) -> None:
        """The state of a run that has not begun."""
        self.coefficients = Coefficients(self.objective)
        self.num_tokens = 0
        self.completion_tokens = 0
        self.in_optimizer = False
        self._schedule_due = False
        self._logged: set[str] = set()
        self._begin_between_rollouts()

    def _begin_between_rollouts(self) -> None:
        """Nothing is left of the last rollout."""
        self.experience: Experience | None = None
        self.micro_batches: list[list[int]] = []
        self.micro_step = 0
        self.stepped = 0
        self.stepped_at = 0
        self.finished = -1
        self.ahead = None

    # ── The four hooks to override ────────────────────────────────────────────────────────────────────────────────

    # rollout(batch) → N completions is RolloutModule's
    # compute_rewards(rollout, batch) → [N, R] is PolicyModule's: held-out prompts are judged by it too

    def compute_advantages(self, rewards: Tensor, rollout: Rollout) -> Tensor:
        """From rewards [N, R] to advantages [N]; a KL in the reward comes as a last column. Batch statistics are taken
        over all ranks."""
        lengths = rollout.completion_mask.sum(1)
        weights = torch.nn.functional.pad(self.reward_weights, (0, rewards.shape[1] - len(self.rewards)), value=1.0)
        if not self.advantage.spans_batch:
            return self.advantage(rewards, self.num_generations, weights=weights, lengths=lengths)
        rewards, lengths = (self.all_gather(x.to(self.device)).view(-1, *x.shape[1:]).cpu() for x in (rewards, lengths))
        advantages = self.advantage(rewards, self.num_generations, weights=weights, lengths=lengths)
        return advantages.view(self.trainer.world_size, -1)[self.trainer.global_rank]

    def compute_loss(
        self, logprobs: Tensor, entropy: Tensor, experience: Experience, *, num_tokens: float, num_sequences: float
    ) -> tuple[Tensor, dict[str, Metric]]:
        """The loss of one micro-batch and what to log of it.

        Args:
            logprobs: [n, T] of the policy, with gradient.
            entropy: [n, T] of the policy.
            experience: the micro-batch's n rows.
            num_tokens: tokens in the loss of the whole optimizer step, on all ranks, a micro-batch.
            num_sequences: sequences of the whole optimizer step a micro-batch. Above n where some were skipped.
        """
        return policy_loss(
            self.coefficients.config,
            logprobs=logprobs,
            advantages=experience.advantages,
            mask=self.objective.loss_mask(experience.completion_mask, experience.truncated),
            old_logprobs=experience.old_logprobs,
            ref_logprobs=experience.ref_logprobs,
            rollout_logprobs=experience.rollout_logprobs,
            entropy=entropy,
            num_tokens=num_tokens,
            num_sequences=num_sequences,
        )

    # ── The loop ──────────────────────────────────────────────────────────────────────────────────────────────────

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> None:
        """Make experience where none is left; open a window where an optimizer step begins."""
        super().on_train_batch_start(batch, batch_idx)
        begins = self.micro_step % self.trainer.accumulate_grad_batches == 0
        if begins:
            self.window = Window()
            for phase in ("sync", "rollout", "reward", "score"):
                self.window.seconds(phase, 0.0)
        if self.experience is None:
            self.make_experience(batch)
        elif batch.rollout != self.experience.number:
            raise RunError(
                f"the loader went on to other prompts at micro-batch {self.micro_step} of {len(self.micro_batches)}: "
                "the rest of the rollout would be lost. A train loader yields each batch steps_per_rollout times, as "
                "PromptDataModule's does; leave trainer.limit_train_batches at 1.0"
            )
        elif begins:
            self.update_in_flight()
        if not self.micro_batches:
            self.prepare()
        if begins:
            self.open_window()

    def make_experience(self, batch: PromptBatch) -> None:
        """Sample and reward one rollout."""
        self.rollout_number = batch.rollout
        rollout, rewards = self.sample(batch)
        if self.rollout_ahead and not self.ends_with(batch):
            self.sample_ahead()
        age = int((self.trainer.global_step - rollout.versions)[rollout.completion_mask].amax())
        if age > (oldest := self.rollout_ahead * self.updates_per_rollout):
            raise RunError(
                f"tokens of rollout {batch.rollout} are {age} optimizer steps old, and {oldest} is the most that "
                f"rollout_ahead = {self.rollout_ahead} allows: the engine was not synced in time; nothing was trained "
                "on them"
            )
        everything = self.cut(rollout, skip=False)
        own = reference = None
        with self.window.timed("score"):
            if self.objective.kl_in_reward:
                reference = self.score_reference(rollout, everything)
                # one rollout ahead, an older policy sampled: its log-probs are the engine's
                own = None if self.rollout_ahead else self.score(self.policy, rollout, everything)
        judged = rewards if reference is None else self.with_kl(rewards, rollout, own, reference)
        self.micro_batches = []
        self.experience = Experience(
            **vars(rollout),
            number=batch.rollout,
            rewards=rewards,
            advantages=self.compute_advantages(judged, rollout),
            ref_logprobs=reference,
        )
        self.prepare(own, everything)

    def prepare(self, logprobs: Tensor | None = None, scored: list[list[int]] | None = None) -> None:
        """Cut the rollout into micro-batches, and score on them what the objective needs and is not there yet.

        Args:
            logprobs: [N, T] that the policy gave on the micro-batches ``scored``. None if it has not scored them.
            scored: as `cut` gives them.
        """
        experience = self.experience
        one_pass = self.cut(experience, skip=self.skips_rows)
        updates = len(one_pass) // self.trainer.accumulate_grad_batches
        with self.window.timed("score"):
            if experience.old_logprobs is None and self.objective.needs_old_logprobs(updates * self.num_iterations):
                is_scored = logprobs is not None and one_pass == scored
                experience.old_logprobs = logprobs if is_scored else self.score(self.policy, experience, one_pass)
            if experience.ref_logprobs is None and self.objective.kl_in_loss:
                experience.ref_logprobs = self.score_reference(experience, one_pass)
        self.micro_batches = one_pass * self.num_iterations

    def with_kl(self, rewards: Tensor, rollout: Rollout, logprobs: Tensor | None, ref_logprobs: Tensor) -> Tensor:
        """``rewards`` [N, R] and −β·KL to the reference as one more column.

        Args:
            rewards: [N, R].
            rollout: N completions.
            logprobs: [N, T] of the policy that sampled; None takes the engine's. A token that the engine could not
                score adds nothing.
            ref_logprobs: [N, T].
        """
        if logprobs is None:
            logprobs = torch.where(rollout.rollout_logprobs.isnan(), ref_logprobs, rollout.rollout_logprobs)
        penalty = kl_penalty(
            logprobs,
            ref_logprobs,
            rollout.completion_mask,
            beta=self.coefficients.beta,
            estimator=self.objective.resolved.kl_estimator,
        )
        # a completion that no reward applies to stays without one
        penalty = penalty.masked_fill(rewards.isnan().all(1), torch.nan)
        return torch.cat([rewards, -penalty[:, None]], dim=1)

    def cut(self, rollout: Rollout, *, skip: bool) -> list[list[int]]:
        """The micro-batches of one pass; with ``skip`` without the rows of an `Experience` that have no advantage."""
        accumulate = self.trainer.accumulate_grad_batches
        return cut_windows(
            rollout,
            windows=len(rollout) // (accumulate * self.micro_batch_size),
            accumulate=accumulate,
            micro_batch_size=self.micro_batch_size,
            skip_zero_advantage=skip,
        )

    skips_zero_advantage: bool | None = None
    """Whether completions without an advantage may be left out of the update. None: if the objective allows it and
    `compute_loss` is not overridden. A subclass whose loss has no use for them may set True."""

    @property
    def skips_rows(self) -> bool:
        """`skips_zero_advantage`, decided."""
        if self.skips_zero_advantage is not None:
            return self.skips_zero_advantage
        return self.objective.skips_zero_advantage and not self.loss_is_overridden

    @property
    def loss_is_overridden(self) -> bool:
        """Whether a subclass has a loss of its own, of which nothing is known."""
        return type(self).compute_loss is not GRPOModule.compute_loss

    def ends_with(self, batch: PromptBatch) -> bool:
        """Whether training ends with this rollout, as far as max_steps and max_epochs tell."""
        trainer = self.trainer
        done = trainer.fit_loop.epoch_loop.batch_progress.current.processed
        last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= trainer.max_epochs
        if last_epoch and done + self.steps_per_rollout >= trainer.num_training_batches:
            return True
        return -1 < trainer.max_steps <= trainer.global_step + self.updates_per_rollout

    def open_window(self) -> None:
        """Count the tokens of the optimizer step that begins, and log its samples."""
        size = self.trainer.accumulate_grad_batches * self.micro_batch_size
        start = self.micro_step * self.micro_batch_size % len(self.experience)
        rows = slice(start, start + size)
        experience = self.experience
        mask, truncated = experience.completion_mask[rows], experience.truncated[rows]
        observe_completions(self.window, mask.sum(1), truncated)
        observe_rewards(self.window, experience.rewards[rows], self.reward_names, self.reward_weights)
        age = (self.trainer.global_step - experience.versions[rows])[mask]
        self.window.mean("staleness", age)
        self.window.add({"staleness_max": Max(age.amax())})
        counts = [self.objective.loss_mask(mask, truncated).sum(), mask.sum(), experience.prompt_mask[rows].sum()]
        counts = self.trainer.strategy.reduce(torch.stack(counts).to(self.device), reduce_op="sum")
        self.loss_tokens, self.window_tokens, self.window_prompt_tokens = counts.tolist()

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        """The loss of the next micro-batch."""
        experience = self.experience.rows(self.micro_batches[self.micro_step], self.device)
        counted = self.without_fillers(experience) if self.skips_rows else experience
        sizes = {
            "num_tokens": self.loss_tokens / (self.trainer.accumulate_grad_batches * self.data_ranks),
            "num_sequences": self.micro_batch_size,
        }
        coefficient = self.coefficient_ahead(counted, sizes)
        with self.seeded(self.micro_step % (len(self.micro_batches) // self.num_iterations)):
            logprobs, entropy = self.logprobs(
                self.policy, experience, entropy_grad=self.objective.needs_entropy_grad, coefficient=coefficient
            )
        loss, metrics = self.compute_loss(logprobs, entropy, counted, **sizes)
        self.window.add(metrics)
        self.window.add({"loss": Mean(loss.detach(), torch.tensor(1))})
        self.micro_step += 1
        return loss

    def without_fillers(self, experience: Experience) -> Experience:
        """``experience`` with no tokens in the rows that only fill a micro-batch which would be empty: they add nothing
        to the gradient, and nothing to metrics."""
        matters = (experience.advantages != 0).view(len(experience), -1).any(1, keepdim=True)
        return replace(experience, completion_mask=experience.completion_mask & matters)

    def coefficient_ahead(self, experience: Experience, sizes: dict[str, float]) -> Tensor | None:
        """∂loss/∂log-prob [n, T] before the forward pass, if the log-probs have no part in it (ratio 1, no KL).

        The kernel finds the head's gradients in the forward pass with it, and compares it with the true gradient in the
        backward. It is taken at the engine's log-probs, which those of the policy are near, and a little beside them:
        a surrogate may look at the log-probs themselves, as DPPO's trust region does.
        """
        if self.loss_is_overridden or experience.old_logprobs is not None or not self.objective.constant_on_policy:
            return None
        near = experience.rollout_logprobs.nan_to_num()
        here, beside = (self._loss_gradient(logprobs, experience, sizes) for logprobs in (near, near - 0.01))
        return here if torch.allclose(here, beside, rtol=1e-5, atol=0) else None

    def _loss_gradient(self, logprobs: Tensor, experience: Experience, sizes: dict[str, float]) -> Tensor:
        """∂loss/∂log-prob [n, T] at ``logprobs``, without the entropy."""
        with torch.enable_grad():
            logprobs = logprobs.detach().requires_grad_()
            loss, _ = self.compute_loss(logprobs, torch.zeros_like(logprobs), experience, **sizes)
            return torch.autograd.grad(loss, logprobs)[0]

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Measure the gradient before it is clipped, and stop before a broken one reaches the weights."""
        if self.micro_step % self.trainer.accumulate_grad_batches:
            raise RunError(
                f"an optimizer step was due after {self.micro_step % self.trainer.accumulate_grad_batches} of its "
                f"{self.trainer.accumulate_grad_batches} micro-batches, as the epoch ended early: its gradient would "
                "be that of fewer samples. Leave trainer.limit_train_batches at 1.0"
            )
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if not norm.isfinite():
            self.stop_unless_scaled_down(float(norm))
        self.window.mean("grad_norm", norm)
        self.grad_norm = float(norm)
        self.in_optimizer = True

    def stop_unless_scaled_down(self, norm: float) -> None:
        """Raise for a gradient that is not finite, unless 16-mixed may have scaled the loss too far: its scaler then
        leaves the step out and halves the scale."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        loss = self.window.metrics["loss"].value
        # the gradient is that of all ranks, the loss this rank's
        broken = self.trainer.strategy.reduce_boolean_decision(not bool(loss.isfinite()), all=False)
        if scaler is not None and not broken and scaler.get_scale() >= 1:
            return
        what = f"the loss is {float(loss)}" if broken else f"the gradient's norm is {norm}"
        scale = "" if scaler is None else f", with the loss scaled by {scaler.get_scale():g},"
        raise NonFiniteError(
            f"{what} at optimizer step {self.trainer.global_step}{scale}: the step was not taken and the weights are "
            "those of before. Look at the last logged ratios and log-prob differences; a lower learning rate, "
            "trainer.gradient_clip_val or precision bf16-mixed are the usual cures"
        )

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm that is known already. Lightning would compute it again, and refuse fused optimizers."""
        if gradient_clip_algorithm == "value" or not gradient_clip_val:
            return super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        scale = gradient_clip_val / (self.grad_norm + 1e-6)
        if scale < 1:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.mul_(scale)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then log what the step saw: true means over its micro-batches and over all ranks."""
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        super().optimizer_step(*args, **kwargs)
        # Lightning would keep them until the next backward pass, through all of the next rollout.
        self.trainer.optimizers[0].zero_grad()
        self.commit()
        self.window.stop_clock()
        self.window.add({"memory/gib": Max(torch.tensor(memory_in_use(self.device), dtype=torch.float64))})
        values = (
            self.window.reduce()
            | self.coefficients.adaptive
            | {
                "learning_rate": rate,
                "num_tokens": float(self.num_tokens),
                "completion_tokens": float(self.completion_tokens),
            }
        )
        self.coefficients.step(kl=values.get("kl"), entropy=values.get("entropy"))
        values["tokens_per_second"] = self.window_tokens / values["step_time"]
        # Lightning repeats the last value of what is not logged; what has no value in this step says so
        self._logged |= values.keys()
        values = dict.fromkeys(self._logged, float("nan")) | values
        self.log_dict(values)

    def commit(self) -> None:
        """An optimizer step is done: what came before it is not needed again."""
        self.in_optimizer = False
        self.steps = self.trainer.global_step + 1
        if self.micro_step * self.num_iterations <= len(self.micro_batches):
            # in later passes over the rollout they are not new
            self.num_tokens += self.window_tokens + self.window_prompt_tokens
        self.completion_tokens += self.window_tokens
        self.stepped, self.stepped_at = self.micro_step, self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        if self.micro_step == len(self.micro_batches):
            self.finished = self.experience.number
            self.experience, self.micro_step, self.stepped = None, 0, 0

    # ── Sizes ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def needs_reference(self) -> bool:
        """Whether the objective looks at the reference (β is not 0)."""
        return self.objective.needs_reference

    @property
    def data_ranks(self) -> int:
        """Ranks with prompts of their own; tensor-parallel ranks share theirs."""
        return self.trainer.distributed_sampler_kwargs["num_replicas"] if self.trainer.world_size > 1 else 1

    @property
    def steps_per_rollout(self) -> int:
        """Micro-batches that each rank trains on for one rollout; the loader repeats a batch as often."""
        completions = self.trainer.datamodule.prompts_per_rollout * self.num_generations
        return completions * self.num_iterations // (self.data_ranks * self.micro_batch_size)

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps for one rollout."""
        return self.steps_per_rollout // self.trainer.accumulate_grad_batches

    def setup(self, stage: str) -> None:
        """Before a weight is read, check batch arithmetic, and that checkpoints fall between optimizer steps."""
        super().setup(stage)
        if stage != "fit":
            self._check_rows(getattr(self.trainer.datamodule, "validation", ()))
            return
        if self.trainer.datamodule is None:
            raise UserError("fit was given no data module; pass datamodule=PromptDataModule(...), or a subclass of it")
        if self.trainer.overfit_batches:
            raise UserError(
                f"trainer.overfit_batches is {self.trainer.overfit_batches}, which repeats a loader's first batches; "
                "prompts come from an endless order instead: leave it at 0, and to train on the same few prompts over "
                "and over set data.size to data.prompts_per_rollout"
            )
        if self.trainer.fast_dev_run:
            # that many optimizer steps: Lightning's micro-batches would end inside the first one
            self.trainer.limit_train_batches = self.trainer.fast_dev_run * self.trainer.accumulate_grad_batches
        check_batch_arithmetic(
            prompts_per_rollout=self.trainer.datamodule.prompts_per_rollout,
            num_generations=self.num_generations,
            micro_batch_size=self.micro_batch_size,
            accumulate_grad_batches=self.trainer.accumulate_grad_batches,
            num_iterations=self.num_iterations,
            ranks=self.data_ranks,
        )
        self._check_rows([*self.trainer.datamodule.train, *self.trainer.datamodule.validation])
        if self.trainer.global_step == 0:
            self._begin_anew()
        else:
            self._go_on_without_checkpoint()

    def _check_rows(self, prompts: Sequence[Prompt]) -> None:
        check_rows(self.rewards, [prompt.columns for prompt in prompts], [prompt.place for prompt in prompts])

    # ── Resuming ──────────────────────────────────────────────────────────────────────────────────────────────────

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the rest of the rollout, of every rank; seeds and order follow from the data's position.

        Inside an optimizer step, whose gradients no checkpoint holds, the step is left to be taken again as a whole.
        """
        super().on_save_checkpoint(checkpoint)
        data = self.trainer.datamodule
        if data is None or not data.state_dict():
            return
        if self.in_optimizer:
            raise RunError(
                "a checkpoint can't be saved while the optimizer changes the weights; save it after the step"
            )
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        # Lightning counts an optimizer step, and moves its schedule, only some lines after the step was taken
        uncounted = progress.total.processed < progress.total.ready == self.stepped_at
        if uncounted:
            unfinished = 0
        elif self.micro_step != self.stepped:
            unfinished = (progress.current.ready - 1) % self.trainer.accumulate_grad_batches + 1
        else:
            unfinished = progress.total.ready - progress.total.processed
        position = Position.of(
            self.trainer, unfinished=unfinished, steps=self.steps if uncounted else self.trainer.global_step
        )
        checkpoint[type(data).__qualname__] = data.state_dict(unfinished, draw_again=self.experience is None)
        following = (self.experience.number if self.experience else self.finished) + 1
        ahead = self.ahead if self.ahead and self.ahead.number == following else None
        mine = {"ahead": ahead and ahead.state_dict(wait=not self.trainer.interrupted)}
        if self.experience is not None:
            mine |= {"experience": vars(self.experience), "micro_batches": self.micro_batches}
        ranks = [mine]
        if self.trainer.world_size > 1:
            ranks = [None] * self.trainer.world_size
            distributed.all_gather_object(ranks, mine)
        checkpoint["global_step"], checkpoint["epoch"] = position.steps, position.epoch
        checkpoint["grpo"] = {
            "ranks": ranks,
            "layout": self._layout(),
            "position": position.state_dict(),
            "micro_step": self.stepped,
            "schedule_due": uncounted,
            "num_tokens": self.num_tokens,
            "completion_tokens": self.completion_tokens,
            "coefficients": self.coefficients.state_dict(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """In `fit`, go on with the very micro-batch that was next. Elsewhere, the weights are all that is taken."""
        super().on_load_checkpoint(checkpoint)
        if self._trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        if "grpo" not in checkpoint:
            raise UserError(
                "the checkpoint was saved outside of fit and holds weights alone: no run can go on from it; name one "
                "that fit saved"
            )
        self._begin_anew()
        state, now = checkpoint["grpo"], self._layout()
        self.num_tokens = state["num_tokens"]
        self.completion_tokens = state["completion_tokens"]
        self._schedule_due = state["schedule_due"]
        self.coefficients.load_state_dict(state["coefficients"])
        position = Position.from_state_dict(state["position"])
        if state["layout"] != now:
            factor = _micro_batches_a_prompt(now) / _micro_batches_a_prompt(state["layout"])
            position = position.scaled(factor, multiple=self.trainer.accumulate_grad_batches)
        position.write(checkpoint, self.trainer)
        ranks = state["ranks"]
        if "experience" in ranks[0]:
            self._take_up_rollout(state)
        ahead = [held["ahead"] for held in ranks]
        rank = self.trainer.global_rank
        fits = all(state["layout"][name] == now[name] for name in ("ranks", *FIXED_IN_A_ROLLOUT[:2]))
        if self.rollout_ahead and all(ahead) and fits:
            self.ahead = Ahead.from_state_dict(ahead[rank])
            self.finished = self.ahead.number - 1
        elif any(ahead):
            log.warning("the rollout that the checkpoint holds sampled ahead doesn't fit this run; it is sampled again")

    def _take_up_rollout(self, state: dict[str, Any]) -> None:
        """Go on inside a rollout, in other micro-batches or on another number of ranks where these were changed."""
        was, now = state["layout"], self._layout()
        changed = [f"{name} {was[name]} → {now[name]}" for name in FIXED_IN_A_ROLLOUT if was[name] != now[name]]
        if changed:
            raise UserError(
                f"the checkpoint was saved in the middle of a rollout and {', '.join(changed)} since: the rest of the "
                "rollout can't be trained on. Resume with the earlier values, or from a checkpoint between two rollouts"
            )
        rank = self.trainer.global_rank
        held = [Experience(**mine["experience"]) for mine in state["ranks"]]
        self.rollout_number = held[0].number
        if was == now:
            self.experience, self.micro_batches = held[rank], state["ranks"][rank]["micro_batches"]
            self.micro_step = self.stepped = state["micro_step"]
            return
        trained = state["micro_step"] * was["micro_batch_size"] * was["ranks"]
        window = now["micro_batch_size"] * now["ranks"] * now["trainer.accumulate_grad_batches"]
        if trained % window:
            raise UserError(
                f"the checkpoint was saved in the middle of a rollout, after optimizer steps on {trained} of its "
                f"completions; {trained} can't be divided into steps of micro_batch_size {now['micro_batch_size']} × "
                f"trainer.accumulate_grad_batches {now['trainer.accumulate_grad_batches']} × {now['ranks']} ranks = "
                f"{window} completions. Set them so that a step takes as many as before, "
                f"{was['micro_batch_size'] * was['ranks'] * was['trainer.accumulate_grad_batches']}, or resume from a "
                "checkpoint between two rollouts"
            )
        # the micro-batches are cut anew when training starts, once weights are there to score with
        self.experience = redistribute(held, now["ranks"], self.num_generations)[rank]
        self.micro_step = self.stepped = trained // (now["micro_batch_size"] * now["ranks"])

    def _go_on_without_checkpoint(self) -> None:
        """Begin a further `fit` of the same trainer, which may have stopped anywhere, at the last optimizer step."""
        self.in_optimizer = False
        number = self.experience.number if self.experience else None
        if self.trainer.datamodule.serve_again(number, self.stepped):
            self.micro_step = self.stepped
        else:
            self._begin_between_rollouts()

    def on_train_start(self) -> None:
        """Move the schedule for a step that was taken and not yet counted when the checkpoint was saved."""
        super().on_train_start()
        if self.engine is None:
            raise UserError(
                "no engine was attached: samples come from a callback such as HFRollout, and trainer.callbacks holds "
                "none. Lightning's Tuner takes the callbacks away while it searches, so that lr_find and "
                "scale_batch_size can't be used; lightning-grpo configure chooses a learning rate and a batch size"
            )
        if self._schedule_due:
            self._schedule_due = False
            for config in self.trainer.lr_scheduler_configs:
                if config.interval == "step" and not config.reduce_on_plateau:
                    self.lr_scheduler_step(config.scheduler, None)

    def _layout(self) -> dict[str, int]:
        """What decides how a rollout is divided into micro-batches."""
        return {
            "data.prompts_per_rollout": self.trainer.datamodule.prompts_per_rollout,
            "num_generations": self.num_generations,
            "num_iterations": self.num_iterations,
            "ranks": self.trainer.world_size,
            "micro_batch_size": self.micro_batch_size,
            "trainer.accumulate_grad_batches": self.trainer.accumulate_grad_batches,
        }


FIXED_IN_A_ROLLOUT = ("data.prompts_per_rollout", "num_generations", "num_iterations")
"""What can't change while a rollout is trained on; the rest of a layout can."""


def _micro_batches_a_prompt(layout: dict[str, int]) -> Fraction:
    """Micro-batches of one rank for each prompt of a rollout."""
    completions = layout["num_generations"] * layout["num_iterations"]
    return Fraction(completions, layout["micro_batch_size"] * layout["ranks"])
