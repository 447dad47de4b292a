"""Log-probabilities of tokens from hidden states, without materializing the logits of a whole batch."""

from lightning_grpo.kernels.linear import linear_logprob
from lightning_grpo.kernels.logits import logits_logprob

__all__ = ["linear_logprob", "logits_logprob"]
