"""Where training stands: in which rollout, at which of its micro-batches, after which optimizer step.

Shapes: N = B·G completions on this rank.
"""

import torch
from lightning import Trainer
from torch import Tensor

from lightning_grpo.data import PromptBatch, PromptDataModule
from lightning_grpo.errors import RunError
from lightning_grpo.rollout import Rollout
from lightning_grpo.training.experience import Experience, cut_windows, first_at_random


class Progress:
    """The rollout that is trained on, its micro-batches, and what has been done with them.

    Args:
        num_generations: completions per prompt (G).
        num_iterations: passes over each rollout (μ).
        micro_batch_size: completions per micro-batch and rank, on average.
    """

    def __init__(self, *, num_generations: int, num_iterations: int, micro_batch_size: int) -> None:
        self.num_generations = num_generations
        self.num_iterations = num_iterations
        self.micro_batch_size = micro_batch_size
        self.reset()

    def reset(self) -> None:
        """Forget everything: a new run begins."""
        self.num_tokens = 0
        """Prompt and completion tokens of all ranks that the policy was trained on, each counted once."""
        self.completion_tokens = 0
        """Completion tokens of all ranks, counted once per pass."""
        self.mid_step = False
        """Whether an optimizer step has begun and is not committed."""
        self.schedule_is_behind = False
        """Whether the checkpoint was saved after an optimizer step and before the step of its schedule."""
        self.steps_at_commit = 0
        """Optimizer steps at the last `commit`, which Lightning counts a little later."""
        self.reset_rollout()

    def reset_rollout(self) -> None:
        """Forget the rollout: the next batch begins a new one."""
        self.experience: Experience | None = None
        self.micro_batches: list[list[int]] = []
        """Rows of each micro-batch, for all passes. Empty while the rollout has not been cut."""
        self.micro_step = 0
        """Micro-batches of the rollout that were trained on."""
        self.committed = 0
        """`micro_step` at the last optimizer step."""
        self.batches_at_commit = 0
        """Batches that Lightning had fetched at the last optimizer step, over the whole training."""
        self.last_finished = -1
        """Number of the last rollout that was trained on to its end."""

    # ── Within a rollout ──────────────────────────────────────────────────────────────────────────────────────────

    def begin_rollout(self, experience: Experience) -> None:
        """Train on ``experience`` next. It has not been cut into micro-batches."""
        self.experience, self.micro_batches = experience, []

    def cut(
        self, rollout: Rollout, accumulate: int, *, skip_zero_advantage: bool, share_prompt: bool, packed: bool
    ) -> list[list[int]]:
        """The micro-batches of one pass; see `cut_windows` and `first_at_random`."""
        micro_batches = cut_windows(
            rollout,
            windows=len(rollout) // (accumulate * self.micro_batch_size),
            accumulate=accumulate,
            micro_batch_size=self.micro_batch_size,
            skip_zero_advantage=skip_zero_advantage,
            share_prompt=share_prompt,
            packed=packed,
        )
        return first_at_random(micro_batches, accumulate, rollout.seeds)

    @property
    def place_in_pass(self) -> int:
        """Index of the next micro-batch within its pass over the rollout."""
        return self.micro_step % (len(self.micro_batches) // self.num_iterations)

    @property
    def micro_batch(self) -> list[int]:
        """Rows of the next micro-batch."""
        return self.micro_batches[self.micro_step]

    def micro_batches_of_step(self, accumulate: int) -> list[list[int]]:
        """Rows of each micro-batch of the optimizer step that begins with the next one."""
        return self.micro_batches[self.micro_step : self.micro_step + accumulate]

    def keep_logprobs(self, logprobs: Tensor) -> None:
        """Keep the log-probs [n, T] of the next micro-batch in the experience, in the first pass over the rollout."""
        if self.micro_step * self.num_iterations >= len(self.micro_batches):
            return
        experience = self.experience
        if experience.logprobs is None:
            experience.logprobs = torch.full_like(experience.rollout_logprobs, torch.nan)
        experience.logprobs[self.micro_batch, : logprobs.shape[1]] = logprobs.detach().float().cpu()

    @property
    def is_first_pass(self) -> bool:
        """Whether the last micro-batch belonged to the first pass over the rollout."""
        return self.micro_step * self.num_iterations <= len(self.micro_batches)

    def rows_of_step(self, accumulate: int, *, begun: int = 0) -> slice:
        """Rows of the optimizer step that began ``begun`` micro-batches before the next one, skipped ones included."""
        start = (self.micro_step - begun) * self.micro_batch_size % len(self.experience)
        return slice(start, start + accumulate * self.micro_batch_size)

    def require_same_rollout(self, batch: PromptBatch) -> None:
        """Check that the loader repeats the batch of the rollout that is trained on.

        Raises:
            RunError: it yields other prompts.
        """
        if batch.rollout_number != self.experience.number:
            raise RunError(
                f"the train loader yielded other prompts at micro-batch {self.micro_step} of "
                f"{len(self.micro_batches)}, so the rest of the rollout would be lost. A train loader must yield each "
                "batch steps_per_rollout times, as PromptDataModule's does; leave trainer.limit_train_batches at 1.0"
            )

    def require_whole_step(self, accumulate: int) -> None:
        """Check that an optimizer step is taken after all of its micro-batches.

        Raises:
            RunError: some are missing.
        """
        if done := self.micro_step % accumulate:
            raise RunError(
                f"the epoch ended after {done} of the {accumulate} micro-batches of an optimizer step, so its gradient "
                "would cover too few samples. Leave trainer.limit_train_batches at 1.0"
            )

    def is_last_rollout(self, trainer: Trainer, steps_per_rollout: int, updates_per_rollout: int) -> bool:
        """Whether training ends with this rollout, as far as max_steps and max_epochs tell."""
        done = trainer.fit_loop.epoch_loop.batch_progress.current.processed
        is_last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= trainer.max_epochs
        if is_last_epoch and done + steps_per_rollout >= trainer.num_training_batches:
            return True
        return -1 < trainer.max_steps <= trainer.global_step + updates_per_rollout

    def commit(self, trainer: Trainer, *, completion_tokens: int, prompt_tokens: int) -> None:
        """Record that an optimizer step was taken, on the given numbers of tokens of all ranks."""
        self.mid_step = False
        self.steps_at_commit = trainer.global_step + 1
        if self.is_first_pass:
            # later passes over the rollout see the same tokens again
            self.num_tokens += completion_tokens + prompt_tokens
        self.completion_tokens += completion_tokens
        self.committed = self.micro_step
        self.batches_at_commit = trainer.fit_loop.epoch_loop.batch_progress.total.ready
        if self.micro_step == len(self.micro_batches):
            self.last_finished = self.experience.number
            self.experience, self.micro_step, self.committed = None, 0, 0

    @property
    def token_counts(self) -> dict[str, float]:
        """Tokens trained on since the start, by the names of their metrics."""
        return {"num_tokens": float(self.num_tokens), "completion_tokens": float(self.completion_tokens)}

    # ── Across runs ───────────────────────────────────────────────────────────────────────────────────────────────

    def layout(self, trainer: Trainer) -> dict[str, int]:
        """What determines how a rollout is divided into micro-batches."""
        return {
            "data.prompts_per_rollout": trainer.datamodule.prompts_per_rollout,
            "num_generations": self.num_generations,
            "num_iterations": self.num_iterations,
            "ranks": trainer.world_size,
            "micro_batch_size": self.micro_batch_size,
            "trainer.accumulate_grad_batches": trainer.accumulate_grad_batches,
        }

    def return_to_last_step(self, datamodule: PromptDataModule) -> bool:
        """Prepare a further `fit` of the same trainer, which may have stopped anywhere, from the last optimizer step.

        Returns:
            Whether the rollout is continued. Otherwise it is forgotten.
        """
        self.mid_step = False
        number = self.experience.number if self.experience else None
        if datamodule.serve_again(number, self.committed):
            self.micro_step = self.committed
            return True
        self.reset_rollout()
        return False
