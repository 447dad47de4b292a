"""Former module paths, kept for one release: importing one warns and gives the names of the module in its new place."""

import warnings
from collections.abc import Sequence
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "adapters": "policy.adapters",
    "attention": "policy.attention",
    "batching": "training.batching",
    "configure.devices": "devices",
    "configure.evidence": "configure.recommendations",
    "configure.levers": "configure.memory_savers",
    "configure.pins": "configure.overrides",
    "configure.planned": "configure.result",
    "experience": "training.experience",
    "head": "policy.head",
    "logprobs": "policy.logprobs",
    "monitor.metrics": "metrics",
    "rewards.shape": "rewards.format",
    "rewards.verify": "rewards.answers",
    "rollout.access": "rollout.server.access",
    "rollout.endpoint": "rollout.server.endpoint",
    "rollout.proof": "rollout.verify",
    "rollout.receiver": "rollout.server.receiver",
    "rollout.server_engine": "rollout.server.engine",
    "rollout.server_rollout": "rollout.server.callback",
    "rollout.vllm_engine": "rollout.vllm.engine",
    "rollout.vllm_rollout": "rollout.vllm.callback",
    "rollout.weights": "policy.weights",
}
"""By former name, both without ``lightning_grpo.``."""


class MovedFinder(MetaPathFinder, Loader):
    """Finds the modules of `MOVED` under their former names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, name = fullname.partition(".")
        return ModuleSpec(fullname, self) if package == "lightning_grpo" and name in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        former = module.__name__
        current = "lightning_grpo." + MOVED[former.partition(".")[2]]
        warnings.warn(
            f"{former} is now {current}; the former name will stop working in 0.3", FutureWarning, stacklevel=2
        )
        module.__getattr__ = partial(getattr, import_module(current))  # type: ignore[method-assign]
