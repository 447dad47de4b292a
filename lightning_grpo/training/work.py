"""What an optimizer step computes: positions, padding among them, and floating-point operations.

Shapes: N completions on this rank.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn

from lightning_grpo.devices import known_gpu
from lightning_grpo.policy.load import base_model
from lightning_grpo.processor import parallel_speedup, product_rate
from lightning_grpo.rollout.types import Rollout, extents

T = TypeVar("T")


@dataclass(frozen=True)
class Work:
    """The positions that the update of one optimizer step computes on this rank."""

    computed: int
    """Positions, padding included."""
    real: int
    """Positions with tokens."""
    pairs: int
    """Pairs of a position with one that it attends to, of those with tokens."""
    scored: int
    """Tokens whose log-probs are computed."""


@dataclass(frozen=True)
class Lengths:
    """The tokens of each row of a rollout."""

    prompts: list[int]
    completions: list[int]
    owners: list[int]
    """For each row, the first row with the same prompt; the row itself if prompts are not shared."""
    packed: bool = False
    """Whether a forward pass computes one row without padding."""

    @classmethod
    def of(cls, rollout: Rollout, *, share_prompt: bool, packed: bool = False) -> "Lengths":
        """Count the tokens of N completions and of their prompts.

        Args:
            rollout: N completions.
            share_prompt: whether a forward pass computes a prompt once for all completions of it.
            packed: whether it computes one row without padding.
        """
        first: dict[bytes, int] = {}
        ids = rollout.prompt_ids.masked_fill(~rollout.prompt_mask, -1).cpu().numpy()
        owners = [first.setdefault(prompt.tobytes(), row) for row, prompt in enumerate(ids)]
        return cls(
            extents(rollout.prompt_mask.flip(1)).tolist(),
            extents(rollout.completion_mask).tolist(),
            owners if share_prompt else list(range(len(owners))),
            packed,
        )

    def tokens(self, rows: Sequence[int]) -> int:
        """The tokens of ``rows`` in one forward pass, padding included."""
        owners = {self.owners[row] for row in rows}
        if self.packed:
            return sum(self.prompts[row] for row in owners) + sum(max(1, self.completions[row]) for row in rows)
        prompt, completion = (max(lengths[row] for row in rows) for lengths in (self.prompts, self.completions))
        return len(owners) * prompt + len(rows) * max(1, completion)


def even_parts(items: Sequence[T], parts: int, cost: Callable[[Sequence[T]], int]) -> list[list[T]]:
    """Divide ``items`` into ``parts`` of consecutive ones so that the most expensive part costs as little as possible.

    Args:
        items: one or more. If they are fewer than ``parts``, each is a part.
        parts: number of parts.
        cost: of consecutive items; it must not decrease when one more is added.
    """
    limits = range(max(cost([item]) for item in items), cost(items))
    index = bisect_left(limits, True, key=lambda limit: len(parts_within(items, limit, cost)) <= parts)
    return parts_within(items, limits.start + index, cost, parts)


def parts_within(items: Sequence[T], limit: int, cost: Callable[[Sequence[T]], int], least: int = 1) -> list[list[T]]:
    """Divide ``items`` into parts of as many consecutive ones as cost at most ``limit``, or of a single one.

    There are at least ``least`` parts unless there are fewer items.
    """
    parts: list[list[T]] = []
    start = 0
    while start < len(items):
        ends = range(start + 1, max(start + 1, len(items) - max(0, least - len(parts) - 1)) + 1)
        end = start + max(1, bisect_right(ends, limit, key=lambda end: cost(items[start:end])))
        parts.append(list(items[start:end]))
        start = end
    return parts


def work_of(rollout: Rollout, micro_batches: Sequence[Sequence[int]], share_prompt: bool) -> Work:
    """Count what the update computes on ``micro_batches`` of rows.

    Args:
        rollout: N completions.
        micro_batches: rows of each.
        share_prompt: whether a prompt is computed once for the completions of it in a micro-batch.
    """
    lengths = Lengths.of(rollout, share_prompt=share_prompt)
    computed = real = pairs = 0
    for rows in micro_batches:
        # the last token of a completion predicts nothing, and is not computed
        computed += lengths.tokens(rows) - len(rows)
        for prompt in {lengths.owners[row]: lengths.prompts[row] for row in rows}.values():
            real += prompt
            pairs += prompt**2 // 2
        for row in rows:
            t = max(0, lengths.completions[row] - 1)
            real += t
            pairs += t * lengths.prompts[row] + t**2 // 2
    scored = int(rollout.completion_mask[[row for rows in micro_batches for row in rows]].sum())
    return Work(computed, real, pairs, scored)


def model_flops(policy: nn.Module, work: Work) -> float | None:
    """Floating-point operations of the model in forward and backward passes over ``work``, without recomputation.

    Per weight and position, 2 forward, 2 for the gradient of the input, and 2 for that of a weight that is trained; the
    head is used for the scored tokens only. Attention takes 12 per layer, pair of positions and width of all heads.
    None for models whose weights are not all used for each token (mixtures of experts).
    """
    model = base_model(policy)
    config = model.config.get_text_config()
    if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
        return None
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    flops = 0.0
    for p in policy.parameters():
        tokens = work.real
        if head is not None and p is head.weight:
            tokens = work.scored
        elif p.dim() < 2 or p is embedding.weight:
            continue
        flops += (6 if p.requires_grad else 4) * p.numel() * tokens
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return flops + 12.0 * config.num_hidden_layers * config.num_attention_heads * width * work.pairs


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of matrix products in ``dtype``: published for a known GPU, measured for a CPU, None for other devices."""
    if device.type == "cpu":
        return product_rate(dtype) * parallel_speedup()
    if device.type != "cuda" or (card := known_gpu(torch.cuda.get_device_name(device))) is None:
        return None
    if dtype != torch.float32:
        return card.flops
    return card.flops_fp32 if torch.get_float32_matmul_precision() == "highest" else None  # else TF32
