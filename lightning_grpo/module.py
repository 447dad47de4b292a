"""GRPO (Shao et al. 2024, arXiv:2402.03300) as a LightningModule: the algorithm on one page.

The data module yields each batch of prompts ``steps_per_rollout`` times. The first time, its completions are sampled,
rewarded and scored. Each time, the policy is trained on one micro-batch of them::

    on_train_batch_start   rollout → compute_rewards → compute_advantages → log-probs    once per rollout
    training_step          log-probs → compute_loss                                      once per micro-batch

Lightning accumulates gradients, clips, steps, schedules, validates and saves, each with its usual meaning. A subclass
overrides `rollout`, `compute_rewards`, `compute_advantages` or `compute_loss`.

Shapes: B prompts and N = B·G completions on this rank, n of them in a micro-batch, R rewards, T completion length.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_grpo.data import PromptBatch
from lightning_grpo.environments import Environment
from lightning_grpo.errors import UserError
from lightning_grpo.metrics import Metric, Window
from lightning_grpo.objective import (
    AdvantageConfig,
    Coefficients,
    ObjectiveConfig,
    append_kl,
    on_policy_coefficient,
    policy_loss,
    turn_advantages,
)
from lightning_grpo.policy import LoRA, Pretrained, frozen_copy, shard
from lightning_grpo.policy.attention import NAME as ATTENTION
from lightning_grpo.policy.packable import packs
from lightning_grpo.ranges import check_ranges
from lightning_grpo.rewards import EnvironmentReward, Reward, as_rewards
from lightning_grpo.rewards.gates import check_gates, gated
from lightning_grpo.rollout import Rollout, RolloutCallback, Sampling, SyncedEngine, default_rollout
from lightning_grpo.rollout.callback import eos_token_ids, pad_id
from lightning_grpo.seed import seed_of_run
from lightning_grpo.training import checks, held_out, passes, resume, schedules
from lightning_grpo.training.batching import steps_per_rollout
from lightning_grpo.training.collector import Collector, require_recent
from lightning_grpo.training.evaluation import Evaluation
from lightning_grpo.training.experience import Experience, without_fillers
from lightning_grpo.training.generation import Generation
from lightning_grpo.training.optimizers import Optimization, step_schedule
from lightning_grpo.training.policy import TrainablePolicy
from lightning_grpo.training.progress import Progress
from lightning_grpo.training.scorer import RowsToScore, Scorer
from lightning_grpo.training.step import StepMonitor


class GRPOModule(TrainablePolicy):
    """Train a language model with GRPO.

    Args:
        model: The policy's checkpoint: a local folder or a name on the Hugging Face Hub, or name, revision,
            trust_remote_code and kwargs. In Python also a PreTrainedModel or PeftModel, which is trained in place.
        rewards: Reward functions. A completion's reward is the weighted sum of their values.
        environment: What the policy acts in over several turns, such as tools or a game. An empty list of rewards then
            means those of the environment. By default the policy writes a single completion.
        objective: Loss function
        advantage: Advantage estimation
        num_generations: Completions sampled per prompt (G). Larger groups more often contain both good and bad
            completions, and cost more sampling time. 1 requires an advantage without groups, such as reinforce_pp.
        num_iterations: Number of passes over each rollout (μ). Increase it to reuse samples when sampling dominates the
            time; the updates after the first are then off-policy and depend on the clip range.
        micro_batch_size: Completions per micro-batch on each rank, on average: those with short ones have more. Lower
            it if memory runs out and raise trainer.accumulate_grad_batches as much: the gradient stays the same.
        micro_batch_tokens: Maximum number of tokens per forward and backward pass, prompts and padding included. Larger
            micro-batches are divided into several passes with the same gradient. By default each is one pass.
        max_prompt_length: Maximum number of tokens per prompt. Longer prompts are dropped or rejected, as data.overlong
            specifies.
        max_completion_length: Maximum number of tokens per completion. Raise it if completions/clipped_ratio is above
            0.1.
        sampling: Sampling in training
        validation_sampling: Sampling options for validation, test and predict. By default the same as in training,
            except that no completion is cut off early (cutoff: 1).
        validation_generations: Completions sampled per held-out prompt (k in pass@k).
        pass_threshold: A completion counts as correct if its first reward is at least this value.
        eval_rewards: Further rewards of held-out completions, which are logged and never trained on.
        resampling_rounds: How many times per rollout to replace groups whose rewards are all equal, and which therefore
            carry no gradient, with groups of new prompts (dynamic sampling, DAPO, arXiv:2503.14476). 0 keeps these
            groups; their fraction is logged as frac_reward_zero_std.
        rollout_ahead: 1 samples the next rollout while the policy trains on the current one, so its samples come from
            weights that are one rollout older. This requires an engine that runs beside the update (VLLMProcessRollout
            or VLLMServerRollout) and objective.rollout_correction, which corrects for the older weights. 0 alternates
            sampling and training.
        in_flight_updates: With rollout_ahead: 1, send the weights to the engine after every optimizer step while it
            samples, so that the remaining tokens come from newer weights. The samples then depend on timing and cannot
            be reproduced.
        lora: Train LoRA adapters instead of all weights. Use it if the optimizer state does not fit into memory; set a
            learning rate about ten times as high.
        dtype: Data type of the parameters. Keep float32 together with trainer.precision: bf16-mixed: with bfloat16
            parameters, updates at learning rates of 1e-5 and below are mostly lost to rounding.
        gradient_checkpointing: Recompute activations in the backward pass. Uses less memory and about a third more
            compute.
        share_prompt: Compute each prompt once for all of its completions in a micro-batch. On GPUs it has no effect
            with gradient_checkpointing or FSDP.
        attn_implementation: Attention implementation, by its name in transformers: sdpa, eager, flash_attention_2, …
            The default is sdpa, except on CPUs, where the completions of a micro-batch are one row without padding.
        head_in_float32: Compute the logits in float32 whatever the precision (arXiv:2510.13786). A vLLM engine does the
            same with engine_args: {hf_overrides: {head_dtype: float32}}.
        from_scratch: Initialize the weights at random from the checkpoint's configuration instead of loading them.
        quantization: nf4 stores the linear layers' weights in 4 bits, beside which lora trains adapters (QLoRA).
        optimizer: Optimizer class and its arguments. Set fused: true for torch.optim.AdamW: it is several times faster.
        lr_schedule: Learning rate schedule after the warmup: a name, or the class path of a Schedule with its options,
            such as {class_path: Cosine, init_args: {minimum: 0.1}}. constant lets a run be extended later.
        warmup_steps: Number of optimizer steps over which the learning rate rises from 0 to its value; below 1, their
            share of all optimizer steps.
        decay_norms_and_biases: Apply the optimizer's weight_decay to the weights of norms and to biases too.
        seed: Seed for sampling. It determines all samples of a run, on any number of ranks. By default the value of
            seed_everything, or 0 if that is not set.
    """

    engine: SyncedEngine | None = None
    """Samples from the policy's current weights. A `RolloutCallback` attaches it."""

    skips_zero_advantage: bool | None = None
    """Whether completions without an advantage may be left out of the update. None: if the objective allows it and
    `compute_loss` is not overridden. A subclass whose loss does not use them may set True."""

    keeps_logprobs: bool = False
    """Whether `training_step` keeps its log-probs in the experience, where callbacks find them."""

    rollout_class: type[Rollout] = Rollout
    experience_class: type[Experience] = Experience
    """A subclass whose hook `rollout` returns further columns sets both, to classes that declare them."""

    def __init__(
        self,
        model: str | Pretrained,  # or an object, which has no form on a command line
        rewards: list[Reward],
        *,
        environment: Environment | None = None,
        objective: ObjectiveConfig = ObjectiveConfig(),
        advantage: AdvantageConfig = AdvantageConfig(),
        num_generations: int = 8,
        num_iterations: int = 1,
        micro_batch_size: int = 8,
        micro_batch_tokens: int | None = None,
        max_prompt_length: int = 512,
        max_completion_length: int = 256,
        sampling: Sampling = Sampling(),
        validation_sampling: Sampling | None = None,
        validation_generations: int = 1,
        pass_threshold: float = 1.0,
        eval_rewards: list[Reward] = [],  # noqa: B006  never changed
        resampling_rounds: int = 0,
        rollout_ahead: int = 0,
        in_flight_updates: bool = False,
        lora: LoRA | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        gradient_checkpointing: bool = False,
        share_prompt: bool = True,
        attn_implementation: str = ATTENTION,
        head_in_float32: bool = False,
        from_scratch: bool = False,
        quantization: Literal["nf4"] | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-6, weight_decay=0.0),
        lr_schedule: schedules.Schedule | schedules.Name = "constant",
        warmup_steps: int | float = 0,
        decay_norms_and_biases: bool = True,
        seed: int | None = None,
    ) -> None:
        check_ranges(locals(), RANGES)
        rewards = rewards or (environment.default_rewards if environment is not None else [])
        checks.check_options(
            rewards=rewards,
            num_generations=num_generations,
            needs_groups=advantage.needs_groups and not self.overrides_advantages,
            resampling_rounds=resampling_rounds,
            sampling=sampling,
            rollout_ahead=rollout_ahead,
            in_flight_updates=in_flight_updates,
            objective=objective,
        )
        super().__init__(
            model,
            lora=lora,
            dtype=dtype,
            gradient_checkpointing=gradient_checkpointing,
            attn_implementation=attn_implementation,
            head_in_float32=head_in_float32,
            from_scratch=from_scratch,
            quantization=quantization,
            seed=seed_of_run(seed),
        )
        named = as_rewards([*rewards, *eval_rewards])
        self.rewards, self.eval_rewards = named[: len(rewards)], named[len(rewards) :]
        check_gates(self.rewards, self.eval_rewards)
        self.environment = environment
        checks.check_environment(environment, self.rewards, self.eval_rewards, advantage, sampling, validation_sampling)
        if objective.max_completion_length is None:
            objective = replace(objective, max_completion_length=max_completion_length)
        self.objective = objective
        self.advantage = advantage
        self.num_generations = num_generations
        self.num_iterations = num_iterations
        self.micro_batch_size = micro_batch_size
        self.max_prompt_length = max_prompt_length
        self.max_completion_length = max_completion_length
        self.sampling = sampling
        self.validation_sampling = validation_sampling or replace(sampling, cutoff=1.0)
        self.rollout_ahead = rollout_ahead
        self.share_prompt = share_prompt
        self.optimization = Optimization(
            optimizer,
            lr_schedule=lr_schedule,
            warmup_steps=warmup_steps,
            decay_norms_and_biases=decay_norms_and_biases,
        )
        self.held_out: dict[str, float] = {}

        self.collector = Collector(
            self,
            num_generations=num_generations,
            pass_threshold=pass_threshold,
            resampling_rounds=resampling_rounds,
            in_flight_updates=in_flight_updates,
        )
        self.scorer = Scorer(
            temperature=sampling.temperature, share_prompt=self.share_prompt, seed=self.seed, limit=micro_batch_tokens
        )
        self.progress = Progress(
            num_generations=num_generations, num_iterations=num_iterations, micro_batch_size=micro_batch_size
        )
        self.step_monitor = StepMonitor(num_generations=num_generations, pass_threshold=pass_threshold)
        self.evaluation = Evaluation(num_generations=validation_generations, pass_threshold=pass_threshold)
        self.coefficients = Coefficients(objective)

    # ── The four hooks to override ────────────────────────────────────────────────────────────────────────────────

    def rollout(self, batch: PromptBatch) -> Rollout:
        """Sample G completions of each of the batch's B prompts: N rows, those of a prompt next to each other.

        With rollout_ahead it runs in a background thread during the update.
        """
        return self.generate(batch, self.num_generations, self.sampling, number=batch.rollout_number)

    def compute_rewards(self, rollout: Rollout, batch: PromptBatch) -> Tensor:
        """[N, R] float32: each reward of each completion, NaN if it does not apply. Held-out prompts use it too."""
        return self.generation.compute_rewards(rollout, batch)

    def compute_advantages(self, rewards: Tensor, rollout: Rollout) -> Tensor:
        """Advantages [N], or [N, T] if they differ between the tokens of a completion.

        Args:
            rewards: [N, R], 0 where one that they require is too low. [N, R + 1] with −β·KL in the last column if
                objective.kl_placement is reward.
            rollout: the N completions.
        """
        options: dict[str, Any] = {
            "num_generations": self.num_generations,
            "weights": nn.functional.pad(self.reward_weights, (0, rewards.shape[1] - len(self.rewards)), value=1.0),
        }
        lengths = rollout.completion_mask.sum(1)
        if self.advantage.turn_credit == "return_to_go":
            weight = sum(reward.weight for reward in self.rewards if isinstance(reward, EnvironmentReward))
            turns = {"turn_rewards": rollout.turn_rewards, "turn_weight": weight, "mask": rollout.completion_mask}
            return turn_advantages(self.advantage, rewards, lengths=lengths, **turns, **options)
        if not self.advantage.spans_batch:
            return self.advantage(rewards, lengths=lengths, grad_norms=rollout.grad_norms, **options)
        # statistics of the batch are taken over all ranks
        gather = cast(Callable[[Tensor], Tensor], self.all_gather)  # Lightning's type is that of all collections
        rewards, lengths = (gather(x.to(self.device)).view(-1, *x.shape[1:]).cpu() for x in (rewards, lengths))
        advantages = self.advantage(rewards, lengths=lengths, **options)
        return advantages.view(self.trainer.world_size, -1)[self.trainer.global_rank]

    def compute_loss(
        self, logprobs: Tensor, entropy: Tensor, experience: Experience, *, num_tokens: float, num_sequences: float
    ) -> tuple[Tensor, dict[str, Metric]]:
        """The loss of one micro-batch, and metrics of it.

        Args:
            logprobs: [n, T] of the policy, with gradient.
            entropy: [n, T] of the policy.
            experience: the n rows of the micro-batch.
            num_tokens: loss tokens in the optimizer step, summed over ranks, divided by the number of losses that are
                averaged (micro-batches × ranks).
            num_sequences: sequences per micro-batch, counting skipped ones; may exceed n.
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

    # ── Once per rollout ──────────────────────────────────────────────────────────────────────────────────────────

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> None:
        """Make an experience if the last one was trained on, and begin an optimizer step if one is due."""
        self.engine.expect_writes()
        progress, accumulate = self.progress, self.trainer.accumulate_grad_batches
        begins_step = progress.micro_step % accumulate == 0
        if begins_step:
            self.trainer.optimizers[0].zero_grad()
            self.step_monitor.begin(self.device)
        if progress.experience is None:
            self.make_experience(batch)
        else:
            progress.require_same_rollout(batch)
            if begins_step:
                self.collector.sync_in_flight(self.window)
            if not progress.micro_batches:  # the run was resumed with other micro-batches
                self.make_micro_batches()
        if begins_step:
            rows = progress.rows_of_step(accumulate)
            self.step_monitor.observe_samples(
                progress.experience, rows, self.objective, self.reward_names, self.trainer
            )
            batches = progress.micro_batches_of_step(accumulate)
            self.step_monitor.observe_work(progress.experience, batches, self.policy, share_prompt=self.share_prompt)

    def make_experience(self, batch: PromptBatch) -> None:
        """Sample, reward and score the completions of one batch of prompts."""
        rollout, rewards = self.collector.collect(batch, self.window)
        if self.rollout_ahead and not self.progress.is_last_rollout(
            self.trainer, self.steps_per_rollout, self.updates_per_rollout
        ):
            self.collector.start_next(self.window)
        require_recent(rollout, step=self.trainer.global_step, limit=self.rollout_ahead * self.updates_per_rollout)
        number, old_logprobs, ref_logprobs = batch.rollout_number, None, None
        rewards_and_kl = gated(self.rewards, rewards)
        micro_batches = self.cut(rollout, skip_zero_advantage=False)
        scored = RowsToScore(rollout, micro_batches, number, self.trainer)
        if self.advantage.needs_grad_norms:
            with self.window.timed("score"):
                old_logprobs, rollout.grad_norms = self.scorer.score_with_norms(self.policy, scored)
        if self.objective.kl_in_reward:
            with self.window.timed("score"):
                ref_logprobs = self.scorer.score_reference(self.policy, scored)
                if old_logprobs is None and not self.rollout_ahead:
                    old_logprobs = self.scorer.score(self.policy, scored)
            rewards_and_kl = append_kl(
                rewards_and_kl,
                # with rollout_ahead, the policy that sampled is gone, and the engine's log-probs are used instead
                rollout.rollout_logprobs if self.rollout_ahead else old_logprobs,
                ref_logprobs,
                rollout.completion_mask,
                beta=self.coefficients.beta,
                estimator=self.objective.resolved.kl_estimator,
            )
        advantages = self.compute_advantages(rewards_and_kl, rollout)
        rollout.grad_norms = None  # ``advantages`` contain them
        experience = self.experience_class(
            **vars(rollout),
            number=number,
            rewards=rewards,
            contributions=self.contributions(rewards),
            advantages=advantages,
            ref_logprobs=ref_logprobs,
        )
        self.progress.begin_rollout(experience)
        self.make_micro_batches(old_logprobs, micro_batches)

    def make_micro_batches(self, logprobs: Tensor | None = None, scored_on: Sequence[list[int]] = ()) -> None:
        """Cut the experience into micro-batches, and compute the log-probs that the objective needs on them.

        Args:
            logprobs: [N, T] of the policy if they were computed already.
            scored_on: the micro-batches on which they were computed.
        """
        experience, needs = self.progress.experience, self.objective
        one_pass = self.cut(experience, skip_zero_advantage=self.skips_rows)
        scored = RowsToScore(experience, one_pass, experience.number, self.trainer)
        with self.window.timed("score"):
            if experience.old_logprobs is None and needs.needs_old_logprobs(self.updates_per_rollout):
                is_known = logprobs is not None and one_pass == scored_on
                experience.old_logprobs = logprobs if is_known else self.scorer.score(self.policy, scored)
            if experience.ref_logprobs is None and needs.kl_in_loss:
                experience.ref_logprobs = self.scorer.score_reference(self.policy, scored)
        self.progress.micro_batches = one_pass * self.num_iterations

    def cut(self, rollout: Rollout, *, skip_zero_advantage: bool) -> list[list[int]]:
        """The micro-batches of one pass over ``rollout``; see `cut_windows`."""
        options = {"skip_zero_advantage": skip_zero_advantage, "packed": packs(self.policy)}
        accumulate = self.trainer.accumulate_grad_batches
        return self.progress.cut(rollout, accumulate, share_prompt=self.share_prompt, **options)

    # ── Once per micro-batch ──────────────────────────────────────────────────────────────────────────────────────

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        """The loss of the next micro-batch, after the backward of all of its passes but the last; see `passes`."""
        progress = self.progress
        rows = progress.experience.rows(progress.micro_batch, self.device)
        experience = without_fillers(rows) if self.skips_rows else rows
        losses = self.trainer.accumulate_grad_batches * self.data_ranks
        sizes = {"num_tokens": self.step_monitor.loss_tokens / losses, "num_sequences": self.micro_batch_size}
        loss_of = lambda logprobs, entropy: self.compute_loss(logprobs, entropy, experience, **sizes)
        coefficient = self.known_coefficient(experience, loss_of)
        loss, metrics, logprobs = passes.train(self, rows, loss_of, coefficient)
        if self.keeps_logprobs:
            progress.keep_logprobs(logprobs)
        self.step_monitor.observe_loss(loss, metrics)
        progress.micro_step += 1
        return loss

    def known_coefficient(self, experience: Experience, loss_of: passes.LossOf) -> Tensor | None:
        """∂loss/∂log-prob [n, T] if it is known before the forward pass: the ratio is 1 and the loss has no KL.

        The kernel then computes the head's gradients in the forward pass, and compares the coefficient with the true
        gradient in the backward pass. None if `compute_loss` is overridden, since nothing is known about such a loss.
        """
        if self.overrides_loss or experience.old_logprobs is not None or not self.objective.constant_on_policy:
            return None
        return on_policy_coefficient(lambda x: loss_of(x, torch.zeros_like(x))[0], experience.rollout_logprobs)

    def on_after_backward(self) -> None:
        self.step_monitor.observe_backward(self.parameters(), self.trainer)

    # ── Once per optimizer step ───────────────────────────────────────────────────────────────────────────────────

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Measure the gradient before it is clipped, and stop before one that is not finite reaches the weights."""
        self.progress.require_whole_step(self.trainer.accumulate_grad_batches)
        self.step_monitor.measure_gradient(self.named_parameters(), self.trainer)
        if self.objective.ess_scaled_step:
            self.optimization.scale_rates(optimizer, self.step_monitor.learning_rate_scale())
        self.progress.mid_step = True

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm that is already known. Lightning would compute it again, and refuse fused optimizers."""
        if gradient_clip_algorithm == "value" or not gradient_clip_val:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        else:
            self.step_monitor.clip_gradient(optimizer, gradient_clip_val)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take the step, and log true means over its micro-batches and all ranks."""
        (optimizer,), progress, monitor = self.trainer.optimizers, self.progress, self.step_monitor
        learning_rate = optimizer.param_groups[0]["lr"]
        super().optimizer_step(*args, **kwargs)
        self.optimization.restore_rates(optimizer)
        # so that memory does not hold the gradients during the next rollout
        optimizer.zero_grad()
        progress.commit(self.trainer, completion_tokens=monitor.completion_tokens, prompt_tokens=monitor.prompt_tokens)
        further = {"learning_rate": learning_rate, **progress.token_counts}
        values = monitor.compute(self.trainer, self.coefficients.adaptive | further)
        self.coefficients.step(kl=values.get("kl"), entropy=values.get("entropy"))
        self.log_dict(values)

    # ── Sampling and scoring ──────────────────────────────────────────────────────────────────────────────────────

    @property
    def generation(self) -> Generation:
        """Samples completions with the engine and computes their rewards."""
        return Generation(
            self.rewards,
            self.environment,
            tokenizer=self.tokenizer,
            end_ids=eos_token_ids(self.policy, self.tokenizer),
            pad_id=pad_id(self.policy, self.tokenizer),
            max_prompt_length=self.max_prompt_length,
            max_completion_length=self.max_completion_length,
            seed=self.seed,
            trainer=self._trainer,
        )

    def generate(self, batch: PromptBatch, num_generations: int, sampling: Sampling, *, number: int) -> Rollout:
        """Sample ``num_generations`` completions of each prompt; see `Generation.generate`."""
        return self.generation.generate(self.engine, batch, num_generations, sampling, number=number)

    # ── Held-out prompts ──────────────────────────────────────────────────────────────────────────────────────────

    # Callbacks were called just before these hooks, and may have swapped the weights.

    def on_validation_batch_start(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.engine.expect_writes()

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Sample completions of held-out prompts and collect their metrics."""
        held_out.observe(self, batch)

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """As `validation_step`."""
        self.validation_step(batch, batch_idx)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One record per completion; see `Evaluation.records`."""
        return held_out.records(self, batch)

    def on_validation_start(self) -> None:
        """Exclude a validation within an optimizer step from the time of that step."""
        self.window.pause()

    def on_validation_end(self) -> None:
        self.window.go_on()

    def on_validation_epoch_start(self) -> None:
        self.evaluation.reset(getattr(self.trainer.datamodule, "validation", ()))

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_epoch_end(self) -> None:
        """Log means over all ranks under ``val/``."""
        self._log_held_out("val")

    def on_test_epoch_end(self) -> None:
        """Log means over all ranks under ``test/``."""
        self._log_held_out("test")

    def _log_held_out(self, prefix: str) -> None:
        self.held_out = {f"{prefix}/{name}": value for name, value in self.evaluation.compute().items()}
        if not self.trainer.sanity_checking:
            self.log_dict(self.held_out, sync_dist=True)

    # ── Setup ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def configure_callbacks(self) -> list[Callback]:
        """An engine if the user named none."""
        if any(isinstance(callback, RolloutCallback) for callback in self.trainer.callbacks):
            return []
        return [default_rollout(self.trainer, self)]

    def setup(self, stage: str) -> None:
        """Check everything that can be checked before a weight is loaded."""
        checks.check_run(self, stage)
        for reward in (*self.rewards, *self.eval_rewards):
            reward.prepare()
        if stage == "fit":
            self._begin_fit()

    def _begin_fit(self) -> None:
        """Begin a new run, or continue one of the same trainer from its last optimizer step."""
        if self.trainer.fast_dev_run:
            # count optimizer steps: as many of Lightning's micro-batches would end within the first one
            self.trainer.limit_train_batches = self.trainer.fast_dev_run * self.trainer.accumulate_grad_batches
        if self.trainer.global_step == 0:
            self._reset()
        elif not self.progress.return_to_last_step(self.trainer.datamodule):
            self.collector.pending = None

    def _reset(self) -> None:
        """Begin a new run."""
        self.coefficients = Coefficients(self.objective)
        self.progress.reset()
        self.step_monitor.reset()
        self.collector.pending = None

    def configure_model(self) -> None:
        """Load the policy, and for training a reference if one is needed and LoRA does not provide it."""
        loaded: list[nn.Module] = []
        if self.policy is None:
            self.policy = self.load_policy()
            loaded.append(self.policy)
        is_fit = self._trainer is None or self.trainer.state.fn == TrainerFn.FITTING
        if is_fit and self.needs_reference and self.lora is None and self.scorer.reference is None:
            # a policy that was loaded before may have been trained, or may hold the weights of a checkpoint
            self.scorer.reference = frozen_copy(self.policy if loaded else self.load_policy())
            loaded.append(self.scorer.reference)
        if self.device_mesh is not None:
            for model in loaded:
                shard(model, self.device_mesh["data_parallel"])
        if loaded and self.needs_reference:
            self.scorer.remember(self.policy, self.lora)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer over all trainable parameters, and its learning-rate schedule in optimizer steps."""
        return self.optimization.configure(self.parameters(), self.trainer)

    def on_train_start(self) -> None:
        """After a checkpoint was loaded, bring optimizer and schedule up to date."""
        self.optimization.resume(self.trainer)
        checks.check_engine_is_attached(self.engine)
        if self.progress.schedule_is_behind:
            self.progress.schedule_is_behind = False
            step_schedule(self.trainer)

    # ── Checkpoints ───────────────────────────────────────────────────────────────────────────────────────────────

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save what is trained and how, and the rest of the rollout of every rank."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["policy"]["optimizer"] = self.optimization.described
        data = self.trainer.datamodule
        if data is not None and data.state_dict():
            resume.save(checkpoint, self.progress, self.collector.pending, self.trainer)
            checkpoint["grpo"]["coefficients"] = self.coefficients.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """In `fit`, continue with the micro-batch that was next. Elsewhere, only the weights are used."""
        super().on_load_checkpoint(checkpoint)
        if self._trainer is None or self.trainer.state.fn != TrainerFn.FITTING:
            return
        if "grpo" not in checkpoint:
            raise UserError(
                "the checkpoint was saved outside of fit and contains only weights, so training cannot continue from "
                "it; name one that fit saved"
            )
        self.optimization.load(checkpoint["policy"]["optimizer"])
        self._reset()
        self.coefficients.load_state_dict(checkpoint["grpo"]["coefficients"])
        self.collector.pending = resume.load(
            checkpoint,
            self.progress,
            self.trainer,
            rollout_ahead=bool(self.rollout_ahead),
            rollout_class=self.rollout_class,
            experience_class=self.experience_class,
            contributions=self.contributions,
        )

    # ── Sizes and names ───────────────────────────────────────────────────────────────────────────────────────────

    @property
    def window(self) -> Window:
        """Metrics of the current optimizer step: ``self.window.mean(name, values)`` logs a true mean over its
        micro-batches and all ranks."""
        return self.step_monitor.window

    @property
    def reward_names(self) -> list[str]:
        """Names of the R rewards in metrics."""
        return [reward.name for reward in self.rewards]

    @property
    def reward_weights(self) -> Tensor:
        """[R] at the current optimizer step."""
        return torch.tensor([reward.weight_at(self.trained_steps) for reward in self.rewards], dtype=torch.float32)

    def contributions(self, rewards: Tensor) -> Tensor:
        """[N, R]: the ``rewards`` [N, R] as they count in their sum; see `Experience`."""
        return gated(self.rewards, rewards) * self.reward_weights

    @property
    def needs_reference(self) -> bool:
        """Whether the objective uses the reference (β is not 0)."""
        return self.objective.needs_reference

    @property
    def overrides_loss(self) -> bool:
        """Whether a subclass overrides `compute_loss`."""
        return type(self).compute_loss is not GRPOModule.compute_loss

    @property
    def overrides_advantages(self) -> bool:
        """Whether a subclass overrides `compute_advantages`."""
        return type(self).compute_advantages is not GRPOModule.compute_advantages

    @property
    def skips_rows(self) -> bool:
        """Whether completions without an advantage are left out of the update."""
        if self.skips_zero_advantage is not None:
            return self.skips_zero_advantage
        return self.objective.skips_zero_advantage and not self.overrides_loss

    @property
    def data_ranks(self) -> int:
        """Number of ranks with prompts of their own; tensor-parallel ranks share theirs."""
        return self.trainer.distributed_sampler_kwargs["num_replicas"] if self.trainer.world_size > 1 else 1

    @property
    def steps_per_rollout(self) -> int:
        """Micro-batches per rollout on each rank; the train loader yields a batch as often."""
        return steps_per_rollout(
            samples=self.trainer.datamodule.prompts_per_rollout * self.num_generations,
            micro_batch_size=self.micro_batch_size,
            num_iterations=self.num_iterations,
            ranks=self.data_ranks,
        )

    @property
    def completions_per_step(self) -> int:
        """Completions per optimizer step, on all ranks together."""
        return self.micro_batch_size * self.trainer.accumulate_grad_batches * self.data_ranks

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps per rollout."""
        return self.steps_per_rollout // self.trainer.accumulate_grad_batches


RANGES = {
    "num_generations": "[1, inf)",
    "num_iterations": "[1, inf)",
    "micro_batch_size": "[1, inf)",
    "micro_batch_tokens": "[1, inf)",
    "max_prompt_length": "[1, inf)",
    "max_completion_length": "[1, inf)",
    "validation_generations": "[1, inf)",
    "pass_threshold": "(-inf, inf)",
    "resampling_rounds": "[0, inf)",
    "seed": "[0, inf)",
}
"""Ranges of numeric options; see `check_ranges`."""
