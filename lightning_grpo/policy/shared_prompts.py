"""A prompt that is computed once for several forward and backward passes over its completions.

The prompt's forward keeps its graph. All passes but the last see its keys and values detached, and sum up their
gradients, which the backward of the last pass adds to its own before it goes on through the prompt.

Shapes: H hidden.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer


def prompts_of_passes(count: int) -> list["PromptOfPass | None"]:
    """Return what each of ``count`` passes over completions of one prompt needs; None if it is a single pass."""
    stored = _Stored()
    return [PromptOfPass(stored, k == count - 1) for k in range(count)] if count > 1 else [None]


@dataclass
class _Stored:
    live: list[Tensor] = field(default_factory=list)
    """The prompt's last hidden state [1, 1, H], and the keys and values of each layer."""
    detached: list[Tensor] = field(default_factory=list)
    """The same without their graph; their gradients are sums over passes."""
    cache: DynamicCache | None = None


@dataclass
class PromptOfPass:
    """The prompt of one of several passes."""

    _stored: _Stored
    _is_last: bool

    def cache(self, compute: Callable[[], tuple[DynamicCache, Tensor]]) -> tuple[DynamicCache, Tensor]:
        """Return a cache that the pass may change, and the last hidden state [1, 1, H].

        ``compute`` runs the prompt and returns both; it is called in the first pass.
        """
        stored = self._stored
        if stored.cache is None:
            stored.cache, last = compute()
            stored.live = [last, *(x for layer in _layers(stored.cache) for x in (layer.keys, layer.values))]
            stored.detached = [x.detach().requires_grad_(x.requires_grad) for x in stored.live]
        if not self._is_last:
            return _copy(stored.cache, stored.detached)
        for live, detached in zip(stored.live, stored.detached, strict=True):
            if live.requires_grad:
                live.register_hook(lambda grad, sums=detached: grad if sums.grad is None else grad + sums.grad)
        return _copy(stored.cache, stored.live)


def _copy(cache: DynamicCache, tensors: Sequence[Tensor]) -> tuple[DynamicCache, Tensor]:
    """Return a copy of ``cache`` with other keys and values, and the last hidden state."""
    last, *keys_and_values = tensors
    cache = copy.copy(cache)
    cache.layers = [copy.copy(layer) for layer in cache.layers]
    for layer, keys, values in zip(_layers(cache), keys_and_values[::2], keys_and_values[1::2], strict=True):
        layer.keys, layer.values = keys, values
    return cache, last


def _layers(cache: DynamicCache) -> list[DynamicLayer]:
    return cast(list[DynamicLayer], cache.layers)
