"""Reads the folder of a run, finished or not. It needs neither torch nor Lightning.

A run that was resumed usually has one folder per start. Each names the folder and the step that it continues, and the
reader follows them: what an earlier folder has of later steps was trained again, and is left out.
"""

import csv
import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from lightning_grpo.errors import UserError
from lightning_grpo.record.schema import COLUMNS, FINDINGS, HELD_OUT, INFO, METRICS, ORDER, REWARD, SAMPLES, concatenate

CSV = "metrics.csv"


@dataclass(kw_only=True)
class Run:
    """What a run has written. Samples are read when they are asked for."""

    folder: Path
    """The folder of the last start."""
    folders: list[tuple[Path, float]]
    """The folders of all starts, the last one first, each with the last step that counts (infinity for the last)."""
    info: dict[str, Any]
    """``run.json``; empty if it is missing."""
    config: dict[str, Any]
    """``config.yaml``; empty if it is missing."""
    metrics: list[dict[str, Any]]
    """For each optimizer step ``{"step": …, "time": …, name: value, …}``, ordered by step. A value that is not known is
    NaN."""
    held_out: list[dict[str, Any]]
    """The same for each evaluation of held-out prompts."""
    findings: list[dict[str, Any]]
    """Findings of the diagnosis."""
    warnings: list[str] = field(default_factory=list)
    """What was damaged or half-written, and left out."""

    def sample_files(self) -> list[Path]:
        """The files with samples, those of the first start first. They may contain steps that do not count."""
        return [path for folder, _ in reversed(self.folders) for path in _sample_files(folder)]

    def samples(self, columns: Sequence[str] | None = None, steps: Collection[int] | None = None) -> pa.Table:
        """The trained completions, ordered by step, rollout, group and index within the group.

        Args:
            columns: names of columns; those that no file has are null. None: all that any file has.
            steps: optimizer steps, such as ``range(10, 20)``. None: all. Other parts of the files are not read.
        """
        tables = []
        for folder, last in reversed(self.folders):
            for path in _sample_files(folder):
                try:
                    tables.append(_read_samples(path, columns, steps, last))
                except (OSError, pa.ArrowException) as error:
                    self._warn(f"{path.relative_to(folder.parent)} was left out: {_first_line(error)}")
        wanted = None if columns is None else pa.schema([_field(name) for name in dict.fromkeys([*ORDER, *columns])])
        table = concatenate([(wanted or COLUMNS).empty_table(), *tables])
        table = table.sort_by([(name, "ascending") for name in ORDER])
        return table if columns is None else table.select(list(columns))

    def _warn(self, message: str) -> None:
        if message not in self.warnings:
            self.warnings.append(message)


def read_run(folder: str | Path) -> Run:
    """Read a run.

    Args:
        folder: a folder with ``metrics.jsonl``, such as ``runs/NAME/logs/version_0``, or one whose newest
            ``logs/version_N`` is meant.

    Raises:
        UserError: there is no run in this folder. Damaged files are left out, with a warning.
    """
    folder = find_run(Path(folder))
    run = Run(folder=folder, folders=[], info={}, config={}, metrics=[], held_out=[], findings=[])
    run.folders = list(_starts(folder, run._warn))
    run.info = read_object(folder / INFO, run._warn)
    run.config = read_object(folder / "config.yaml", run._warn, yaml.safe_load)
    lines: list[dict[str, Any]] = []
    for start, last in reversed(run.folders):
        source = _read_lines(start / METRICS, run._warn) if (start / METRICS).exists() else _read_csv(start / CSV)
        lines += [_with_nan(line) for line in source if line["step"] <= last]
        findings = _read_lines(start / FINDINGS, run._warn)
        run.findings += [finding for finding in findings if finding["step"] <= last]
    lines.sort(key=lambda line: line["step"])
    run.metrics = [line for line in lines if not _is_held_out(line)]
    # a run that was resumed may have evaluated the step of its checkpoint again
    run.held_out = list({line["step"]: line for line in lines if _is_held_out(line)}.values())
    return run


def find_run(folder: Path) -> Path:
    """The folder of the run that ``folder`` names: itself, or its newest ``version_N`` or ``logs/version_N``."""
    if _is_run(folder):
        return folder
    versions = [path for path in (*folder.glob("version_*"), *folder.glob("logs/version_*")) if _is_run(path)]
    if not versions:
        raise UserError(f"{folder} {_why_no_run(folder)}")
    return max(versions, key=lambda path: (_number(path), path))


