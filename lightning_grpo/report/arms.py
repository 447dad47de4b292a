"""Groups runs into arms: an arm has one configuration and a run per seed."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_grpo.record.reader import Run

PLACES = ("default_root_dir", "logger", "dirpath", "ckpt_path", "calibration", "config")
"""Options, at any depth, that only name files."""


@dataclass(frozen=True)
class Arm:
    """Runs that differ in nothing but their seed."""

    name: str
    runs: tuple[Run, ...]


def run_names(runs: Sequence[Run]) -> list[str]:
    """Return a short, distinct name per run: the last parts of its folder, without ``logs`` and, if there is only one
    version of a run, without ``version_N``."""
    parts = [[part for part in run.folder.absolute().parts if part != "logs"] for run in runs]
    short = [path[:-1] if path[-1].startswith("version_") and len(path) > 1 else path for path in parts]
    for paths, length in ((short, 1), (short, 2), (parts, 2), (parts, 3)):
        names = ["/".join(path[-length:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(run.folder) for run in runs]


def arms(runs: Sequence[Run]) -> list[Arm]:
    """Return the arms, in the order of their first runs. A run without a configuration is an arm of its own."""
    groups: dict[str, list[Run]] = {}
    for i, run in enumerate(runs):
        key = json.dumps(options(run), sort_keys=True, default=str) if run.config else str(i)
        groups.setdefault(key, []).append(run)
    firsts = [group[0] for group in groups.values()]
    names = dict(zip(map(id, runs), run_names(runs), strict=True))
    titles = [names[id(run)] for run in firsts]
    differing = differences(firsts)
    if len(differing) == 1:
        ((option, values),) = differing.items()
        by_value = [f"{option.rpartition('.')[2]} {value}" for value in values]
        titles = by_value if len(set(by_value)) == len(by_value) else titles
    return [Arm(title, tuple(group)) for title, group in zip(titles, groups.values(), strict=True)]


def options(run: Run) -> dict[str, Any]:
    """Return the options of a run by their dotted names, without seeds and the places of files."""
    flat = _flatten(run.config)
    return {
        name: value
        for name, value in flat.items()
        if not (name.endswith(("seed", "seed_everything")) or set(name.split(".")) & set(PLACES))
    }


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Return the options in which ``runs`` differ, each with its value in every run (None if it is not set).

    Empty if the configuration of a run is missing.
    """
    if not all(run.config for run in runs):
        return {}
    found = [options(run) for run in runs]
    names = sorted({name for each in found for name in each})
    values = {name: [each.get(name) for each in found] for name in names}
    return {name: each for name, each in values.items() if any(value != each[0] for value in each)}


def seed(run: Run) -> int | None:
    """Return the seed of a run; None if it is not known."""
    found = run.info.get("seed", run.config.get("seed_everything"))
    return found if isinstance(found, int) else None


def _flatten(value: Any, name: str = "") -> dict[str, Any]:
    items: Any = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    if not items:
        return {name: value} if name else {}
    flat: dict[str, Any] = {}
    for key, item in items:
        part = "" if key == "init_args" else str(key)
        flat |= _flatten(item, ".".join(filter(None, (name, part))))
    return flat
