"""Prompts that are read and encoded while they are served, for data sets that are too large to be read at start."""

from collections.abc import Callable, Iterator, Sequence, Set
from itertools import islice
from typing import Any

from lightning_grpo.data.encoding import Encoder, Remarks
from lightning_grpo.data.prompts import Prompt
from lightning_grpo.data.rows import Row
from lightning_grpo.errors import UserError

ENDLESS = 2**40
"""The length of prompts whose number is unknown."""
FIRST = 100
"""Number of prompts that are read at start, to check them and to recognize the data."""

Rows = Callable[[], Iterator[tuple[str, Row]]]


class StreamedPrompts(Sequence[Prompt]):
    """The prompts of a source in its order, pass after pass; only those that are in use are in memory.

    Index i is the i-th prompt that is served, over all passes. Prompts before `forget` can't be read any more.

    Args:
        rows: opens the source: an iterator over its rows with their locations.
        encoder: encodes the rows.
        held_out: token ids of held-out prompts, which are left out.
        name: of the source, for messages.
    """

    def __init__(self, rows: Rows, encoder: Encoder, *, held_out: Set[tuple[int, ...]], name: str) -> None:
        self.rows = rows
        self.encoder = encoder
        self.held_out = held_out
        self.name = name
        self.remarks = Remarks()
        self._start(prompt=0, row=0)

    def _start(self, prompt: int, row: int) -> None:
        self._prompts: dict[int, Prompt] = {}
        self._next = prompt
        self._encoded = self._encode(row)

    def _encode(self, row: int) -> Iterator[Prompt]:
        """All prompts from row ``row`` on, and then all prompts of every further pass."""
        while True:
            found = False
            rows = islice(self.rows(), row, None)
            for prompts in self.encoder.encode_in_order(rows, self.remarks, first=row):
                for prompt in prompts:
                    if tuple(prompt.ids) not in self.held_out:
                        found = True
                        yield prompt
            if not found and row == 0:
                raise UserError(
                    f"data.source is {self.name!r}, which has no prompt of at most max_prompt_length = "
                    f"{self.encoder.max_prompt_length} tokens that is not held out; set another source"
                )
            row = 0

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(ENDLESS))]
        while i >= self._next:
            self._prompts[self._next] = next(self._encoded)
            self._next += 1
        return self._prompts[i]

    def forget(self, before: int) -> None:
        """Free the prompts before index ``before``."""
        for i in [i for i in self._prompts if i < before]:
            del self._prompts[i]

    def position(self, i: int) -> dict[str, int]:
        """Where prompt ``i`` is found again; see `seek`."""
        return {"prompt": i, "row": self[i].index}

    def seek(self, position: dict[str, int]) -> None:
        """Continue with the prompt of a `position`, in this or another process."""
        self._start(**position)
