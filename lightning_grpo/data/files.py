"""Readers of data files, which yield each row with its location ("train.jsonl, line 7"), from UTF-8 text."""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path
from typing import Any, cast

from lightning_grpo.data.rows import Row
from lightning_grpo.errors import UserError

# JSON's escape of a UTF-16 surrogate. A pair of them encodes one character, a single one is invalid.
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line number, line) of a text file, which may be compressed by gzip if its name ends in .gz.

    Raises:
        UserError: the file is not UTF-8, or not what its name says; the message names the line.
    """
    number = 0
    try:
        for number, line in _lines(path):
            yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}, after line {number}: the file is not gzip, or damaged: {error}") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    open_file: Callable[..., Any] = gzip.open if path.suffix.lower() == ".gz" else open
    with open_file(path, "rb") as file:
        start = file.read(4096)
    zeros = [start[half::2].count(0) > len(start) // 4 for half in (0, 1)]
    if start[:2] in (b"\xff\xfe", b"\xfe\xff") or zeros[0] != zeros[1]:
        raise UserError(f"{path}: the file is UTF-16, not UTF-8; convert it (iconv -f UTF-16 -t UTF-8)")
    if b"\0" in start or start[:2] == b"\x1f\x8b":
        raise UserError(
            f"{path}: the file is binary or compressed, not text; decompress it, or use the right file extension"
        )
    with open_file(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        for number, line in enumerate(file, 1):
            if not line.isascii() and (escaped := re.search("[\udc80-\udcff]", line)):
                raise UserError(
                    f"{path}, line {number}: the byte 0x{ord(escaped[0]) - 0xDC00:x} in column {escaped.start() + 1} "
                    "is not UTF-8; if the file is Latin-1 or Windows-1252, convert it (iconv -f WINDOWS-1252 -t UTF-8)"
                )
            yield number, line


def parse(where: str, text: str) -> Any:
    """Return the value of JSON text; ``where`` is its location, for messages."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not JSON: {error}") from error
    except ValueError as error:  # Python's limit for converting decimal digits
        raise UserError(f"{where}: an integer has thousands of digits; write it as text, in quotes") from error
    except RecursionError as error:
        raise UserError(f"{where}: objects and lists are nested too deeply") from error
    if SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):x}"
            raise UserError(f"{where}: {half} is half of a surrogate pair, not a character; remove it") from error
    return value


def _row(where: str, value: Any) -> tuple[str, Row]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: a row must be an object with a prompt, not {type(value).__name__}")
    return where, value


def jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    """Read an object from each line that is not blank."""
    for number, line in lines(path):
        if text := line.strip("\ufeff \t\r\n"):
            where = f"{path}, line {number}"
            yield _row(where, parse(where, text))


def json_file(path: Path) -> Iterator[tuple[str, Row]]:
    """Read a list of objects, or an object from each line as in `jsonl`."""
    first = next((line.lstrip() for _, line in lines(path) if line.strip()), "")
    if not first.startswith("["):
        yield from jsonl(path)
        return
    for number, value in enumerate(parse(str(path), "".join(line for _, line in lines(path)))):
        yield _row(f"{path}, row {number}", value)


