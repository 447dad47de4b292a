"""A TRL run and the configuration that it is converted to."""

from collections.abc import Mapping
from typing import Any

from lightning_grpo.cli.trl.commented import Commented
from lightning_grpo.cli.trl.options import ROWS

CLASSES = {"model": "lightning_grpo.GRPOModule", "data": "lightning_grpo.PromptDataModule"}


class Conversion:
    """The options of a TRL run, and the configuration in which functions `put` what corresponds to them.

    Args:
        given: TRL's options by name. Options that are not given have TRL's defaults.
        devices: GPUs of the run. None: num_processes, or 1.
    """

    def __init__(self, given: Mapping[str, Any], *, devices: int | None = None) -> None:
        self.given = given
        self.devices = devices or int(self["num_processes"])
        self.config = Commented()
        self.remarks: list[str] = []
        """What the configuration can't contain."""

    def __getitem__(self, name: str) -> Any:
        """The value of TRL's option: the one that was given, or TRL's default."""
        return self.given.get(name, ROWS[name].default)

    def put(self, option: str, value: Any, *names: str, note: str | None = None) -> None:
        """Set ``option``. It is commented by ``note``, or by the notes of TRL's options ``names``."""
        *parents, last = option.split(".")
        node = self.config
        for part in parents:
            if node is self.config and part in CLASSES:
                node = node.setdefault(part, Commented(class_path=CLASSES[part], init_args=Commented()))["init_args"]
            else:
                node = node.setdefault(part, Commented())
        node[last] = value
        notes = [f"{name}: {ROWS[name].note}" for name in names if ROWS[name].note] if note is None else [note]
        if any(notes):
            node.comments[last] = "; ".join(notes)

    def copy(self, *names: str) -> None:
        """Set our options of TRL's options ``names`` to their values."""
        for name in names:
            if self[name] is not None:
                self.put(ROWS[name].ours, self[name], name)
