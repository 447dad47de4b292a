"""Which checkpoint to load, and how: its name, revision and code, and further arguments of ``from_pretrained``."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from lightning_grpo.errors import UserError
from lightning_grpo.policy.files import REMEDY, hub_reachable

OWN_OPTIONS = {
    **dict.fromkeys(("dtype", "torch_dtype"), "model.dtype"),
    "attn_implementation": "model.attn_implementation",
    **dict.fromkeys(("quantization_config", "load_in_4bit", "load_in_8bit"), "model.quantization"),
    "revision": "model.model.revision",
    "trust_remote_code": "model.model.trust_remote_code",
    **dict.fromkeys(("device_map", "max_memory", "tp_plan"), "trainer.accelerator and trainer.strategy"),
}
"""Arguments of ``from_pretrained`` that have an option of their own."""


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A checkpoint in a folder or on the Hugging Face Hub, and how to load it.

    Raises:
        UserError: an argument in ``kwargs`` has an option of its own.
    """

    name: str
    """Folder of the checkpoint, or its name on the hub."""
    revision: str | None = None
    """Branch, tag or commit on the hub, also of configuration and tokenizer. Empty is the main branch."""
    trust_remote_code: bool = False
    """Run Python code that comes with the checkpoint. Read that code first: it can do whatever you can do."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of from_pretrained, among them values of the model's configuration, such as sliding_window."""

    def __post_init__(self) -> None:
        for name in self.kwargs:
            if name in OWN_OPTIONS:
                raise UserError(f"model.model.kwargs has {name}; set {OWN_OPTIONS[name]} instead")

    @classmethod
    def of(cls, model: "str | Pretrained") -> "Pretrained":
        """Return ``model``, which may be given by name alone."""
        return model if isinstance(model, Pretrained) else cls(name=model)

    def options(self) -> dict[str, Any]:
        """Return the arguments for every ``from_pretrained`` of this checkpoint, also of tokenizer and configuration.

        Raises:
            UserError: there is no such folder, repository or revision.
        """
        if not self.name:
            raise UserError(f"model is empty; {REMEDY}")
        if Path(self.name).is_file():
            raise UserError(f"model is {self.name!r}, which is a file; {REMEDY}")
        options: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if not Path(self.name).is_dir():
            reachable = hub_reachable(self.name, revision=self.revision)
            options |= {"revision": self.revision, "local_files_only": not reachable}
        elif self.revision is not None:
            raise UserError(
                f"model.revision is {self.revision!r}, but model {self.name!r} is a folder, which has no revisions; "
                "leave it unset"
            )
        return options

    def configured(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Return those of ``kwargs`` that are values of the model's configuration."""
        return {name: value for name, value in self.kwargs.items() if hasattr(config, name)}


@dataclass(frozen=True, kw_only=True, eq=False)
class InMemory(Pretrained):
    """A model that is in memory. ``name`` is a temporary folder with its configuration and tokenizer only."""

    objects: list[PreTrainedModel] = field(repr=False)
    """The model, until it is taken to be trained."""

    def take(self) -> PreTrainedModel:
        """Return the model, once: it is trained, and not copied."""
        if not self.objects:
            raise UserError(
                "model is an object, which was used before, and its weights before training are needed again for "
                "objective.beta; call fit before other stages, or set model to a folder"
            )
        return self.objects.pop()
