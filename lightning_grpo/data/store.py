"""Encoded prompts in memory-mapped files, which later runs with the same data and options read in seconds."""

import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from filelock import FileLock

from lightning_grpo.data.prompts import Prompt
from lightning_grpo.errors import UserError

STORED_FROM = 2_000
"""Number of prompts from which they are stored."""
BATCH = 1000
"""Number of prompts to decode at once."""
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
    ]
)
"""Fields of `Prompt`, with messages and columns as JSON."""


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
    """

    def __init__(self, table: pa.Table, rows: np.ndarray | None = None) -> None:
        self.table = table
        self.rows = np.arange(len(table)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return PromptTable(self.table, self.rows[i])
        return _prompt(self.table.slice(self.rows[i], 1).to_pylist()[0])

    def __iter__(self) -> Iterator[Prompt]:
        for batch in self._batches(self.table):
            yield from map(_prompt, batch.to_pylist())

    def ids(self) -> Iterator[list[int]]:
        """The token ids of each prompt, which need no decoding."""
        for batch in self._batches(self.table.select(["ids"])):
            yield from batch.column("ids").to_pylist()

    def _batches(self, table: pa.Table) -> Iterator[pa.Table]:
        for start in range(0, len(self.rows), BATCH):
            yield table.take(pa.array(self.rows[start : start + BATCH]))


def _prompt(row: dict[str, Any]) -> Prompt:
    decoded = {name: json.loads(row[name]) for name in ("messages", "columns")}
    return Prompt(**row | decoded)


class PromptWriter:
    """Collects prompts, and writes them to a file once there are `STORED_FROM`.

    Args:
        file: where to write them. None: keep them in memory.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.prompts: list[Prompt] = []
        self._writer: pa.RecordBatchFileWriter | None = None

    def add(self, prompts: Sequence[Prompt]) -> None:
        """Add prompts after those that were added before."""
        self.prompts += prompts
        if self.file is not None and (self._writer is not None or len(self.prompts) >= STORED_FROM):
            self._write(self.file)

    def _write(self, file: Path) -> None:
        rows = [dict(vars(prompt)) for prompt in self.prompts]
        try:
            for row in rows:
                row |= {name: json.dumps(row[name]) for name in ("messages", "columns")}
        except (TypeError, ValueError):  # such as a date, which JSON can't store
            self.prompts, self.file = [*self._stored(), *self.prompts], None
            return
        if self._writer is None:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._writer = pa.ipc.new_file(str(file), SCHEMA)
        self._writer.write_batch(pa.RecordBatch.from_pylist(rows, SCHEMA))
        self.prompts = []

    def _stored(self) -> list[Prompt]:
        if self._writer is None:
            return []
        self._writer.close()
        return list(open_table(self.file))

    def finish(self) -> Sequence[Prompt]:
        """All prompts that were added."""
        if self._writer is None or self.file is None:
            return self.prompts
        self._writer.close()
        return open_table(self.file)


def open_table(file: Path | None) -> PromptTable:
    """The prompts that a `PromptWriter` wrote."""
    with pa.memory_map(str(file)) as source:
        return PromptTable(pa.ipc.open_file(source).read_all())
