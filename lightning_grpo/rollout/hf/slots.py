"""A key-value cache whose rows are conversations of different lengths, which come and go.

Shapes: R rows of a forward pass, S rows of the cache, T new positions, C cached positions, L columns, K key heads, D
head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from lightning_grpo.rollout.hf.decoding import CastLayer


@dataclass
class _Access:
    """What a forward pass reads and stores. It belongs to all layers, which don't refer to the cache itself: its memory
    is then freed with the last reference to it."""

    size: tuple[int, int] = (0, 0)
    """Rows and columns that have memory."""
    past: int = 0
    """Columns that come before the new ones in the attention mask."""
    rows: Tensor | None = None
    """The rows of the cache; None is the first ones, with a new token each."""
    stored: tuple[Tensor, ...] = ()
    """Where new positions are stored: for one token per row its row and column in the cache; otherwise for each new
    token its row and place in the forward pass, and its row and column in the cache."""


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
        self._max_rows = max_rows
        self._access = _Access()
        self._slot_layers = [_SlotLayer(self._access) for _ in self.layers]
        self.layers = [*self._slot_layers]

    def decode(self, lengths: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Compute one new token in each of the first R rows, which have ``lengths`` [R] cached positions.

        Returns:
            The attention mask [R, C + 1] and the positions [R, 1].
        """
        access = self._access
        self._reserve(len(lengths), max(lengths) + 1)
        positions = torch.tensor(lengths, device=device)
        access.rows, access.past = None, max(lengths)
        access.stored = (torch.arange(len(lengths), device=device), positions)
        columns = torch.arange(access.past + 1, device=device)
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
        device, access = new_mask.device, self._access
        row, kept = (torch.tensor(values, device=device) for values in (rows, lengths))
        positions = (kept[:, None] + new_mask.cumsum(1) - 1).clamp(min=0)
        line, time = new_mask.nonzero(as_tuple=True)
        access.rows, access.past = row, max(lengths)
        access.stored = (line, time, row[line], positions[line, time])
        self._reserve(max(rows) + 1, access.past + new_mask.shape[1])
        cached = torch.arange(access.past, device=device) < kept[:, None]
        return torch.cat([cached, new_mask], 1).long(), positions

    def copy(self, source: Sequence[int], target: Sequence[int], length: int) -> None:
        """Copy the first ``length`` columns of rows ``source`` to rows ``target``; both may have rows in common."""
        self._reserve(max(target) + 1, length)
        for layer in self._slot_layers:
            layer.copy(list(source), list(target), length)

    def _reserve(self, rows: int, columns: int) -> None:
        """Have memory for more rows and columns than now, so that it seldom grows."""
        S, L = self._access.size
        rows = S if rows <= S else max(rows, min(2 * S, self._max_rows))
        self._access.size = rows, L if columns <= L else max(columns, L + L // 2)


class _SlotLayer(CastLayer):
    def __init__(self, access: _Access) -> None:
        super().__init__()
        self._access = access

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.buffers = [x.new_zeros(0, x.shape[1], 0, x.shape[3], dtype=self.dtype) for x in (key_states, value_states)]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Store keys and values [R, K, T, D], and return those of the rows, [R, K, C + T, D]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._grow()
        access, shown = self._access, []
        for buffer, states in zip(self.buffers, (key_states.to(self.dtype), value_states.to(self.dtype)), strict=True):
            if access.rows is None:
                row, column = access.stored
                buffer[row, :, column] = states[:, :, 0]
                shown.append(buffer[: len(states), :, : access.past + 1])
            else:
                line, time, row, column = access.stored
                shown.append(torch.cat([buffer[access.rows, :, : access.past], states], 2))
                buffer[row, :, column] = states[line, :, time]
        return shown[0], shown[1]

    def get_seq_length(self) -> int:
        return self._access.past

    def copy(self, source: list[int], target: list[int], length: int) -> None:
        self._grow()
        for buffer in self.buffers:
            buffer[target, :, :length] = buffer[source, :, :length]

    def _grow(self) -> None:
        rows, columns = self._access.size
        for i, old in enumerate(self.buffers):
            if old.shape[0] < rows or old.shape[2] < columns:
                # Zeros, since attention multiplies the values of masked positions by 0.
                new = old.new_zeros(rows, old.shape[1], columns, old.shape[3])
                new[: old.shape[0], :, : old.shape[2]] = old
                self.buffers[i] = new
