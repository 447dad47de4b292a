"""What makes Hugging Face modules quick at sampling token by token.

Shapes: R rows, T new positions, L cached positions, H query heads, K key heads, D head size.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "sdpa_one_query"


class BufferedLayer(DynamicLayer):
    """A key-value cache layer with room for ``length`` positions from the start: tokens are written, none is copied.

    Under autocast it holds what attention would cast everything to for each token anew.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for the rows of ``key_states`` and ``value_states`` [R, K, T, D]."""
        super().lazy_initialization(key_states, value_states)
        kind = self.device.type
        if torch.is_autocast_enabled(kind):
            self.dtype = torch.get_autocast_dtype(kind)
        self.buffers = tuple(
            x.new_empty(*x.shape[:2], self.length, x.shape[3], dtype=self.dtype) for x in (key_states, value_states)
        )
        self._show(0)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Append [R, K, T, D] of each; returns all of them, [R, K, L, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        stop = start + key_states.shape[2]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, start:stop] = states
        return self._show(stop)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order."""
        self.buffers = tuple(buffer[indices] for buffer in self.buffers)
        self._show(self.get_seq_length())

    def _show(self, length: int) -> tuple[Tensor, Tensor]:
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)
        return self.keys, self.values


def buffered_cache(config: PretrainedConfig, length: int) -> DynamicCache:
    """The model's own kind of cache, with room for ``length`` positions in the layers that keep all of them."""
    cache = DynamicCache(config=config)
    cache.layers = [BufferedLayer(length) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options
) -> tuple[Tensor, None]:
    """transformers' SDPA [R, T, H, D]; for one query a row, the heads that share keys stand in the place of queries.

    The keys are then neither repeated for each of them nor read more than once.
    """
    rows, heads, queries, size = query.shape
    plain = options.get("position_bias") is None and (attention_mask is None or attention_mask.shape[1] == 1)
    if queries > 1 or not plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    folded = query.reshape(rows, key.shape[1], -1, size)
    found = scaled_dot_product_attention(folded, key, value, attn_mask=attention_mask, scale=options.get("scaling"))
    return found.reshape(rows, 1, heads, -1), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)


@contextmanager
def quick_decoding(model: nn.Module) -> Iterator[None]:
    """Let ``model`` attend with `attend` where it would use SDPA, and cast its weights once, not for each token.

    A model such as Falcon, which isn't given its attention by name, keeps its own.

    To be entered under the autocast that the model runs in, where there is one.
    """
    config = model.config.get_text_config()
    own, cached = config._attn_implementation, torch.is_autocast_cache_enabled()
    if str(own).startswith("sdpa") and model._can_set_attn_implementation():
        config._attn_implementation = NAME
    torch.set_autocast_cache_enabled(True)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)
        # Copies made without gradients must not be found by a pass that wants them.
        torch.clear_autocast_cache()
        config._attn_implementation = own
