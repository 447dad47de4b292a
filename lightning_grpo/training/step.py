"""What happens around an optimizer step: token counts before it, the gradient's norm, clipping, and its metrics.

Shapes: N completions on this rank, n of them in an optimizer step, R rewards.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
from lightning import Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_grpo.errors import NonFiniteError
from lightning_grpo.metrics import Max, Mean, Metric, Window
from lightning_grpo.monitor.observe import memory_in_use, observe_completions, observe_rewards
from lightning_grpo.objective import ObjectiveConfig
from lightning_grpo.training.experience import Experience


class StepMonitor:
    """Collects the metrics of an optimizer step over its micro-batches and all ranks."""

    def __init__(self) -> None:
        self.window = Window()
        self.reset()

    def reset(self) -> None:
        """Forget what earlier runs logged."""
        self._logged: set[str] = set()

    def begin(self) -> None:
        """An optimizer step begins, possibly with the sampling of a rollout."""
        self.window = Window()
        for phase in ("sync", "rollout", "reward", "score"):
            self.window.seconds(phase, 0.0)

    def observe_samples(
        self,
        experience: Experience,
        rows: slice,
        objective: ObjectiveConfig,
        reward_names: Sequence[str],
        reward_weights: Tensor,
        trainer: Trainer,
    ) -> None:
        """Log the ``rows`` of the optimizer step, and count their tokens over all ranks."""
        mask, truncated = experience.completion_mask[rows], experience.truncated[rows]
        observe_completions(self.window, mask.sum(1), truncated)
        observe_rewards(self.window, experience.rewards[rows], reward_names, reward_weights)
        age = (trainer.global_step - experience.versions[rows])[mask]
        self.window.mean("staleness", age)
        self.window.add({"staleness_max": Max(age.amax())})
        counts = torch.stack(
            [objective.loss_mask(mask, truncated).sum(), mask.sum(), experience.prompt_mask[rows].sum()]
        )
        counts = trainer.strategy.reduce(counts.to(trainer.strategy.root_device), reduce_op="sum")
        self.loss_tokens, self.completion_tokens, self.prompt_tokens = counts.tolist()

    def observe_loss(self, loss: Tensor, metrics: Mapping[str, Metric]) -> None:
        """Log the loss of one micro-batch, and metrics of it."""
        self.window.add(metrics)
        self.window.add({"loss": Mean(loss.detach(), torch.tensor(1))})

    def measure_gradient(self, parameters: Iterable[nn.Parameter], trainer: Trainer) -> None:
        """Compute the norm of the accumulated gradient, before it is clipped.

        Raises:
            NonFiniteError: the gradient is not finite, and its step would break the weights.
        """
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if not norm.isfinite():
            self._require_loss_scaling(float(norm), trainer)
        self.window.mean("grad_norm", norm)
        self.grad_norm = float(norm)

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

    def compute(self, device: torch.device, further: Mapping[str, float]) -> dict[str, float]:
        """The metrics of the optimizer step over all ranks, and ``further`` ones. Call it on every rank."""
        self.window.stop_clock()
        self.window.add({"memory/gib": Max(torch.tensor(memory_in_use(device), dtype=torch.float64))})
        values = self.window.reduce() | dict(further)
        values["tokens_per_second"] = self.completion_tokens / values["step_time"]
        # Lightning repeats the last value of a metric that is not logged again
        self._logged |= values.keys()
        return dict.fromkeys(self._logged, float("nan")) | values
