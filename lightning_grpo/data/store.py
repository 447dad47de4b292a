"""Encoded prompts in memory-mapped files, which later runs with the same data and options read in seconds."""

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock

from lightning_grpo.data.prompts import Encoded, Prompt, encoded_columns
from lightning_grpo.errors import UserError

STORED_FROM = 2_000
"""Number of prompts from which they are stored."""
KEPT_DAYS = 30
"""Days after their last use for which prompts are kept."""
SCHEMA = pa.schema(
    [
        ("index", pa.int64()),
        ("place", pa.string()),
        ("ids", pa.list_(pa.int32())),
        ("messages", pa.string()),
        ("columns", pa.string()),
        ("rewards", pa.list_(pa.string())),
        ("source", pa.string()),
    ]
)
"""Fields of `Prompt`, with messages as JSON and columns as `encoded_columns`, and the property ``source``."""


def cache_folder() -> Path:
    """Return ``$LIGHTNING_GRPO_PROMPTS``, or lightning_grpo/prompts in the user's cache folder."""
    if given := os.environ.get("LIGHTNING_GRPO_PROMPTS"):
        return Path(given)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "lightning_grpo" / "prompts"


@contextmanager
def entry(key: str) -> Iterator[Path]:
    """A folder for the prompts with the key ``key``, which other processes don't use meanwhile.

    Folders that were not used for `KEPT_DAYS` are deleted.
    """
    root = cache_folder()
    folder = root / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.utime(folder)
    except OSError as error:
        raise UserError(
            f"prompts can't be stored in {root}: {error.strerror}; set data.cache to false, or LIGHTNING_GRPO_PROMPTS "
            "to another folder"
        ) from error
    with FileLock(folder / "lock"):
        yield folder
    for other in root.iterdir():
        with suppress(OSError):
            if time.time() - other.stat().st_mtime > KEPT_DAYS * 86_400:
                shutil.rmtree(other)


class PromptTable(Sequence[Prompt]):
    """Prompts in an Arrow table, which are decoded when they are read.

    Args:
        table: columns as in `SCHEMA`.
        rows: the rows of the table to use. None: all.
        folder: where `accept` stores that these prompts were accepted. None: nowhere.
    """

    def __init__(self, table: pa.Table, rows: np.ndarray | None = None, folder: Path | None = None) -> None:
        self.table = table
        self.rows = np.arange(len(table)) if rows is None else rows
        self.folder = folder

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return PromptTable(self.table, self.rows[i])
        return _prompt(self.table.slice(self.rows[i], 1).to_pylist()[0])

    def __iter__(self) -> Iterator[Prompt]:
        for batch in self._batches(self.table):
            yield from map(_prompt, batch.to_pylist())

    def encoded(self) -> Iterator[Encoded]:
        """Index, token ids and columns of each prompt, without decoding them."""
        for batch in self._batches(self.table.select(["index", "ids", "columns"])):
            index, lists, columns = batch.columns
            values, ends = lists.flatten().to_numpy(), pc.list_value_length(lists).to_numpy().cumsum()
            start = 0
            for i, end, text in zip(index.to_pylist(), ends.tolist(), columns.to_pylist(), strict=True):
                yield Encoded(i, values[start:end], text)
                start = end

    def lengths(self) -> np.ndarray:
        """Number of tokens of each prompt."""
        return pc.list_value_length(self.table["ids"]).to_numpy()[self.rows]

    def column(self, name: str) -> pa.ChunkedArray:
        """A column of `SCHEMA`."""
        return self.table[name].take(pa.array(self.rows))

    def accepts(self, key: str) -> bool:
        """Whether these prompts were accepted by what has the key ``key``, in this run or an earlier one."""
        return self.folder is not None and (self.folder / f"accepted-{key}").exists()

    def accept(self, key: str) -> None:
        """Store that these prompts were accepted by what has the key ``key``."""
        if self.folder is not None:
            with suppress(OSError):
                (self.folder / f"accepted-{key}").touch()

    def _batches(self, table: pa.Table) -> Iterator[pa.RecordBatch]:
        """The rows in their order, in batches that are at most as long as those that were written."""
        batches = table.to_batches()
        starts = np.cumsum([0, *map(len, batches)])
        owners = np.searchsorted(starts, self.rows, side="right") - 1
        for first, last in _runs(owners):
            owner = owners[first]
            yield batches[owner].take(pa.array(self.rows[first:last] - starts[owner]))


def _runs(values: np.ndarray) -> Iterator[tuple[int, int]]:
    """Start and end of each run of equal values."""
    edges = [0, *(np.flatnonzero(np.diff(values)) + 1).tolist(), len(values)]
    return ((first, last) for first, last in pairwise(edges) if first < last)


def _prompt(row: dict[str, Any]) -> Prompt:
    del row["source"]
    return Prompt(**row | {"messages": json.loads(row["messages"]), "columns": dict(json.loads(row["columns"]))})


def as_batch(prompts: Sequence[Prompt]) -> pa.RecordBatch | None:
    """The prompts as a batch of a `PromptTable`; None if JSON can't represent one of them, which may have a date."""
    try:
        rows = [
            vars(prompt)
            | {
                "messages": json.dumps(prompt.messages),
                "columns": encoded_columns(prompt.columns),
                "source": prompt.source,
            }
            for prompt in prompts
        ]
    except (TypeError, ValueError):
        return None
    return pa.RecordBatch.from_pylist(rows, SCHEMA)


class PromptWriter:
    """Collects prompts, and writes them to a file once there are many.

    Args:
        file: where to write them. None: keep them in memory.
        stored_from: number of prompts from which they are written.
    """

    def __init__(self, file: Path | None, stored_from: int) -> None:
        self.file = file
        self.stored_from = stored_from
        self.prompts: list[Prompt] = []
        self._writer: pa.RecordBatchFileWriter | None = None

    def add(self, prompts: Sequence[Prompt] | pa.RecordBatch) -> None:
        """Add prompts, or those that `as_batch` encoded, after those that were added before."""
        if isinstance(prompts, pa.RecordBatch):
            self._flush()
            if self.file is not None:
                self._write(self.file, prompts)
                return
            prompts = PromptTable(pa.Table.from_batches([prompts]))
        self.prompts += prompts
        if self._writer is not None or len(self.prompts) >= self.stored_from:
            self._flush()

    def _flush(self) -> None:
        """Write the prompts in memory; if one can't be written, keep all in memory from now on."""
        if self.file is None or not self.prompts:
            return
        batch = as_batch(self.prompts)
        if batch is None:
            self.prompts, self.file = [*self._written(), *self.prompts], None
        else:
            self._write(self.file, batch)
            self.prompts = []

    def _write(self, file: Path, batch: pa.RecordBatch) -> None:
        if self._writer is None:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pa.ipc.new_file(str(file), SCHEMA)
        self._writer.write_batch(batch)

    def _written(self) -> Sequence[Prompt]:
        if self._writer is None:
            return []
        self._writer.close()
        return open_table(self.file)

    def finish(self) -> Sequence[Prompt]:
        """All prompts that were added."""
        return self.prompts if self.file is None or self._writer is None else self._written()


def open_table(file: Path | None) -> PromptTable:
    """The prompts that a `PromptWriter` wrote."""
    with pa.memory_map(str(file)) as source:
        return PromptTable(pa.ipc.open_file(source).read_all())
