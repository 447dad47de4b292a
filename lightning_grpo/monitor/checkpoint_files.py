"""Atomic writing of checkpoint files, and their validation when they are read."""

import errno
import os
import pickle
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from lightning_grpo.errors import RunError, UserError

PARTIAL = ".part"
"""Suffix of files that are being written, or that remain from a run that was killed."""


class CheckpointFiles(TorchCheckpointIO):
    """Writes to a temporary name and renames, so that a kill or a full disk never leaves an incomplete checkpoint.

    Lightning's class keeps a second copy of the checkpoint in memory, and moves it from the system's temporary folder;
    between file systems that is a copy, which may be interrupted.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any | None = None) -> None:
        """Write a file.

        Raises:
            RunError: the file can't be written. An earlier file with this name is unchanged.
        """
        if "://" in str(path):
            return super().save_checkpoint(checkpoint, path, storage_options)
        path = Path(path)
        partial = path.with_name(f".{path.name}{PARTIAL}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except (OSError, RuntimeError) as error:
            remove(partial)
            if (cause := write_error(error)) is None:
                raise
            raise RunError(f"the checkpoint {path} could not be written: {_reason(cause, path.parent)}") from error

    def load_checkpoint(
        self,
        path: str | Path,
        map_location: Any = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a file.

        Raises:
            UserError: there is no such file, or it is not a complete checkpoint of this package.
        """
        if "://" not in str(path):
            require_checkpoint_file(str(path))
        with readable(path):
            checkpoint = super().load_checkpoint(path, map_location, weights_only)
        require_own_checkpoint(checkpoint, path)
        return checkpoint


@contextmanager
def readable(path: str | Path, option: str = "ckpt_path") -> Iterator[None]:
    """Convert exceptions of torch while it reads the checkpoint ``path`` to a `UserError`."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # torch raises almost any exception for invalid bytes
        raise UserError(
            f"{option} {path} can't be read: the file is incomplete or not a checkpoint ({_first_line(error)}); set "
            f"{option} to an earlier checkpoint"
        ) from error


def remove(path: Path) -> None:
    """Remove a file or a folder; ignore errors."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def require_checkpoint_file(path: str, option: str = "ckpt_path") -> None:
    """Raise `UserError` unless ``path`` is a non-empty file, or the folder of a sharded checkpoint."""
    if not os.path.exists(path):
        folder = os.path.dirname(path) or "."
        names = sorted(name for name in os.listdir(folder) if name.endswith(".ckpt")) if os.path.isdir(folder) else []
        there = f"{folder} has {', '.join(names[-5:])}" if names else f"{folder} has no .ckpt file"
        raise UserError(f"{option} {path} does not exist ({there}); set it to one that does, or to last for the newest")
    if os.path.isdir(path) and not os.path.isfile(os.path.join(path, "meta.pt")):
        raise UserError(
            f"{option} {path} is a folder; set it to a .ckpt file in it, or to last for the newest checkpoint"
        )
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        raise UserError(f"{option} {path} is an empty file; set it to an earlier checkpoint")


def require_own_checkpoint(checkpoint: Any, path: str | Path, option: str = "ckpt_path") -> None:
    """Raise `UserError` unless ``checkpoint``, read from ``path``, was saved by this package."""
    if not isinstance(checkpoint, dict):
        raise UserError(f"{option} {path} contains a {type(checkpoint).__name__}, not a checkpoint of this package")
    if checkpoint and all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        raise UserError(
            f"{option} {path} contains only weights, from which a run can't be resumed; to start from them, save "
            "them as a Hugging Face model folder and set model.model to it"
        )
    missing = [key for key in ("state_dict", "pytorch-lightning_version", "grpo") if key not in checkpoint]
    if missing:
        raise UserError(
            f"{option} {path} was not saved by a run of lightning_grpo (it has no {', '.join(missing)}); set it to a "
            "file that lightning-grpo fit saved"
        )


def require_same_weights(
    own: Mapping[str, torch.Tensor],
    saved: Mapping[str, torch.Tensor],
    remedy: str = "; set model.model to the one that it was trained from",
) -> None:
    """Raise `UserError` unless a checkpoint has the tensors of this model, by name and shape."""
    for difference, names in (("lacks", own.keys() - saved.keys()), ("has", saved.keys() - own.keys())):
        if names:
            which = "tensors of this model" if difference == "lacks" else "tensors that this model lacks"
            raise UserError(
                f"the checkpoint is of another model: it {difference} {len(names)} {which}, for example "
                f"{min(names)}{remedy}"
            )
    for name, tensor in own.items():
        if tensor.shape != saved[name].shape:
            shapes = f"{list(saved[name].shape)} instead of {list(tensor.shape)}"
            raise UserError(f"the checkpoint is of another model: {name} has shape {shapes}{remedy}")


def write_error(error: BaseException | None) -> OSError | None:
    """Return the `OSError` that caused ``error`` when a file was written; None if there is none."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        error = error.__cause__ or error.__context__
    return None


def _reason(error: OSError, folder: Path) -> str:
    reason = os.strerror(error.errno)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = f"{shutil.disk_usage(folder).free / 2**30:.1f} GiB are free" if folder.is_dir() else ""
        return f"{reason} ({free}). Free space, lower checkpoint.save_top_k, or move trainer.default_root_dir"
    return f"{reason}; set trainer.default_root_dir to a writable folder"


def _first_line(error: BaseException) -> str:
    if isinstance(error, pickle.UnpicklingError):
        return "it contains Python objects other than tensors and plain data, which are not loaded"
    line = next(iter(str(error).strip().splitlines()), type(error).__name__)
    return line if len(line) <= 120 else line[:117] + "..."
