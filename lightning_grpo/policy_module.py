"""A language model under Lightning: loading, generating, scoring, evaluating, saving. What GRPO does with it is above.

Shapes: B prompts, N = B·G completions, R rewards, P prompt length, T completion length.
"""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, Self

import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, get_scheduler

from lightning_grpo.data import Prompt, PromptBatch
from lightning_grpo.errors import UserError
from lightning_grpo.export.checkpoint import describe_policy
from lightning_grpo.export.load import load_module
from lightning_grpo.metrics import Window
from lightning_grpo.monitor.checkpoint_files import require_same_weights
from lightning_grpo.monitor.observe import observe_completions, observe_rewards
from lightning_grpo.policy import adapters
from lightning_grpo.policy.attention import NAME as ATTENTION
from lightning_grpo.policy.checks import require_context, require_end_token
from lightning_grpo.policy.load import (
    LoRA,
    frozen_copy,
    full_precision_buffers,
    load_config,
    load_generation_config,
    load_policy,
    load_tokenizer,
    shard,
)
from lightning_grpo.policy.logprobs import completion_logprobs
from lightning_grpo.ranges import check_ranges
from lightning_grpo.rewards import EarlyJudge, Reward, as_rewards, compute_rewards, decode_completions, template_opening
from lightning_grpo.rollout import (
    Completion,
    Rollout,
    RolloutCallback,
    SampleRequest,
    Sampling,
    SyncedEngine,
    default_rollout,
    policy_weights,
)
from lightning_grpo.rollout.callback import eos_token_ids, pad_id
from lightning_grpo.rollout.seeds import rollout_seeds
from lightning_grpo.seed import seed_of_run
from lightning_grpo.stopping import abandonable
from lightning_grpo.training import optimizer_options

log = logging.getLogger(__name__)

EVALUATION = -1
"""The rollout number of held-out samples: their seeds never change, so that evaluations differ by the policy alone."""


