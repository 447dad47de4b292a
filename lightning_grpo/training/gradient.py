"""Measurements of the gradient and of an optimizer step: norms by part of the model, noise, and the change of weights.

Nothing here waits for a GPU: values stay tensors on its device.
"""

import re
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_grpo.metrics import NormRatio

PARTS = {
    "norm": re.compile(r"norm|\bln_"),
    "head": re.compile(r"lm_head|embed_out"),
    "embedding": re.compile(r"embed|\bwte\b|\bwpe\b"),
    "attention": re.compile(r"attn|attention"),
    "mlp": re.compile(r"mlp|feed_forward|ffn|moe|expert|\bfc\d?\b"),
}
"""Parts of a transformer by the names of transformers' modules. The first that matches counts: post_attention_layernorm
is a norm. An adapter's name contains that of the module that it adapts."""

SAMPLE = 2**15
"""Number of weights that estimate the size of a step."""


def part_of(name: str) -> str | None:
    """The part of the model that a parameter belongs to, by its name; None if the name does not tell."""
    return next((part for part, pattern in PARTS.items() if pattern.search(name)), None)


def gradient_norms(parameters: Iterable[tuple[str, nn.Parameter]]) -> tuple[Tensor, dict[str, Tensor]]:
    """The norm of the gradient of all ``parameters``, given with their names, and of those of each part of the model.

    A head that is tied to the embedding has one gradient with it, which counts as the embedding's.
    """
    gradients = [(part_of(name), p.grad) for name, p in parameters if p.grad is not None]
    norms = _norms([gradient for _, gradient in gradients])
    parts = [part for part, _ in gradients]
    places = {part: [i for i, of in enumerate(parts) if of == part] for part in PARTS if part in parts}
    by_part = {part: torch.linalg.vector_norm(norms[index]) for part, index in places.items()}
    return torch.linalg.vector_norm(norms), by_part


def _norms(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of each gradient, over all ranks that hold shards of it."""
    norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients])
    return norms.full_tensor() if isinstance(norms, DTensor) else norms


def square_norm(parameters: Iterable[nn.Parameter]) -> Tensor | None:
    """‖g‖² of the gradient on this rank; None if it is sharded."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if any(isinstance(gradient, DTensor) for gradient in gradients):
        return None
    return _norms(gradients).square().sum()


def noise_scale(small: Tensor, big: Tensor, small_batch: float | Tensor, big_batch: int) -> tuple[Tensor, Tensor]:
    """Unbiased estimates of |G|² and tr Σ, the squared norm of the true gradient and the variance of the gradient of
    one completion (McCandlish et al. 2018, arXiv:1812.06162, appendix A.1).

    Args:
        small: the squared norm of the mean gradient of ``small_batch`` completions.
        big: that of ``big_batch`` completions.
    """
    signal = (big_batch * big - small_batch * small) / (big_batch - small_batch)
    noise = (small - big) / (1 / small_batch - 1 / big_batch)
    return signal, noise


class WeightSample:
    """A fixed random subset of the trained weights, from which the size of a step is estimated.

    Sharded weights are sampled from the shard of this rank.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], size: int = SAMPLE) -> None:
        self.parameters = [p for p in parameters if p.requires_grad]
        numbers = [_local(p).numel() for p in self.parameters]
        share = min(1.0, size / max(1, sum(numbers)))
        random = torch.Generator().manual_seed(0)
        self.places = [
            torch.randint(n, (min(n, max(1, round(n * share))),), generator=random).to(_local(p).device)
            if share < 1
            else torch.arange(n, device=_local(p).device)
            for p, n in zip(self.parameters, numbers, strict=True)
        ]
        self.before: Tensor | None = None

    def values(self) -> Tensor:
        """The sampled weights, as one vector in float32."""
        with torch.no_grad():
            pairs = zip(self.parameters, self.places, strict=True)
            return torch.cat([(w := _local(p).flatten())[places.to(w.device)].float() for p, places in pairs])

    def change(self) -> NormRatio:
        """‖Δw‖ / ‖w‖ since ``before`` was set to `values`."""
        before = cast(Tensor, self.before)
        self.before, after = None, self.values()
        return NormRatio((after - before).double().square().sum(), before.double().square().sum())


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
