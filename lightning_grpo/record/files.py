"""The files of a run's folder: how they are written, and how their size is limited."""

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_grpo.record.schema import INFO, SAMPLES, concatenate

log = logging.getLogger(__name__)

FILE_BYTES = 16 * 2**20
"""Size at which a new file of samples begins."""


class SampleFiles:
    """The samples of one rank. The last file grows until it is large enough; each file is complete at any time.

    Args:
        folder: of the run.
        rank: of this process.
        max_bytes: limit on the size of this rank's files. The oldest ones are deleted.
    """

    def __init__(self, folder: Path, *, rank: int, max_bytes: float) -> None:
        self.folder = folder / SAMPLES
        self.rank = rank
        self.max_bytes = max_bytes
        self.file_bytes = min(FILE_BYTES, max_bytes / 8)
        self._tables: list[pa.Table] = []
        self._unwritten = 0
        self._number = max((int(path.stem.rpartition("-")[2]) for path in self._written()), default=-1) + 1
        self._has_deleted = False

    def append(self, table: pa.Table) -> None:
        """Add rows, which `write` writes."""
        self._tables.append(table)
        self._unwritten += table.num_rows

    def write(self) -> None:
        """Write the rows that were added to the last file."""
        if not self._unwritten:
            return
        table = concatenate(self._tables)
        path = self.folder / f"rank{self.rank}-{self._number:06d}.parquet"
        write_samples(table, path)
        self._tables, self._unwritten = [table], 0
        if path.stat().st_size >= self.file_bytes:
            self._tables, self._number = [], self._number + 1
        self._delete_oldest()

    def _written(self) -> list[Path]:
        return sorted(self.folder.glob(f"rank{self.rank}-*.parquet"))

    def _delete_oldest(self) -> None:
        *older, _ = sizes = [(path, path.stat().st_size) for path in self._written()]
        total = sum(size for _, size in sizes)
        for path, size in older:
            if total <= self.max_bytes:
                break
            if not self._has_deleted:
                log.info("The samples exceed record.max_gib; the oldest are deleted from now on, first %s", path.name)
            self._has_deleted = True
            path.unlink()
            total -= size


def write_samples(table: pa.Table, path: Path) -> None:
    """Write a file of samples, which exists completely or not at all."""
    replace(path, lambda partial: pq.write_table(table, partial, compression="zstd"))


def write_info(folder: Path, info: Mapping[str, Any]) -> None:
    """Write ``run.json``."""
    text = json.dumps(info, indent=1, ensure_ascii=False, default=str)
    replace(folder / INFO, lambda partial: partial.write_text(text, encoding="utf-8"))


def append_line(path: Path, values: Mapping[str, float]) -> None:
    """Append an object to a file with one per line, with null for what is not finite."""
    plain = {name: value if math.isfinite(value) else None for name, value in values.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(plain) + "\n")


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` write a partial file, and give it the name ``path`` when it is complete."""
    partial = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
