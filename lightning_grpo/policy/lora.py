"""LoRA adapters: their options, and how they are added to a model."""

import difflib
import logging
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from peft import LoraConfig, PeftModel, get_peft_model, load_peft_weights, set_peft_model_state_dict
from torch import nn
from transformers import PreTrainedModel

from lightning_grpo.errors import UserError
from lightning_grpo.ranges import check_ranges

log = logging.getLogger(__name__)

PEFT_NAMES = {"rank": "r", "alpha": "lora_alpha", "dropout": "lora_dropout"}
"""Options that PEFT calls by another name; the others have PEFT's."""
CHANGES_BASE = ("layer_replication", "loftq_config", "eva_config", "corda_config", "lora_ga_config")
"""Fields of PEFT's LoraConfig that change the base model, which neither checkpoints nor engines have then."""
MANAGED = (
    *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "megatron_config", "megatron_core"),
)
"""Fields of PEFT's LoraConfig that describe a saved adapter, or another library's layers."""


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Train low-rank adapters instead of all weights (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = 16
    """Rank of each adapter. 1 to 32 is enough for reinforcement learning."""
    alpha: float = 32.0
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = 0.0
    """Share of adapter inputs that are dropped in training. If it is not 0, the log-probs in training are not those of
    the policy that samples."""
    target_modules: str | list[str] = "all-linear"
    """Linear layers that get an adapter: names, a regular expression, or all-linear."""
    exclude_modules: str | list[str] | None = None
    """Layers among these that get none: names, or a regular expression."""
    layers_to_transform: list[int] | None = None
    """Numbers of the decoder layers that get adapters; None means all of them."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Other ranks for some layers, by name or regular expression."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Other values of alpha for some layers, by name or regular expression."""
    use_rslora: bool = False
    """Scale by alpha / √rank (rsLoRA, arXiv:2312.03732), which keeps large ranks stable."""
    use_dora: bool = False
    """Train each weight's magnitude apart from its direction (DoRA, arXiv:2402.09353)."""
    modules_to_save: list[str] | None = None
    """Modules to train whole beside the adapters."""
    init_lora_weights: bool | Literal["gaussian", "orthogonal"] = True
    """How adapters begin: true gives the base model exactly, as gaussian does."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further fields of PEFT's LoraConfig by name, such as bias."""
    adapter: str | None = None
    """Folder of an adapter to continue from, or its hub name. Its configuration replaces the options above except
    dropout, and the adapter as loaded is the reference."""

    def __post_init__(self) -> None:
        if self.adapter is not None:
            self._read_adapter()
        # rank 0 is not allowed: without adapters, lora is None
        check_ranges(self, {"rank": "[1, inf)", "alpha": "(0, inf)", "dropout": "[0, 1)"}, prefix="lora.")
        for pattern, interval in (("rank_pattern", "[1, inf)"), ("alpha_pattern", "(0, inf)")):
            values = getattr(self, pattern)
            check_ranges(values, dict.fromkeys(values, interval), prefix=f"lora.{pattern}.")
        layers: dict[Any, int] = dict(enumerate(self.layers_to_transform or ()))
        check_ranges(layers, dict.fromkeys(layers, "[0, inf)"), prefix="lora.layers_to_transform.")
        if self.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
            raise UserError(
                f"lora.init_lora_weights is {self.init_lora_weights!r}; set true, false, gaussian or orthogonal: other "
                "ways change the base model's weights, which checkpoints and engines don't have"
            )
        _check_names(self.options)

    def _read_adapter(self) -> None:
        """Take the options of the adapter's configuration.

        Raises:
            UserError: there is no such adapter, or an option that was set differs from it.
        """
        read = options_of(_adapter_config(self.adapter)) | {"dropout": self.dropout}
        for option in fields(self):
            value = getattr(self, option.name)
            if option.name in read and value not in (default_of(option), read[option.name]):
                raise UserError(
                    f"lora.{option.name} is {value!r}, but the adapter {self.adapter} has {read[option.name]!r}; leave "
                    "it unset, or train a new adapter without lora.adapter"
                )
        for name, value in read.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    @property
    def begins_at_base(self) -> bool:
        """Whether the model without its adapters is the policy before training, so that it can be the reference."""
        return self.adapter is None and self.options.get("bias", "none") == "none"

    def config(self) -> LoraConfig:
        """Return the configuration for PEFT.

        Raises:
            UserError: PEFT refuses this combination of options.
        """
        options = asdict(self)
        del options["adapter"]
        further = options.pop("options")
        try:
            renamed = {PEFT_NAMES.get(name, name): value for name, value in options.items()}
            return LoraConfig(task_type="CAUSAL_LM", **renamed, **further)
        except (ValueError, TypeError) as error:
            raise UserError(f"lora: PEFT refuses this combination of options: {error}") from error


def default_of(option: Any) -> Any:
    """Return the default value of a dataclass's field."""
    return option.default if option.default_factory is MISSING else option.default_factory()


def options_of(config: LoraConfig) -> dict[str, Any]:
    """Return the options of `LoRA` that describe the same adapters as ``config``."""
    own = [option.name for option in fields(LoRA) if option.name not in ("adapter", "options")]
    renamed = {name: PEFT_NAMES.get(name, name) for name in own}
    options = {name: _plain(getattr(config, theirs)) for name, theirs in renamed.items()}
    further = [option for option in fields(LoraConfig) if option.name not in (*renamed.values(), *MANAGED)]
    changed = {option.name: getattr(config, option.name) for option in further}
    options["options"] = {o.name: changed[o.name] for o in further if changed[o.name] != default_of(o)}
    return options


def _plain(value: Any) -> Any:
    """PEFT makes lists of names to sets."""
    return sorted(value) if isinstance(value, set) else value


def _check_names(options: Mapping[str, Any]) -> None:
    """Raise `UserError` unless all ``options`` are fields of PEFT's LoraConfig that may be set."""
    own = {PEFT_NAMES.get(option.name, option.name): option.name for option in fields(LoRA)}
    known = {option.name for option in fields(LoraConfig)} - set(MANAGED)
    for name in options:
        if name in own:
            raise UserError(f"lora.options has {name}; set lora.{own[name]} instead")
        if name in CHANGES_BASE:
            raise UserError(
                f"lora.options has {name}, which changes the base model's weights or layers, which checkpoints and "
                "engines don't have; remove it"
            )
        if name not in known:
            near = difflib.get_close_matches(name, known - own.keys(), 1)
            hint = f"did you mean {near[0]}?" if near else f"its fields are {', '.join(sorted(known - own.keys()))}"
            raise UserError(f"lora.options has {name}, which is no field of the installed PEFT's LoraConfig; {hint}")


def _adapter_config(adapter: str) -> LoraConfig:
    if Path(adapter).exists() and not (Path(adapter) / "adapter_config.json").is_file():
        raise UserError(f"lora.adapter is {adapter!r}, which has no adapter_config.json; set the folder of an adapter")
    try:
        config = LoraConfig.from_pretrained(adapter)
    except Exception as error:
        raise UserError(
            f"lora.adapter is {adapter!r}, which can't be read ({' '.join(str(error).split())[:200]}); set the folder "
            "of an adapter that PEFT saved, or its name on the hub"
        ) from error
    if not isinstance(config, LoraConfig):
        raise UserError(f"lora.adapter is {adapter!r}, an adapter of type {config.peft_type}; set one of type LORA")
    return config


def with_adapters(policy: PreTrainedModel, lora: LoRA) -> PeftModel:
    """Add adapters to ``policy``: new ones, or those of ``lora.adapter``.

    Raises:
        UserError: ``lora.target_modules`` names no layers, or the adapter doesn't fit the model.
    """
    config = lora.config()
    try:
        adapted = get_peft_model(policy, config)
    except (ValueError, re.error) as error:
        linears = {name.rpartition(".")[2] for name, module in policy.named_modules() if isinstance(module, nn.Linear)}
        raise UserError(
            f"lora.target_modules is {lora.target_modules!r}: {error}; set it to all-linear, or to names among "
            f"{', '.join(sorted(linears))}"
        ) from error
    if lora.adapter is not None:
        load_adapter_files(adapted, lora.adapter)
    return adapted


def load_adapter_files(policy: PeftModel, adapter: str) -> None:
    """Give the adapters of ``policy`` the values in a folder or repository.

    Raises:
        UserError: they are adapters of another model.
    """
    try:
        weights = load_peft_weights(adapter, device="cpu")
        result: Any = set_peft_model_state_dict(policy, weights)  # a named tuple, whose type torch does not export
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"lora.adapter is {adapter!r}, which can't be loaded into the model: {reason}") from error
    own = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    if missing := sorted(own & set(result.missing_keys)) or sorted(result.unexpected_keys):
        raise UserError(
            f"lora.adapter is {adapter!r}, whose weights are not those of this model's adapters: {len(missing)} "
            f"differ, for example {missing[0]}; set model to the model that it was trained for"
        )
