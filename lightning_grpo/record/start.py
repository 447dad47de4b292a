"""The start of a record: a new one, one that continues another folder's, or one that is continued in its folder."""

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from lightning_grpo.record.files import replace, write_info, write_samples
from lightning_grpo.record.reader import read_object
from lightning_grpo.record.schema import FINDINGS, INFO, METRICS, SAMPLES

REPORT = "report.html"
"""What `lightning-grpo report` writes to the folder of a run."""


def start(folder: Path, info: Mapping[str, Any], identity: Mapping[str, str], step: int, root: Path) -> None:
    """Write ``run.json`` of a run that begins, or that is resumed after ``step`` optimizer steps.

    Another run's record in this folder is moved to its subfolder ``earlier-N``.

    Args:
        folder: of this run.
        info: what ``run.json`` contains.
        identity: of the run that is resumed, as `identify` returned it; empty for a new one.
        step: optimizer steps that have been taken.
        root: trainer.default_root_dir.
    """
    parent = _find(identity, root) if identity else None
    if parent is not None and parent.resolve() == folder.resolve():
        _remove_later(folder, step)
        own = read_object(folder / INFO)
        info = {**info, **{name: own[name] for name in ("id", "started", "resumed_from") if name in own}}
    else:
        if (moved := _move_away(folder)) and parent is not None and parent.is_relative_to(folder):
            parent = _find(identity, root) or moved
        resumed_from = {"folder": identity.get("folder") if parent is None else os.path.relpath(parent, folder)}
        info = {**info, "resumed_from": resumed_from | {"step": step} if identity else None}
    write_info(folder, info)


def identify(folder: Path, root: Path) -> dict[str, str]:
    """What a checkpoint stores about the record of its run, which is found again if ``root`` was moved."""
    return {
        "id": read_object(folder / INFO)["id"],
        "folder": str(folder.absolute()),
        "relative": os.path.relpath(folder, root),
    }


def _find(identity: Mapping[str, str], root: Path) -> Path | None:
    for place in (root / identity["relative"], Path(identity["folder"])):
        for folder in (place, *sorted(place.glob("earlier-*"))):
            if read_object(folder / INFO).get("id") == identity["id"]:
                return folder
    return None


def _move_away(folder: Path) -> Path | None:
    names = [name for name in (INFO, METRICS, SAMPLES, FINDINGS, REPORT) if (folder / name).exists()]
    if not names:
        return None
    target = folder / f"earlier-{1 + len(list(folder.glob('earlier-*')))}"
    target.mkdir()
    for name in names:
        (folder / name).rename(target / name)
    return target


def _remove_later(folder: Path, step: int) -> None:
    """Remove rows and lines of steps after ``step``."""
    for name in (METRICS, FINDINGS):
        if (path := folder / name).exists():
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
            kept = "".join(f"{line}\n" for line in lines if _is_up_to(line, step))
            replace(path, partial(Path.write_text, data=kept, encoding="utf-8"))
    for path in (folder / SAMPLES).glob("rank*.parquet"):
        table = pq.read_table(path)
        earlier = table.filter(pc.field("step") <= step)
        if not earlier.num_rows:
            path.unlink()
        elif earlier.num_rows < table.num_rows:
            write_samples(earlier, path)


def _is_up_to(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (ValueError, TypeError, KeyError):
        return False