def csv_file(path: Path) -> Iterator[tuple[str, Row]]:
    """Read comma-separated values after a line with the column names; every value is text."""
    reader = csv.reader((line for _, line in lines(path)), strict=True)
    try:
        names = next(reader, [])
        _require_distinct(f"{path}, line 1", names)
        for values in reader:
            where = f"{path}, line {reader.line_num}"
            if values and len(values) != len(names):
                raise UserError(f"{where}: the line has {len(values)} values for the {len(names)} columns of line 1")
            if values:
                yield where, dict(zip(names, values, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not CSV: {error}") from error


def _require_distinct(where: str, names: list[str]) -> None:
    if len(set(names)) < len(names):
        raise UserError(f"{where}: two columns have the same name: {', '.join(names)}")


def parquet(path: Path) -> Iterator[tuple[str, Row]]:
    """Read the rows of a parquet file, numbered from 0."""
    from pyarrow.parquet import ParquetFile

    with _arrow_errors(path, "parquet"), ParquetFile(path) as file:
        _require_distinct(str(path), file.schema_arrow.names)
        yield from _batches(path, file.iter_batches())


def arrow(path: Path) -> Iterator[tuple[str, Row]]:
    """Read the rows of an Arrow file or stream, such as those in the folders of ``datasets``, numbered from 0."""
    import pyarrow

    with _arrow_errors(path, "Arrow"), pyarrow.memory_map(str(path)) as file:
        is_file = file.read(6) == b"ARROW1"
        file.seek(0)
        if is_file:
            reader = pyarrow.ipc.open_file(file)
            batches = map(reader.get_batch, range(reader.num_record_batches))
        else:
            batches = reader = pyarrow.ipc.open_stream(file)
        _require_distinct(str(path), reader.schema.names)
        yield from _batches(path, batches)


def _batches(path: Path, batches: Iterable[Any]) -> Iterator[tuple[str, Row]]:
    number = 0
    try:
        for batch in batches:
            for row in batch.to_pylist():
                yield f"{path}, row {number}", row
                number += 1
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, near row {number}: a text is not UTF-8: {error}") from error


@contextmanager
def _arrow_errors(path: Path, kind: str) -> Iterator[None]:
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: the file can't be read as {kind}: {' '.join(str(error).split())}") from error


READERS: dict[str, Callable[[Path], Iterator[tuple[str, Row]]]] = {
    ".jsonl": jsonl,
    ".json": json_file,
    ".csv": csv_file,
    ".parquet": parquet,
    ".arrow": arrow,
}
COMPRESSED = (".jsonl", ".json", ".csv")
"""Extensions that may be followed by .gz."""
OTHER_SUFFIXES = (".ndjson", ".txt", ".tsv", ".gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".xlsx", ".yaml")
"""Extensions of data files without a reader; a source with one is a file, not a name on the hub."""


def reader(path: Path) -> Callable[[Path], Iterator[tuple[str, Row]]] | None:
    """The reader of a file, by its extension; None if there is none."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        suffix = path.with_suffix("").suffix.lower()
        return READERS[suffix] if suffix in COMPRESSED else None
    return READERS.get(suffix)


def is_file_name(source: str) -> bool:
    """Whether a source is a file name, existing or not, or a pattern of files such as ``data/train-*.parquet``."""
    suffix = Path(source).suffix.lower()
    return suffix in READERS or suffix in OTHER_SUFFIXES or glob_special(source) or Path(source).expanduser().is_file()


def glob_special(source: str) -> bool:
    """Whether a source is a pattern, which contains ``*``, ``?`` or ``[``."""
    return any(character in source for character in "*?[")


def find_files(option: str, source: str) -> list[Path]:
    """Return the file that a source names, or the sorted files that match its pattern.

    Args:
        option: name of the option whose value is ``source``, for messages.

    Raises:
        UserError: there is no such file, or its type is not supported.
    """
    path = Path(source).expanduser()
    files = [path] if path.is_file() else []
    if not files and glob_special(source):
        files = [file for file in map(Path, sorted(glob(str(path), recursive=True))) if file.is_file()]
    if not files:
        what = "no file matches it" if glob_special(source) else "there is no such file"
        raise UserError(f"{option} is {source!r}, but {what}; set a {_KINDS} file, or a pattern of such files")
    for file in files:
        if reader(file) is None:
            raise UserError(
                f"{option} is {source!r}, but {file.name} is not a {_KINDS} file; convert it to one of these"
            )
    return files


def read_files(option: str, source: str) -> Iterator[tuple[str, Row]]:
    """Yield the rows of all files that `find_files` returns, one file after the other."""
    for path in find_files(option, source):
        try:
            yield from cast(Any, reader(path))(path)  # `find_files` requires one
        except OSError as error:
            raise UserError(f"{option} is {source!r}, but {path} can't be read: {error}") from error


_KINDS = ".jsonl, .json, .csv (each also with .gz), .parquet or .arrow"
