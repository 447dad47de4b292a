"""The completions of a micro-batch in one row without padding, each prompt once.

The row holds, for each prompt, its tokens and then those of its completions, each without its last token, which
predicts nothing. The positions of a completion continue those of its prompt. A completion's token attends to its prompt
and to the completion up to itself.

Shapes: N completions, U prompts, P prompt length, T completion length, L tokens of the row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

from lightning_grpo.kernels.attention import Block

# Each block has a cost of its own: short sequences are merged into blocks of up to MERGED queries. Longer ones are
# divided, so that few masked pairs are computed and a block fits into caches.
MERGED, QUERIES, PROBABILITIES = 64, 256, 1 << 20


def packed_length(prompts: Sequence[int], completions: Sequence[int]) -> int:
    """The number of tokens of a row with prompts and completions of these lengths."""
    return sum(prompts) + sum(max(0, length - 1) for length in completions)


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the sequences of a row are. It reaches each layer's attention as the argument ``layout`` of the model."""

    prompts: Sequence[int]
    """[U] lengths."""
    completions: Sequence[Sequence[int]]
    """[U] lengths of each prompt's completions, without their last tokens."""
    _blocks: dict[tuple, list[Block]] = field(default_factory=dict, repr=False)

    def bounds(self) -> Iterator[list[int]]:
        """Yield, for each prompt, where it begins, and where it and each of its completions end."""
        start = 0
        for prompt, completions in zip(self.prompts, self.completions, strict=True):
            bounds = [start, start + prompt]
            for length in completions:
                bounds.append(bounds[-1] + length)
            yield bounds
            start = bounds[-1]

    def positions(self) -> Tensor:
        """[L] int64, the position of each token in its sequence."""
        parts = []
        for prompt, completions in zip(self.prompts, self.completions, strict=True):
            parts += [torch.arange(prompt), *(torch.arange(prompt, prompt + length) for length in completions)]
        return torch.cat(parts)

    def blocks(self, heads: int, window: int | None = None) -> list[Block]:
        """Return the blocks of attention with ``heads`` query heads, to at most the last ``window`` positions."""
        if (heads, window) not in self._blocks:
            self._blocks[heads, window] = [x for bounds in self.bounds() for x in _blocks(bounds, heads, window)]
        return self._blocks[heads, window]


def _blocks(bounds: list[int], heads: int, window: int | None) -> Iterator[Block]:
    """Yield the blocks of a prompt and its completions."""
    start, prompt_end, *_ = bounds
    sequences = list(pairwise(bounds))
    begins = torch.cat([torch.full((end - begin,), begin) for begin, end in sequences])
    positions = torch.arange(start, bounds[-1]) - begins + (begins >= prompt_end) * (prompt_end - start)
    longest = prompt_end - start + max((end - begin for begin, end in sequences[1:]), default=0)
    for begin, first, last in _pieces(bounds, max(MERGED, min(QUERIES, PROBABILITIES // (heads * longest)))):
        shared, own = slice(start, min(begin, prompt_end)), slice(begin, last)
        queries, keys = torch.arange(first, last)[:, None], torch.arange(begin, last)
        sees = (keys <= queries) & ((keys >= begins[queries - start]) | (keys < prompt_end))
        if window is not None and window < longest:
            keys = torch.cat([torch.arange(shared.start, shared.stop), keys])
            sees = torch.cat([sees.new_ones(last - first, shared.stop - start), sees], 1)
            sees &= positions[queries - start] - positions[keys - start] < window
        yield Block(slice(first, last), shared, own, ~sees)


def _pieces(bounds: list[int], most: int) -> Iterator[tuple[int, int, int]]:
    """Yield pieces of several short sequences with these bounds, or of at most ``most`` tokens of a long one.

    The first number is where the sequence of the piece's first token begins.
    """
    first = bounds[0]
    for begin, end in pairwise(bounds):
        if end - first > MERGED and first < begin:
            yield first, first, begin
            first = begin
        if end - begin > MERGED:
            for piece, last in pairwise([*range(begin, end, most), end]):
                yield begin, piece, last
            first = end
    if first < bounds[-1]:
        yield first, first, bounds[-1]


@dataclass(frozen=True)
class PackedRow:
    """A micro-batch as one row."""

    ids: Tensor
    """[1, L] int64."""
    layout: Layout
    predicting: Tensor
    """[N, T] int64, index of the token that predicts each completion token; meaningless for padding."""

    def inputs(self) -> dict:
        """The model's arguments."""
        return {
            "input_ids": self.ids,
            "attention_mask": torch.ones_like(self.ids),
            "position_ids": self.layout.positions()[None],
            "layout": self.layout,
            "use_cache": False,
        }


def pack(
    prompt_ids: Tensor, prompt_mask: Tensor, completion_ids: Tensor, context: Tensor, *, share_prompt: bool
) -> PackedRow:
    """Return the row of a micro-batch.

    Args:
        prompt_ids: [N, P] int64.
        prompt_mask: [N, P] bool, True on real tokens.
        completion_ids: [N, T] int64, right-padded.
        context: [N, T] bool, True on real tokens.
        share_prompt: have a prompt of several completions once, and not with each of them.
    """
    prompts = [tuple(ids[mask].tolist()) for ids, mask in zip(prompt_ids, prompt_mask, strict=True)]
    groups: dict[object, list[int]] = {}
    for row, prompt in enumerate(prompts):
        groups.setdefault(prompt if share_prompt else row, []).append(row)
    lengths = (context.sum(1) - 1).clamp(min=0).tolist()
    rows = list(groups.values())
    layout = Layout([len(prompts[group[0]]) for group in rows], [[lengths[row] for row in group] for group in rows])
    predicting = torch.zeros_like(completion_ids)
    ids = []
    for group, (_, prompt_end, *ends) in zip(rows, layout.bounds(), strict=True):
        ids.append(torch.tensor(prompts[group[0]]))
        for row, end in zip(group, ends, strict=True):
            ids.append(completion_ids[row, : lengths[row]])
            predicting[row] = torch.arange(end - lengths[row] - 1, end - lengths[row] - 1 + completion_ids.shape[1])
            predicting[row, 0] = prompt_end - 1
    return PackedRow(torch.cat(ids)[None], layout, predicting)
