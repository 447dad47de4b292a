"""The choice of a folder for checkpoints, which no other run uses or has used."""

import fcntl
import os
import socket
from pathlib import Path
from typing import IO

import psutil

from lightning_grpo.errors import UserError
from lightning_grpo.monitor.checkpoint_files import PARTIAL, remove

LOCK = ".lock"
LAST = "last.ckpt"


def family(base: Path) -> list[Path]:
    """Return ``base``, and those of its successors ``base-2``, ``base-3``, … that exist."""
    numbers = (path.name.removeprefix(f"{base.name}-") for path in base.parent.glob(f"{base.name}-*") if path.is_dir())
    return [base, *(base.with_name(f"{base.name}-{n}") for n in sorted(int(n) for n in numbers if n.isdecimal()))]


def newest(base: Path) -> Path:
    """Return the folder of the family with the newest checkpoint, or ``base`` if there is none."""
    written = {folder: newest_file(folder) for folder in family(base)}
    return max(
        (folder for folder in written if written[folder]), key=lambda f: written[f].stat().st_mtime_ns, default=base
    )


def newest_file(folder: Path) -> Path | None:
    """Return the checkpoint that ``last`` points to, or the newest file if a killed run left no ``last``."""
    if (folder / LAST).exists():
        return folder / LAST
    written = {file: file.stat().st_mtime_ns for file in folder.glob("*.ckpt") if file.exists()}
    return max(written, key=written.get, default=None)


def unused(base: Path) -> Path:
    """Return the first folder of the family, or the next new one, that has no checkpoint and is not in use."""
    folders = family(base)
    number = int(folders[-1].name.removeprefix(f"{base.name}-")) + 1 if len(folders) > 1 else 2
    candidates = [*folders, base.with_name(f"{base.name}-{number}")]
    return next(folder for folder in candidates if not any(folder.glob("*.ckpt")) and user_of(folder) is None)


def user_of(folder: Path) -> str | None:
    """Describe the process that writes checkpoints to ``folder``; None if there is none, or it has died."""
    try:
        file = (folder / LOCK).open("r+")
    except OSError:
        return None
    with file:
        # Without support for locks, the process id is decisive.
        if _try_lock(file):
            return None
        words = file.read().split()
        pid, host = int(words[0]) if words and words[0].isdecimal() else 0, words[1] if len(words) > 1 else "?"
        if host == socket.gethostname() and (pid == os.getpid() or not psutil.pid_exists(pid)):
            return None
        return f"process {pid} on {host}"


class FolderLock:
    """Marks a folder as in use until `release`, or until this process dies.

    Raises:
        UserError: another process uses the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if (user := user_of(folder)) is not None:
            raise UserError(
                f"{folder} is in use: {user} writes its checkpoints there. Wait until it ends, or set "
                "trainer.default_root_dir to another folder"
            )
        self._file = (folder / LOCK).open("a+")
        _try_lock(self._file)
        self._file.truncate(0)
        self._file.write(f"{os.getpid()} {socket.gethostname()}\n")
        self._file.flush()
        for partial in folder.glob(f".*{PARTIAL}"):
            remove(partial)

    def release(self) -> None:
        """Let other processes use the folder. It can be called twice."""
        if not self._file.closed:
            (self.folder / LOCK).unlink(missing_ok=True)
            self._file.close()


def _try_lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
