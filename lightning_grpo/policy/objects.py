"""Models that were built in Python, in place of a checkpoint."""

import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel

from lightning_grpo.errors import UserError
from lightning_grpo.policy.load import load_tokenizer
from lightning_grpo.policy.lora import LoRA
from lightning_grpo.policy.pretrained import InMemory, Pretrained


def source_of(
    model: str | Pretrained | PreTrainedModel | PeftModel, lora: LoRA | None
) -> tuple[Pretrained, LoRA | None]:
    """Return what to load, and its adapters.

    Args:
        model: a checkpoint, its name, or a model in memory. Adapters of a model in memory are taken off and saved, and
            training continues from them as from `LoRA.adapter`.
        lora: the adapters to train.

    Raises:
        UserError: the object has other adapters than one of LoRA, or no tokenizer is known.
    """
    if not isinstance(model, PreTrainedModel | PeftModel):
        return Pretrained.of(model), lora
    base: Any = model
    folder = Path(tempfile.mkdtemp(prefix="lightning_grpo-"))
    if isinstance(model, PeftModel):
        if lora is not None:
            raise UserError("lora is set, but model is an object that has adapters already; leave one of them out")
        if set(model.peft_config) != {"default"} or any(getattr(m, "merged", False) for m in model.modules()):
            raise UserError(
                f"model is an object with the adapters {', '.join(model.peft_config)}; give it one unmerged adapter, "
                "called default"
            )
        model.save_pretrained(str(folder / "adapter"), save_embedding_layers=False)
        lora = LoRA(adapter=str(folder / "adapter"))
        base = base.unload()
    base.config.save_pretrained(folder)
    base.generation_config.save_pretrained(folder)
    _tokenizer(base).save_pretrained(folder)
    source = InMemory(name=str(folder), objects=[base])
    weakref.finalize(source, shutil.rmtree, folder, ignore_errors=True)
    return source, lora


def _tokenizer(model: PreTrainedModel) -> Any:
    name = model.name_or_path
    if not name:
        raise UserError(
            "model is an object that names no checkpoint, from which its tokenizer could be loaded; set its "
            "config.name_or_path to the folder of the tokenizer"
        )
    revision = None if Path(name).is_dir() else getattr(model.config, "_commit_hash", None)
    return load_tokenizer(Pretrained(name=name, revision=revision))
