"""A key-value cache whose rows are conversations of different lengths, which come and go.

Shapes: R rows of a forward pass, S rows of the cache, T new positions, C cached positions, L columns, K key heads, D
head size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from lightning_grpo.rollout.hf.decoding import CastLayer


class SlotCache(DynamicCache):
    """Position p of a conversation is stored in column p of its row. What is right of its end is never attended to.

    Before a forward pass, `prefill` or `decode` sets the rows that it computes.

    Args:
        config: a model for which `supports` is true.
        max_rows: the largest number of rows.
    """

    @staticmethod
    def supports(config: PretrainedConfig) -> bool:
        """Whether all layers of the model keep all positions."""
        layers = DynamicCache(config=config).layers
        return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)

    def __init__(self, config: PretrainedConfig, max_rows: int) -> None:
        super().__init__(config=config)
        self._slot_layers = [_SlotLayer(self) for _ in self.layers]
        self.layers = [*self._slot_layers]
        self.max_rows = max_rows
        self.size = (0, 0)
        """Rows and columns that have memory."""
        self.past = 0
        """Columns that come before the new ones in the attention mask."""
        self.rows: Tensor | None = None
        self.stored: tuple[Tensor, ...] = ()

    def decode(self, lengths: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Compute one new token in each of the first R rows, which have ``lengths`` [R] cached positions.

        Returns:
            The attention mask [R, C + 1] and the positions [R, 1].
        """
        self._reserve(len(lengths), max(lengths) + 1)
        self.rows, self.past = None, max(lengths)
        positions = torch.tensor(lengths, device=device)
        self.stored = (torch.arange(len(lengths), device=device), positions)
        columns = torch.arange(self.past + 1, device=device)
        return (columns <= positions[:, None]).long(), positions[:, None]

    def prefill(self, rows: Sequence[int], lengths: Sequence[int], new_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the new tokens of ``rows`` [R], which keep ``lengths`` [R] cached positions.

        Args:
            rows: indices of rows of the cache.
            lengths: cached positions that they keep.
            new_mask: [R, T] bool, left-padded, True on new tokens.

        Returns:
            The attention mask [R, C + T] and the positions [R, T].
        """
        device = new_mask.device
        self.rows, kept, self.past = (
            torch.tensor(rows, device=device),
            torch.tensor(lengths, device=device),
            max(lengths),
        )
        self._reserve(max(rows) + 1, self.past + new_mask.shape[1])
        positions = (kept[:, None] + new_mask.cumsum(1) - 1).clamp(min=0)
        line, time = new_mask.nonzero(as_tuple=True)
        self.stored = (line, time, self.rows[line], positions[line, time])
        cached = torch.arange(self.past, device=device) < kept[:, None]
        return torch.cat([cached, new_mask], 1).long(), positions

    def copy(self, source: Sequence[int], target: Sequence[int], length: int) -> None:
        """Copy the first ``length`` columns of rows ``source`` to rows ``target``; both may have rows in common."""
        self._reserve(max(target) + 1, length)
        for layer in self._slot_layers:
            layer.copy(list(source), list(target), length)

    def _reserve(self, rows: int, columns: int) -> None:
        """Have memory for more rows and columns than now, so that it seldom grows."""
        S, L = self.size
        rows = S if rows <= S else max(rows, min(2 * S, self.max_rows))
        self.size = rows, L if columns <= L else max(columns, L + L // 2)


class _SlotLayer(CastLayer):
    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.buffers = [x.new_zeros(0, x.shape[1], 0, x.shape[3], dtype=self.dtype) for x in (key_states, value_states)]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store keys and values [R, K, T, D], and return those of the rows, [R, K, C + T, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._grow()
        cache, shown = self.cache, []
        for buffer, states in zip(self.buffers, (key_states.to(self.dtype), value_states.to(self.dtype)), strict=True):
            if cache.rows is None:
                row, column = cache.stored
                buffer[row, :, column] = states[:, :, 0]
                shown.append(buffer[: len(states), :, : cache.past + 1])
            else:
                line, time, row, column = cache.stored
                shown.append(torch.cat([buffer[cache.rows, :, : cache.past], states], 2))
                buffer[row, :, column] = states[line, :, time]
        return shown[0], shown[1]

    def get_seq_length(self) -> int:
        return self.cache.past

    def copy(self, source: list[int], target: list[int], length: int) -> None:
        self._grow()
        for buffer in self.buffers:
            buffer[target, :, :length] = buffer[source, :, :length]

    def _grow(self) -> None:
        rows, columns = self.cache.size
        for i, old in enumerate(self.buffers):
            if old.shape[0] < rows or old.shape[2] < columns:
                # Zeros, since attention multiplies the values of masked positions by 0.
                new = old.new_zeros(rows, old.shape[1], columns, old.shape[3])
                new[: old.shape[0], :, : old.shape[2]] = old
                self.buffers[i] = new
