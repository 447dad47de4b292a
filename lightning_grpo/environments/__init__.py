"""Environments: what a policy acts in over several turns."""

from lightning_grpo.lazy import lazy_names

_MODULES = {
    "guess": ("GuessNumber",),
    "protocol": ("Environment", "Step"),
    "python_tools": ("calculate", "run_python"),
    "template": ("TurnTemplate",),
    "tools": ("ToolEnvironment",),
    "trl": ("TRLEnvironment",),
    "verifiers": ("VerifiersEnvironment",),
}
__all__ = sorted(name for names in _MODULES.values() for name in names)

__getattr__, __dir__ = lazy_names(
    __name__, {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}
)
