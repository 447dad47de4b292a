"""Compute the sampled distribution from logits, and draw tokens from it. Shapes: R rows, V vocabulary."""

from math import log

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_grpo.errors import UserError
from lightning_grpo.rollout.types import Sampling


def sampled_logprobs(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """Return the log-probs of the sampled distribution, −inf for excluded tokens.

    The order is that of vLLM: repetition penalty, temperature, min-p, top-k, top-p. At temperature 0 (greedy) the
    log-probs are those of temperature 1.

    Args:
        logits: [R, V].
        sampling: how to sample.
        seen: [R, V] bool, tokens of the prompt and of the completion so far; required for a repetition penalty.

    Returns:
        [R, V] float32.
    """
    logits = logits.float()
    if sampling.repetition_penalty != 1:
        if seen is None:
            raise UserError("a repetition penalty needs the tokens seen so far")
        penalized = torch.where(logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty)
        logits = torch.where(seen, penalized, logits)
    if sampling.temperature not in (0, 1):
        logits = logits / sampling.temperature
    if sampling.min_p > 0:
        floor = logits.amax(-1, keepdim=True) + log(sampling.min_p)
        logits = logits.masked_fill(logits < floor, -torch.inf)
    if 0 < sampling.top_k < logits.shape[-1]:
        kth = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p < 1:
        ascending, order = logits.sort(-1)
        below = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        below[:, -1] = False
        logits = logits.masked_fill(torch.zeros_like(below).scatter(-1, order, below), -torch.inf)
    return logits.log_softmax(-1)


def draw(logprobs: Tensor, uniforms: Tensor, *, greedy: bool = False) -> Tensor:
    """Draw one token per row by inverting the cumulative distribution at `uniforms`; the most likely one if `greedy`.

    Probabilities are accumulated over blocks of tokens first, and then within one block. This is done in float64, since
    50,000 additions in float32 would lose the tail; it takes a fiftieth of the time of a float64 sum over all tokens.

    Args:
        logprobs: [R, V]; −inf excludes a token.
        uniforms: [R] float64 in [0, 1).

    Returns:
        [R] int64.
    """
    if greedy:
        return logprobs.argmax(-1)
    R, V = logprobs.shape
    size = 256
    blocks = pad(logprobs.exp(), (0, -V % size)).view(R, -1, size)
    mass = blocks.sum(-1).double()
    cdf = mass.cumsum(-1)
    threshold = uniforms.to(cdf)[:, None] * cdf[:, -1:]
    block = torch.searchsorted(cdf, threshold, right=True).clamp(max=cdf.shape[1] - 1)
    chosen = mass.gather(1, block)
    # The position within the block is relative, since the sums of the two levels differ in their last bits.
    share = ((threshold - (cdf.gather(1, block) - chosen)) / chosen).clamp(0, 1 - 2**-53)
    inner = blocks[torch.arange(R, device=block.device), block[:, 0]].double().cumsum(-1)
    token = torch.searchsorted(inner, share * inner[:, -1:], right=True)
    return (block * size + token)[:, 0]
