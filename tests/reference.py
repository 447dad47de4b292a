"""The definition of what the kernels compute: slow, [N, V] logits and all, and plain to read."""

import torch
from torch import Tensor

from lightning_grpo.objective import RolloutCorrection


def naive_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    bias: Tensor | None = None,
    scale: float = 1.0,
    entropy_grad: bool = False,
    grad_norm: bool = False,
) -> tuple[Tensor, ...]:
    """`linear_logprob` on whole logits, in float64 where the hidden states are, else in fp32."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = (logits if logits.dtype == torch.float64 else logits.float()) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    temperature = torch.as_tensor(temperature, dtype=logits.dtype, device=logits.device)
    logp = torch.log_softmax(logits / temperature.reshape(-1, 1), dim=-1)
    entropy = -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1)
    results = logp.gather(1, targets[:, None]).squeeze(1), entropy if entropy_grad else entropy.detach()
    if not grad_norm:
        return results
    slope = torch.nn.functional.one_hot(targets, logp.shape[1]) - logp.exp()
    return *results, slope.square().sum(-1)


class GivenWeight(RolloutCorrection):
    """A rollout correction whose weights ρ, [N, T] or [N, 1], were computed elsewhere."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        object.__setattr__(self, "given", weight)

    def weight(self, old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> Tensor:
        return self.given
