"""What happens around an optimizer step: token counts before it, the gradient's norm, clipping, and its metrics.

Shapes: N completions on this rank, n of them in an optimizer step, R rewards.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from lightning import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_grpo.errors import NonFiniteError, UserError
from lightning_grpo.metrics import Max, Mean, Metric, Window
from lightning_grpo.monitor.observe import (
    memory_in_use,
    observe_completions,
    observe_repetition,
    observe_rewards,
    observe_sources,
    pass_at,
    powers_of_two,
    reward_length_correlation,
    variance_shares,
)
from lightning_grpo.objective import ObjectiveConfig
from lightning_grpo.objective.loss import SEQUENCE_ESS
from lightning_grpo.policy.load import compute_dtype_of
from lightning_grpo.policy.logprobs import shares_prompts
from lightning_grpo.policy.packable import packs
from lightning_grpo.training.experience import Experience
from lightning_grpo.training.gradient import WeightSample, gradient_norms, noise_scale, square_norm
from lightning_grpo.training.work import model_flops, peak_flops, work_of

MAX_SOURCES = 20
"""If training prompts name more sources, such as one per row, there are no metrics by source."""


class StepMonitor:
    """Collects the metrics of an optimizer step over its micro-batches and all ranks.

    Args:
        num_generations: completions per prompt (G).
        pass_threshold: a completion is right if its first reward is at least this value.
    """

    def __init__(self, *, num_generations: int, pass_threshold: float) -> None:
        self.num_generations = num_generations
        self.pass_threshold = pass_threshold
        self.window = Window()
        self.reset()

    def reset(self) -> None:
        """Forget what earlier runs logged."""
        self._logged: set[str] = set()
        self._weights: WeightSample | None = None

    def begin(self, device: torch.device) -> None:
        """An optimizer step begins, possibly with the sampling of a rollout."""
        self.window = Window(partial(memory_in_use, device))
        self._first_gradient: Tensor | None = None
        for phase in ("sync", "rollout", "reward", "score"):
            self.window.seconds(phase, 0.0)

    def observe_samples(
        self,
        experience: Experience,
        rows: slice,
        objective: ObjectiveConfig,
        reward_names: Sequence[str],
        trainer: Trainer,
    ) -> None:
        """Log the ``rows`` of the optimizer step, and count their tokens over all ranks."""
        mask, truncated = experience.completion_mask[rows], experience.truncated[rows]
        observe_completions(self.window, mask.sum(1), truncated)
        observe_repetition(self.window, experience.completion_ids[rows], mask)
        observe_rewards(self.window, experience.rewards[rows], experience.contributions[rows], reward_names)
        totals = experience.totals
        self.window.mean("completions/truncated_reward", totals[rows][truncated])
        self._observe_groups(experience, rows, totals, getattr(trainer.datamodule, "source_names", ()))
        self._reward_names = reward_names
        self._samples = rows.stop - rows.start
        age = (trainer.global_step - experience.versions[rows])[mask]
        self.window.mean("staleness", age)
        self.window.add({"staleness_max": Max(age.amax())})
        counts = torch.stack(
            [objective.loss_mask(mask, truncated).sum(), mask.sum(), experience.prompt_mask[rows].sum()]
        )
        counts = trainer.strategy.reduce(counts.to(trainer.strategy.root_device), reduce_op="sum")
        self.loss_tokens, self.completion_tokens, self.prompt_tokens = counts.tolist()

    def _observe_groups(self, experience: Experience, rows: slice, totals: Tensor, sources: Collection[str]) -> None:
        """Log the groups whose first completion is among ``rows``; each group counts once, even if steps divide it."""
        G = self.num_generations
        first, end = (-(-row // G) for row in (rows.start, rows.stop))
        if first == end:
            return
        totals, lengths, right = (
            x.view(-1, G)[first:end]
            for x in (totals, experience.completion_mask.sum(1), experience.rewards[:, 0] >= self.pass_threshold)
        )
        for k in powers_of_two(G):
            self.window.mean(f"pass@{k}", pass_at(right, k))
        self.window.add({"reward_length_correlation": reward_length_correlation(totals, lengths)})
        if len(sources) <= MAX_SOURCES:
            observe_sources(self.window, (experience.sources or [])[::G][first:end], totals, lengths, right)

    def observe_work(
        self, experience: Experience, micro_batches: Sequence[list[int]], policy: nn.Module, *, share_prompt: bool
    ) -> None:
        """Log the share of padding in the update on ``micro_batches``, and count its floating-point operations."""
        shares = share_prompt and shares_prompts(policy)
        work = work_of(experience, micro_batches, shares)
        self._first_share = len(micro_batches[0]) / sum(map(len, micro_batches))
        total = work.real if packs(policy) else work.computed
        padding, computed = (torch.tensor(n) for n in (total - work.real, total))
        self.window.add({"padding_share": Mean(padding, computed)})
        if (flops := model_flops(policy, work)) is not None:
            self.window.mean("model_flops", torch.tensor(flops, dtype=torch.float64))

    def observe_loss(self, loss: Tensor, metrics: Mapping[str, Metric]) -> None:
        """Log the loss of one micro-batch, and metrics of it."""
        self.window.add(metrics)
        self.window.add({"loss": Mean(loss.detach(), torch.tensor(1))})

    def observe_backward(self, parameters: Iterable[nn.Parameter], trainer: Trainer) -> None:
        """Keep the norm of the gradient of the first of several micro-batches, which tells how noisy it is.

        It is not measured if losses are scaled (16-mixed) or gradients sharded.
        """
        is_first = int(cast(Mean, self.window.metrics["loss"]).count) == 1
        is_scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        if is_first and trainer.accumulate_grad_batches > 1 and not is_scaled:
            self._first_gradient = square_norm(parameters)

    def measure_gradient(self, parameters: Iterable[tuple[str, nn.Parameter]], trainer: Trainer) -> None:
        """Compute the norm of the accumulated gradient, before it is clipped, and its noise.

        Args:
            parameters: with their names.

        Raises:
            NonFiniteError: the gradient is not finite, and its step would break the weights.
        """
        parameters = list(parameters)
        norm, by_part = gradient_norms(parameters)
        if not norm.isfinite():
            self._require_loss_scaling(float(norm), trainer)
        self.window.mean("grad_norm", norm)
        for part, value in by_part.items():
            self.window.mean(f"grad_norm/{part}", value)
        if self._first_gradient is not None:
            # the gradient so far is a sum over the rows of the first micro-batch
            small = self._first_gradient.double() / self._first_share**2
            big_batch = self._samples * trainer.world_size
            small_batch = self._samples * self._first_share
            signal, noise = noise_scale(small, norm.double() ** 2, small_batch, big_batch)
            self.window.mean("noise_scale/signal", signal)
            self.window.mean("noise_scale/noise", noise)
        self.grad_norm = float(norm)
        if self._weights is None:
            self._weights = WeightSample(p for _, p in parameters)
        self._weights.before = self._weights.values()

    def learning_rate_scale(self) -> float:
        """√(ESS/B) of the completions of the optimizer step on all ranks; 1 if none of them is in the loss. Call it on
        every rank, after the last backward pass.

        Raises:
            UserError: the loss does not report the effective sample size.
        """
        share = self.window.so_far(SEQUENCE_ESS)
        if share is None:
            raise UserError(
                f"objective.ess_scaled_step is true, but compute_loss does not return the metric {SEQUENCE_ESS}; "
                "return those of policy_loss, or set it to false"
            )
        scale = 1.0 if math.isnan(share) else math.sqrt(share)
        self.window.mean("learning_rate_scale", torch.tensor(scale, dtype=torch.float64))
        return scale

    def _require_loss_scaling(self, norm: float, trainer: Trainer) -> None:
        """Raise for a gradient that is not finite, unless 16-mixed may have scaled the loss too far: its scaler then
        skips the step and halves the scale."""
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        loss = cast(Mean, self.window.metrics["loss"]).value
        # the gradient is summed over all ranks, while the loss is that of this rank
        is_broken = trainer.strategy.reduce_boolean_decision(not bool(loss.isfinite()), all=False)
        if scaler is not None and not is_broken and scaler.get_scale() >= 1:
            return
        problem = f"the loss is {float(loss)}" if is_broken else f"the gradient's norm is {norm}"
        scale = "" if scaler is None else f", with the loss scaled by {scaler.get_scale():g},"
        raise NonFiniteError(
            f"{problem} at optimizer step {trainer.global_step}{scale}: the step was skipped and the weights are "
            "unchanged. Look at the last logged ratios and log-prob differences. Lower the learning rate, set "
            "trainer.gradient_clip_val, or set trainer.precision to bf16-mixed"
        )

    def clip_gradient(self, optimizer: Optimizer, max_norm: float) -> None:
        """Scale the gradient so that the norm that was measured is at most ``max_norm``."""
        scale = max_norm / (self.grad_norm + 1e-6)
        if scale < 1:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.grad.mul_(scale)

    def compute(self, trainer: Trainer, further: Mapping[str, float]) -> dict[str, float]:
        """The metrics of the optimizer step over all ranks, and ``further`` ones. Call it on every rank."""
        self.window.add({"update_ratio": cast(WeightSample, self._weights).change()})
        self.window.stop_clock()
        values = self.window.reduce() | dict(further)
        values |= variance_shares(values, self._reward_names)
        values["tokens_per_second"] = self.completion_tokens / values["step_time"]
        if (flops := values.pop("model_flops", None)) is not None:
            dtype = compute_dtype_of(trainer.precision, cast(WeightSample, self._weights).parameters[0].dtype)
            if (peak := peak_flops(trainer.strategy.root_device, dtype)) is not None:
                values["mfu"] = flops / values["time/update"] / peak
        # Lightning repeats the last value of a metric that is not logged again
        self._logged |= values.keys()
        return dict.fromkeys(self._logged, float("nan")) | values