def _why_no_run(folder: Path) -> str:
    inner = sorted({str(path.parents[1]) for path in folder.glob("*/logs/version_*") if _is_run(path)})
    if inner:
        return f"contains several runs; name {' or '.join(inner[:3])}" + (" or another" if len(inner) > 3 else "")
    if (folder / "trainer_state.json").exists():
        return "was written by transformers or TRL, whose runs only `lightning-grpo diagnose` reads"
    what = "has no metrics.jsonl, metrics.csv or run.json" if folder.is_dir() else "is not a folder"
    return f"{what}; name the folder of a run, such as runs/NAME/logs/version_0"


def _number(path: Path) -> int:
    number = path.name.rpartition("_")[2]
    return int(number) if number.isdecimal() else -1


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (INFO, METRICS, CSV, SAMPLES))


def _starts(folder: Path, warn: Callable[[str], None]) -> Iterator[tuple[Path, float]]:
    """The folder and those that it continues, each with the last step that counts."""
    last, seen = float("inf"), set()
    while folder.resolve() not in seen:
        seen.add(folder.resolve())
        yield folder, last
        parent = read_object(folder / INFO, warn).get("resumed_from")
        if not isinstance(parent, dict) or not isinstance(parent.get("step"), int):
            return
        last = min(last, parent["step"])
        path = parent.get("folder")
        if not isinstance(path, str) or not _is_run(folder / path):
            warn(f"the run continues another after step {parent['step']}, whose folder is missing: {path}")
            return
        folder = (folder / path).resolve()


# ── Files ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_object(
    path: Path, warn: Callable[[str], None] = lambda message: None, parse: Callable[[str], Any] = json.loads
) -> dict[str, Any]:
    """The object that a file contains; empty, with a warning if there is one, if it can't be read."""
    try:
        found = parse(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        warn(f"{path.name} was left out: {_first_line(error)}")
        return {}
    if isinstance(found, dict):
        return found
    warn(f"{path.name} was left out: it does not contain an object")
    return {}


def _read_lines(path: Path, warn: Callable[[str], None]) -> list[dict[str, Any]]:
    """The objects of a file with one per line."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        warn(f"{path.name} was left out: {_first_line(error)}")
        return []
    lines = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            found = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            found = line
        if isinstance(found, dict) and type(found.get("step")) is int:
            lines.append(found)
        elif found is not None:
            warn(f"line {number} of {path.name} was left out: it is damaged or half-written")
    return lines


def _read_csv(path: Path) -> list[dict[str, Any]]:
    """The rows that Lightning's CSVLogger wrote, which counts steps from 0."""
    if not path.exists():
        return []
    lines = []
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        for row in csv.DictReader(line.replace("\0", "") for line in file):
            values = {name: number for name, text in row.items() if name and (number := _number_of(text)) is not None}
            if "step" in values:
                lines.append(values | {"step": int(values["step"]) + 1})
    return lines


def _number_of(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def _with_nan(line: dict[str, Any]) -> dict[str, Any]:
    return {name: float("nan") if value is None else value for name, value in line.items()}


def _is_held_out(line: dict[str, Any]) -> bool:
    names = line.keys() - {"step", "time", "epoch"}
    return bool(names) and all(name.startswith(HELD_OUT) for name in names)


# ── Samples ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _sample_files(folder: Path) -> list[Path]:
    return sorted((folder / SAMPLES).glob("rank*.parquet"))


def _read_samples(path: Path, columns: Sequence[str] | None, steps: Collection[int] | None, last: float) -> pa.Table:
    condition = pc.field("step") >= 0
    if last != float("inf"):
        condition &= pc.field("step") <= int(last)
    if steps is not None:
        low, high = min(steps, default=0), max(steps, default=-1)
        condition &= (pc.field("step") >= low) & (pc.field("step") <= high)
        if len(steps) <= high - low:
            condition &= pc.field("step").isin(list(steps))
    names = pq.read_schema(path).names
    wanted = None if columns is None else [name for name in dict.fromkeys([*ORDER, *columns]) if name in names]
    return pq.read_table(path, columns=wanted, filters=condition)


def _field(name: str) -> pa.Field:
    if name in COLUMNS.names:
        return COLUMNS.field(name)
    return pa.field(name, pa.float32() if name.startswith(REWARD) else pa.null())


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
