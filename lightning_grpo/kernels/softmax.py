"""The softmax of each row over the vocabulary, accumulated from blocks.

A block a [N, ≥ W] has the head's output for W consecutive ids of the vocabulary; columns past W are padding. z are the
logits of the sampled distribution. The statistics of a row are taken over its tokens *other than the target*:

    m  largest z so far      s  Σ exp(z − m)      t  Σ exp(z − m)·z      y  the target's z
                             q  Σ exp(z − m)², only if it is asked for

Excluding the target until the end keeps 1 − p(target) accurate if p(target) is nearly 1, as it is for most tokens that
the model has sampled.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lightning_grpo.errors import UserError

# Used instead of −inf, so that 0 · FLOOR is 0 and the softmax of a block without a finite logit is not NaN.
FLOOR = -1e30


class Transform(NamedTuple):
    """The map from the head's output to the logits: z = factor·a, or cap·tanh(factor·a / cap) with a softcap.

    Both are [N] in fp32 and include the temperature: factor = scale / τ, cap = softcap / τ.
    """

    factor: Tensor
    cap: Tensor | None

    @classmethod
    def build(
        cls,
        targets: Tensor,
        vocabulary: int,
        temperature: float | Tensor,
        softcap: float | None = None,
        scale: float = 1.0,
    ) -> "Transform":
        """Return the transform for the rows of ``targets`` [N].

        Raises:
            UserError: targets are not integers in [0, vocabulary), or a temperature or softcap is not positive. Values
                on a GPU are checked there, and CUDA then reports a failed assertion.
        """
        if targets.is_floating_point() or targets.dtype == torch.bool:
            raise UserError(f"targets are {targets.dtype}; give token ids as integers")
        if softcap is not None and not 0 < softcap < float("inf"):
            raise UserError(f"softcap is {softcap}; set it above 0, or to None")
        if targets.is_cuda:
            _assert_on_device((targets >= 0) & (targets < vocabulary), f"targets outside 0 to {vocabulary - 1}")
        elif targets.numel():
            low, high = torch.stack(targets.aminmax()).tolist()
            if low < 0 or high >= vocabulary:
                raise UserError(
                    f"targets range from {low} to {high}, but the ids of the head are 0 to {vocabulary - 1}"
                )
        temperature = _temperatures(temperature, targets)
        return cls(scale / temperature, None if softcap is None else softcap / temperature)

    def rows(self, index: slice | Tensor) -> "Transform":
        return Transform(self.factor[index], None if self.cap is None else self.cap[index])

    def logits(self, a: Tensor) -> Tensor:
        """Return z in a new fp32 tensor, at least FLOOR."""
        z = torch.mul(a, self.factor[:, None])
        if self.cap is not None:
            z.div_(self.cap[:, None]).tanh_().mul_(self.cap[:, None])
        return z.clamp_(min=FLOOR)

    def chain_(self, g: Tensor, z: Tensor) -> Tensor:
        """Return g·∂z/∂a without ``factor``, in place; it is cheaper to apply the factor to [N, H]."""
        return g if self.cap is None else g.mul_(1 - (z / self.cap[:, None]).square_().clamp_(max=1))


def _temperatures(temperature: float | Tensor, targets: Tensor) -> Tensor:
    """Return the temperature of each row of ``targets``, [N] in fp32."""
    if not isinstance(temperature, Tensor) or not temperature.dim():
        temperature = float(temperature)
        if not temperature > 0:
            raise UserError(f"temperature is {temperature}; set it above 0")
        # A copy to the GPU would wait for the device.
        return torch.full(targets.shape, temperature, dtype=torch.float32, device=targets.device)
    if temperature.shape != targets.shape:
        raise UserError(f"temperature has shape {tuple(temperature.shape)}; give a number, or {tuple(targets.shape)}")
    if temperature.is_cuda:
        _assert_on_device(temperature > 0, "a temperature that is not positive")
    elif not (temperature > 0).all():
        raise UserError(f"temperature is {float(temperature.min())}; set it above 0")
    return temperature.to(targets.device, torch.float32)


def _assert_on_device(condition: Tensor, problem: str) -> None:
    """Check a condition on its device, without waiting for the result."""
    torch._assert_async(condition.all(), f"linear_logprob got {problem}")


class Statistics(NamedTuple):
    """m, s, t, y and perhaps q as defined in the module docstring, each [N] in fp32."""

    m: Tensor
    s: Tensor
    t: Tensor
    y: Tensor
    q: Tensor | None = None

    @classmethod
    def empty(cls, n: int, device: torch.device, *, squares: bool = False) -> "Statistics":
        # Not torch's default dtype, which Lightning changes in true half precision.
        zeros = torch.zeros(4 if squares else 3, n, dtype=torch.float32, device=device)
        return cls(torch.full((n,), FLOOR, dtype=torch.float32, device=device), *zeros.unbind())

    def rows(self, index: slice) -> "Statistics":
        return Statistics(*(None if x is None else x[index] for x in self))

    def grad_norm(self, softmax: "Softmax") -> Tensor:
        """‖∂logprob/∂z‖² = ‖onehot − p‖² = (1 − p(target))² + Σ p² over the other tokens, [N]."""
        return softmax.rest.square() * (1 + self.q / self.s.square())

    def finish(self) -> "Softmax":
        m = torch.maximum(self.m, self.y)
        shrink = (self.m - m).exp()
        target = (self.y - m).exp()
        total = self.s * shrink + target
        log_total = total.log()
        mean = (self.t * shrink + target * self.y) / total
        return Softmax(self.y - m - log_total, m + log_total - mean, m + log_total, self.s * shrink / total)


class Softmax(NamedTuple):
    """For each row, [N] in fp32: the log-prob of the target, the entropy, log Σ exp z, and 1 − p(target)."""

    logprob: Tensor
    entropy: Tensor
    lse: Tensor
    rest: Tensor

    def rows(self, index: slice | Tensor) -> "Softmax":
        return Softmax(*(x[index] for x in self))


def check_type(name: str, x: Tensor) -> None:
    """Raise `UserError` unless ``x`` has a dtype that the kernels support."""
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"{name} is {x.dtype}; the log-prob kernels take float32, bfloat16 and float16")


def targets_within(targets: Tensor, ids: slice) -> tuple[Tensor, Tensor]:
    """Return the rows whose target is in the block, and the columns of those targets."""
    rows = ((targets >= ids.start) & (targets < ids.stop)).nonzero().squeeze(1)
    return rows, targets[rows] - ids.start
