"""Faster token-by-token sampling with Hugging Face modules.

Shapes: R rows, T new positions, L cached positions, K key heads, D head size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from lightning_grpo.policy.attention import DECODING_NAME


class CastLayer(DynamicLayer):
    """A key-value cache layer that under autocast stores the dtype of autocast, so that attention casts no position
    twice."""

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        if torch.is_autocast_enabled(self.device.type):
            self.dtype = torch.get_autocast_dtype(self.device.type)


class BufferedLayer(CastLayer):
    """A key-value cache layer with memory for ``length`` positions, so that appending a token copies no other."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate memory for the rows of ``key_states`` and ``value_states`` [R, K, T, D]."""
        super().lazy_initialization(key_states, value_states)
        self.buffers = tuple(
            x.new_empty(*x.shape[:2], self.length, x.shape[3], dtype=self.dtype) for x in (key_states, value_states)
        )
        self._show(0)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append keys and values [R, K, T, D], and return all of them, [R, K, L, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = states
        return self._show(stop)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, in this order. Rows that keep their place are not copied."""
        R, length, earlier = len(indices), self.get_seq_length(), self.buffers
        moved = torch.arange(R, device=indices.device)
        if len(earlier[0]) < R:
            self.buffers = tuple(buffer.new_empty(R, *buffer.shape[1:]) for buffer in earlier)
        else:
            self.buffers = tuple(buffer[:R] for buffer in earlier)
            moved = moved[moved != indices]
        for buffer, old in zip(self.buffers, earlier, strict=True):
            buffer[moved, :, :length] = old[indices[moved], :, :length]
        self._show(length)

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)
        return self.keys, self.values


def buffered_cache(config: PretrainedConfig, length: int) -> DynamicCache:
    """Return the model's cache, with memory for ``length`` positions in layers that keep all of them."""
    cache = DynamicCache(config=config)
    cache.layers = [BufferedLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@contextmanager
def decoding_mode(model: nn.Module) -> Iterator[None]:
    """Make ``model`` use `decode_attention` instead of SDPA, and cast its weights once instead of for each token.

    Models without a choice of attention, such as Falcon, keep their own. If the model runs under autocast, enter this
    context inside it.
    """
    base = cast(PreTrainedModel, model)  # PEFT's wrapper has the attributes of its model
    config = base.config.get_text_config()
    previous, cached = config._attn_implementation, torch.is_autocast_cache_enabled()
    if str(previous).startswith("sdpa") and base._can_set_attn_implementation():
        config._attn_implementation = DECODING_NAME
    torch.set_autocast_cache_enabled(True)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        # Later passes with gradients must not find copies that have none.
        torch.clear_autocast_cache()
        config._attn_implementation = previous
