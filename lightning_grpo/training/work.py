"""What an optimizer step computes: positions, padding among them, and floating-point operations.

Shapes: N completions on this rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from lightning_grpo.devices import known_gpu
from lightning_grpo.policy.load import base_model
from lightning_grpo.processor import parallel_speedup, product_rate
from lightning_grpo.rollout.types import Rollout, extents


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


def work_of(rollout: Rollout, micro_batches: Sequence[Sequence[int]], num_generations: int, share_prompt: bool) -> Work:
    """Count what the update computes on ``micro_batches`` of rows.

    Args:
        rollout: N completions, those of a group next to each other.
        micro_batches: rows of each.
        num_generations: completions per group.
        share_prompt: whether a prompt is computed once for the completions of it in a micro-batch.
    """
    prompts, completions = extents(rollout.prompt_mask.flip(1)).tolist(), extents(rollout.completion_mask).tolist()
    computed = real = pairs = 0
    for rows in micro_batches:
        owners = {row // num_generations: row for row in rows} if share_prompt else dict(enumerate(rows))
        P, T = (max(lengths[row] for row in rows) for lengths in (prompts, completions))
        # the last token predicts nothing, and is not computed
        computed += len(owners) * P + len(rows) * max(0, T - 1)
        for row in owners.values():
            real += prompts[row]
            pairs += prompts[row] ** 2 // 2
        for row in rows:
            t = max(0, completions[row] - 1)
            real += t
            pairs += t * prompts[row] + t**2 // 2
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