class PolicyModule(LightningModule):
    """Owns policy, frozen reference, tokenizer and rewards; talks to an `Engine` that a callback attaches.

    Args:
        model: the policy's checkpoint: folder, or name on the Hugging Face hub.
        rewards: what judges the completions; their weighted sum is the reward.
        max_prompt_length: tokens a prompt may have; longer ones are the data's to drop or refuse.
        max_completion_length: tokens a completion may have.
        sampling: how the engine draws tokens in training.
        validation_sampling: how it draws them in validation, test and predict; None takes the training's, to the end.
        validation_generations: completions of each held-out prompt (k of pass@k).
        pass_threshold: a held-out completion is right where its first reward is at least this.
        lora: train adapters instead of the whole weights.
        dtype: of the parameters. float32 together with trainer.precision bf16-mixed keeps master weights: with bfloat16
            parameters, steps of learning rates of 1e-5 and below are mostly lost to rounding.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more compute.
        share_prompt: compute each prompt once for all its completions. Without effect under gradient_checkpointing.
        attn_implementation: transformers' name of the attention: sdpa, eager, flash_attention_2, … The default is sdpa,
            but for bfloat16 on CPUs, where matrix products are faster.
        from_scratch: random weights by the checkpoint's configuration; its weights are not read.
        optimizer: called with the trainable parameters. torch's AdamW is several times faster with ``fused: true``.
        lr_schedule: learning rate after the warm-up.
        warmup_steps: optimizer steps in which the learning rate rises from 0.
        seed: of sampling. The samples of a run follow from (seed, rollout, prompt, sample) alone. None takes that of
            --seed_everything (`lightning.seed_everything`), or 0.
    """

    engine: SyncedEngine | None = None
    """Samples from the policy's current weights; attached by a `RolloutCallback` (else by `default_rollout`)."""

    rollout_number = 0
    """Of the rollout that is scored and trained on."""

    def __init__(
        self,
        model: str,
        rewards: list[Reward],
        *,
        max_prompt_length: int = 512,
        max_completion_length: int = 256,
        sampling: Sampling = Sampling(),
        validation_sampling: Sampling | None = None,
        validation_generations: int = 1,
        pass_threshold: float = 1.0,
        lora: LoRA | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        gradient_checkpointing: bool = False,
        share_prompt: bool = True,
        attn_implementation: str = ATTENTION,
        from_scratch: bool = False,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=1e-6, weight_decay=0.0),
        lr_schedule: Literal["constant", "linear", "cosine"] = "constant",
        warmup_steps: int = 0,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        ranges = {
            "max_prompt_length": "[1, inf)",
            "max_completion_length": "[1, inf)",
            "validation_generations": "[1, inf)",
            "pass_threshold": "(-inf, inf)",
            "warmup_steps": "[0, inf)",
            "seed": "[0, inf)",
        }
        check_ranges(locals(), ranges)
        if not rewards:
            raise UserError("rewards is empty: nothing would be learned; name at least one reward")
        self.model_path = model
        self.rewards = as_rewards(rewards)
        self.max_prompt_length = max_prompt_length
        self.max_completion_length = max_completion_length
        self.sampling = sampling
        self.validation_sampling = validation_sampling or replace(sampling, cutoff=1.0)
        self.validation_generations = validation_generations
        self.pass_threshold = pass_threshold
        self.lora = lora
        self.dtype_name = dtype
        self.gradient_checkpointing = gradient_checkpointing
        self.share_prompt = share_prompt and not gradient_checkpointing
        self.attn_implementation = attn_implementation
        self.from_scratch = from_scratch
        self.optimizer_factory = optimizer
        self.lr_schedule = lr_schedule
        self.warmup_steps = warmup_steps
        self.seed = seed_of_run(seed)
        if lora is not None:
            # checkpoints hold the adapter alone; `adapters.check` insists on all of it
            self.strict_loading = False
        self._optimizer_options: dict[str, Any] | None = None
        self._saved_optimizer_options: dict[str, Any] | None = None
        self.policy: nn.Module | None = None
        # a tuple hides the reference from the module tree: it is neither trained, saved nor sharded with the policy
        self._reference: tuple[nn.Module, ...] = ()
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._held_out = Window()

    # ── Loading ───────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer, read once."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.model_path)
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """Rows of the checkpoint's embedding, without its weights."""
        return load_config(self.model_path).get_text_config().vocab_size

    @property
    def needs_reference(self) -> bool:
        """Whether the reference is used at all; where not, none is kept."""
        return False

    def configure_model(self) -> None:
        """Load the policy; for training also its reference, if one is needed and LoRA doesn't give it for free."""
        loaded = []
        if self.policy is None:
            self.policy = self._load_policy()
            loaded.append(self.policy)
        fits = self._trainer is None or self.trainer.state.fn == TrainerFn.FITTING
        if fits and self.needs_reference and self.lora is None and not self._reference:
            # a policy from before may have been trained, or have taken a checkpoint's weights
            self._reference = (frozen_copy(self.policy if loaded else self._load_policy()),)
            loaded.extend(self._reference)
        if self.device_mesh is not None:
            for model in loaded:
                shard(model, self.device_mesh["data_parallel"])

    def _load_policy(self) -> PreTrainedModel | PeftModel:
        return load_policy(
            self.model_path,
            dtype=self.dtype_name,
            lora=self.lora,
            gradient_checkpointing=self.gradient_checkpointing,
            attn_implementation=self.attn_implementation,
            from_scratch=self.from_scratch,
            seed=self.seed,
        )

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """As torch's, but for the buffers: see `full_precision_buffers`. Lightning converts by it in bf16-true."""
        with full_precision_buffers(self):
            return super().to(*args, **kwargs)

    def configure_callbacks(self) -> list[Callback]:
        """The engine, where the user named none."""
        if any(isinstance(callback, RolloutCallback) for callback in self.trainer.callbacks):
            return []
        return [default_rollout(self.trainer, self)]

    def setup(self, stage: str) -> None:
        """Check what can be checked before a weight is loaded."""
        self._build_optimizer([nn.Parameter(torch.zeros(1))])
        strategy = self.trainer.strategy
        if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | ModelParallelStrategy):
            raise UserError(
                f"trainer.strategy is {type(strategy).__name__}, under which weights would not reach the engine; set "
                "ddp, or lightning.pytorch.strategies.ModelParallelStrategy, which shards them (FSDP2)"
            )
        if str(self.trainer.precision) == "16-true":
            raise UserError(
                "trainer.precision is 16-true: without loss scaling most gradients are too small for float16 and "
                "become 0; set bf16-mixed, bf16-true, or 16-mixed, which scales them"
            )
        if self.device_mesh is not None and self.device_mesh["tensor_parallel"].size() > 1:
            raise UserError(
                f"trainer.strategy.tensor_parallel_size is {self.device_mesh['tensor_parallel'].size()}; set it to 1 "
                "and data_parallel_size to the number of ranks"
            )
        config = load_config(self.model_path)
        require_end_token(self.model_path, self.tokenizer, config, load_generation_config(self.model_path, config))
        require_context(self.model_path, config, self.max_prompt_length, self.max_completion_length)

    def _build_optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        try:
            optimizer = self.optimizer_factory(parameters)
        except ValueError as error:
            raise UserError(f"model.optimizer: {error}; set a value in its range") from error
        for name, value in optimizer.defaults.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"model.optimizer.{name} is {value}; set a finite number")
        return optimizer

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer over all trainable parameters, and its learning-rate schedule, one step at a time."""
        optimizer = self._build_optimizer(p for p in self.parameters() if p.requires_grad)
        lr = max(group["lr"] for group in optimizer.param_groups)
        if self.trainer.precision == "16-mixed" and optimizer.defaults.get("fused"):
            raise UserError(
                "optimizer.fused is true and trainer.precision 16-mixed: the optimizer would unscale the gradients "
                "itself, after they were measured and clipped; set fused: false, or precision bf16-mixed"
            )
        dtypes = {p.dtype for group in optimizer.param_groups for p in group["params"]}
        if lr <= 1e-5 and dtypes != {torch.float32}:
            log.warning(
                "the trained parameters are %s and the learning rate is %g: most of each step is lost to rounding. Set "
                "dtype: float32 with trainer.precision bf16-mixed, which keeps master weights",
                " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)),
                lr,
            )
        self._optimizer_options = optimizer_options.options(optimizer)
        if self.lr_schedule == "constant":
            name, steps = "constant_with_warmup", None
        else:
            name, steps = self.lr_schedule, self.trainer.estimated_stepping_batches
            if steps == float("inf"):
                raise UserError(
                    f"lr_schedule is {name}, which needs the number of optimizer steps, and trainer.max_steps is "
                    f"{self.trainer.max_steps} and trainer.max_epochs {self.trainer.max_epochs}: training has no end; "
                    "set one of them, or lr_schedule: constant"
                )
            steps = int(steps)
        self._optimizer_options["schedule"] = {
            "lr_schedule": self.lr_schedule,
            "warmup_steps": self.warmup_steps,
            "steps": steps,
        }
        scheduler = get_scheduler(name, optimizer, num_warmup_steps=self.warmup_steps, num_training_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """After a checkpoint, take the optimizer's options that were changed in the configuration, and the schedule."""
        saved, self._saved_optimizer_options = self._saved_optimizer_options, None
        if saved is None or self._optimizer_options is None:
            return
        changes = optimizer_options.take_changed(self.trainer.optimizers[0], saved, self._optimizer_options)
        optimizer_options.reschedule(self.trainer.lr_scheduler_configs[0].scheduler)
        schedule = self._optimizer_options["schedule"]
        changes += [f"{k} {was} → {now}" for k, was in saved["schedule"].items() if was != (now := schedule[k])]
        log.info(
            "going on after optimizer step %d: weights, optimizer state and the position in the schedule are the "
            "checkpoint's, %s",
            self.trainer.global_step,
            f"and the configuration changes {', '.join(changes)}" if changes else "and no option was changed since",
        )

    # ── Generating and scoring ────────────────────────────────────────────────────────────────────────────────────

    @property
    def policy_version(self) -> int:
        """Optimizer steps taken: the age of samples counts in them. What else writes to the weights is for
        `SyncedEngine` to find out."""
        return self.trainer.global_step

    def policy_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The policy's weights under Hugging Face names, adapters merged, for the engine."""
        return policy_weights(self.policy)

    def generate(self, batch: PromptBatch, num_generations: int, sampling: Sampling, *, number: int) -> Rollout:
        """Sample ``num_generations`` completions of each prompt: N rows, those of a prompt next to each other.

        Args:
            batch: B prompts.
            num_generations: completions of each.
            sampling: how tokens are drawn.
            number: of the rollout; it enters the seeds.
        """
        seeds = [
            [rollout_seeds(self.seed, number, index, sample) for sample in range(num_generations)]
            for index in batch.prompt_indices
        ]
        early = [reward for reward in self.rewards if reward.early]

        def judge_group(prompt: int, group: list[Completion]) -> Tensor:
            return self._judge(early, [completion.token_ids for completion in group], [batch.rows[prompt]] * len(group))

        with EarlyJudge(judge_group) as judge:
            request = SampleRequest(
                prompts=batch.prompts, seeds=seeds, max_tokens=self.max_completion_length, sampling=sampling
            )
            completions = self.engine.generate(request, judge.hear if early else None)
            rollout = Rollout.collate(batch.prompts, completions, pad_id(self.policy, self.tokenizer))
            if early:
                rollout.early_rewards = torch.cat(judge.results())
        return rollout

    def compute_rewards(self, rollout: Rollout, batch: PromptBatch) -> Tensor:
        """Every reward of every completion: [N, R] float32, NaN where a reward says it does not apply."""
        pairs = zip(rollout.completion_ids, rollout.completion_mask, strict=True)
        completion_ids = [ids[mask].tolist() for ids, mask in pairs]
        repeats = len(completion_ids) // len(batch)
        prompts = [row for row in batch.rows for _ in range(repeats)]
        is_early = torch.tensor([reward.early and rollout.early_rewards is not None for reward in self.rewards])
        late = [reward for reward, done in zip(self.rewards, is_early, strict=True) if not done]
        table = torch.empty(len(rollout), len(self.rewards), dtype=torch.float32)
        table[:, ~is_early] = self._judge(late, completion_ids, prompts)
        if is_early.any():
            table[:, is_early] = rollout.early_rewards
        return table

    def _judge(self, rewards: Sequence[Reward], completion_ids: list[list[int]], prompts: list[Prompt]) -> Tensor:
        """[n, len(rewards)] of n completions and the prompt of each."""
        return compute_rewards(
            rewards,
            [prompt.messages for prompt in prompts],
            self.decode(completion_ids),
            completion_ids,
            [prompt.columns for prompt in prompts],
            self.trainer,
            openings=[template_opening(self.tokenizer, prompt.ids) for prompt in prompts],
        )

    def decode(self, completion_ids: Sequence[Sequence[int]]) -> list[str]:
        """The completions' texts, without the tokens that end or pad them."""
        return decode_completions(self.tokenizer, completion_ids, eos_token_ids(self.policy, self.tokenizer))

    @property
    def reward_names(self) -> list[str]:
        """R of them, as they are logged."""
        return [reward.name for reward in self.rewards]

    @property
    def reward_weights(self) -> Tensor:
        """[R]"""
        return torch.tensor([float(reward.weight) for reward in self.rewards], dtype=torch.float32)

    def logprobs(
        self, model: nn.Module, rows: Rollout, *, entropy_grad: bool = False, coefficient: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies [N, T] of the completions' tokens, at the temperature they were sampled with.

        ``coefficient`` [N, T] is the gradient that the log-probs will get, where it is known ahead; it spares work.
        """
        return completion_logprobs(
            model,
            prompt_ids=rows.prompt_ids,
            prompt_mask=rows.prompt_mask,
            completion_ids=rows.completion_ids,
            completion_mask=rows.completion_mask,
            temperature=self.sampling.temperature,
            share_prompt=self.share_prompt,
            entropy_grad=entropy_grad,
            coefficient=coefficient,
        )

    @contextmanager
    def seeded(self, micro_batch: int) -> Iterator[None]:
        """Draw random numbers, those of dropout, that follow from the rollout and the number of the micro-batch in it.

        No generator has to be saved, and old log-probs are taken with the very units dropped that the update drops.
        """
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(rollout_seeds(self.seed, self.rollout_number, self.global_rank, micro_batch))
            yield

    @torch.no_grad()
    def score(self, model: nn.Module, rollout: Rollout, micro_batches: Sequence[list[int]]) -> Tensor:
        """Log-probs [N, T] of ``model`` for the rows named in ``micro_batches``; zero in the others.

        Runs in the trainer's precision and on the update's own micro-batches: an unmoved policy scores bit for bit
        what the update will compute, so that the first ratio is exactly 1.
        """
        logprobs = torch.zeros_like(rollout.rollout_logprobs)
        with self.trainer.precision_plugin.forward_context():
            for k, index in enumerate(micro_batches):
                rows = rollout.rows(index, self.device)
                with self.seeded(k):
                    values = self.logprobs(model, rows)[0]
                logprobs[index, : values.shape[1]] = values.to(logprobs.device, logprobs.dtype)
        return logprobs

    @torch.no_grad()
    def score_tokens(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        """For sequences of n tokens the n − 1 values log p(token[i] | token[:i]) of the policy, at temperature 1."""
        scored = []
        with self.trainer.precision_plugin.forward_context():
            for _, batch in groupby(sequences, key=len):
                ids = torch.tensor([list(sequence) for sequence in batch], device=self.device)
                mask = torch.ones_like(ids, dtype=torch.bool)
                logprobs, _ = completion_logprobs(
                    self.policy,
                    prompt_ids=ids[:, :1],
                    prompt_mask=mask[:, :1],
                    completion_ids=ids[:, 1:],
                    completion_mask=mask[:, 1:],
                    share_prompt=False,
                )
                scored.extend(logprobs)
        return scored

    def score_reference(self, rollout: Rollout, micro_batches: Sequence[list[int]]) -> Tensor:
        """`score` by the policy as it was before training."""
        if self.lora is not None:
            with self.policy.disable_adapter():
                return self.score(self.policy, rollout, micro_batches)
        # Lightning moves and converts what is in the module tree alone
        with full_precision_buffers(self._reference[0]):
            reference = self.trainer.precision_plugin.convert_module(self._reference[0].to(self.device))
        return self.score(reference, rollout, micro_batches)

    # ── Held-out prompts ──────────────────────────────────────────────────────────────────────────────────────────

    # Callbacks have had their turn just before these hooks, and may have put other weights in.

    def on_train_batch_start(self, batch: PromptBatch, batch_idx: int) -> None:
        self.engine.expect_writes()

    def on_validation_batch_start(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.engine.expect_writes()

    def on_test_batch_start(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.engine.expect_writes()

    def on_predict_batch_start(self, batch: PromptBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.engine.expect_writes()

    def judge_held_out(self, batch: PromptBatch) -> tuple[Rollout, Tensor]:
        """k completions of each held-out prompt, and their rewards."""
        with abandonable(self.trainer):
            rollout = self.generate(batch, self.validation_generations, self.validation_sampling, number=EVALUATION)
            return rollout, self.compute_rewards(rollout, batch)

    def evaluate(self, batch: PromptBatch) -> None:
        """Judge completions of held-out prompts and count what they score."""
        k = self.validation_generations
        rollout, rewards = self.judge_held_out(batch)
        # prompts that only fill up a rank's last batch count nowhere
        real = torch.tensor(batch.real).repeat_interleave(k)
        observe_rewards(self._held_out, rewards[real], self.reward_names, self.reward_weights)
        observe_completions(self._held_out, rollout.completion_mask[real].sum(1), rollout.truncated[real])
        right = (rewards[real, 0] >= self.pass_threshold).view(-1, k)
        self._held_out.mean("pass@1", right)
        if k > 1:
            self._held_out.mean(f"pass@{k}", right.any(1))

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Evaluate one batch of held-out prompts."""
        self.evaluate(batch)

    def test_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Evaluate one batch of held-out prompts."""
        self.evaluate(batch)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """One record a completion: prompt, completion, rewards, whether it was cut off."""
        rollout, rewards = self.judge_held_out(batch)
        k = self.validation_generations
        pairs = zip(rollout.completion_ids, rollout.completion_mask, strict=True)
        completions = self.decode([ids[mask].tolist() for ids, mask in pairs])
        return [
            {
                "prompt": batch.messages[n // k],
                "completion": completion,
                "rewards": {
                    name: None if score != score else score for name, score in zip(self.reward_names, row, strict=True)
                },
                "truncated": truncated,
            }
            for n, (completion, row, truncated) in enumerate(
                zip(completions, rewards.tolist(), rollout.truncated.tolist(), strict=True)
            )
            if batch.real[n // k]
        ]

    def on_validation_epoch_start(self) -> None:
        """Start counting anew, whatever an interrupted evaluation left."""
        self._held_out = Window()

    def on_test_epoch_start(self) -> None:
        """Start counting anew, whatever an interrupted evaluation left."""
        self._held_out = Window()

    def on_validation_epoch_end(self) -> None:
        """Log the means over all ranks under ``val/``."""
        self._log_held_out("val")

    def on_test_epoch_end(self) -> None:
        """Log the means over all ranks under ``test/``."""
        self._log_held_out("test")

    def _log_held_out(self, prefix: str) -> None:
        values = {f"{prefix}/{name}": value for name, value in self._held_out.reduce().items()}
        self.held_out = values
        if not self.trainer.sanity_checking:
            self.log_dict(values, sync_dist=True)

    # ── Checkpoints ───────────────────────────────────────────────────────────────────────────────────────────────

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: str | Path, map_location: Any = None, **kwargs: Any) -> Self:
        """A module with the policy of a checkpoint, which generates without a Trainer: `load_module`."""
        return load_module(cls, checkpoint_path, map_location, **kwargs)

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:
        """With LoRA the adapter alone: the base model is the checkpoint it came from."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        if self.lora is not None:
            kept = {prefix + name for name in self._trainable}
            for name in [name for name in state if name.startswith(prefix) and name not in kept]:
                del state[name]
        return state

    @property
    def _trainable(self) -> set[str]:
        return {name for name, p in self.named_parameters() if p.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Describe what is trained and how, for the run that takes it up."""
        checkpoint["policy"] = {
            "lora": adapters.describe(self.lora, self._trainable),
            "optimizer": self._optimizer_options,
            **describe_policy(
                model=self.model_path,
                dtype=self.dtype_name,
                from_scratch=self.from_scratch,
                seed=self.seed,
                chat_template=getattr(self.trainer.datamodule, "chat_template", None),
            ),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights and adapters that are not this run's."""
        if "policy" not in checkpoint:
            raise UserError("the checkpoint was saved by another program, or by an earlier version of this one")
        saved = checkpoint["policy"]
        adapters.check(saved["lora"], self.lora, self._trainable)
        if self.lora is None and self.device_mesh is None:
            require_same_weights(self.state_dict(), checkpoint["state_dict"])
        self._saved_optimizer_options = saved["optimizer"]
