"""Checks the option ``--reward`` before a plan is made."""

import importlib
import inspect
from typing import Any

from lightning_grpo.errors import UserError


def reward_options(name: str) -> dict[str, Any]:
    """Return the reward as an entry of ``model.rewards``.

    Raises:
        UserError: lightning_grpo.rewards has no class of this name, the class has required arguments, or the dotted
            path does not name a function.
    """
    if "." in name:
        _imported(name)
        return {"class_path": "lightning_grpo.rewards.FunctionReward", "init_args": {"function": name}}
    from lightning_grpo import rewards

    classes = {
        known: kind
        for known in rewards.__all__
        if inspect.isclass(kind := getattr(rewards, known))
        and issubclass(kind, rewards.Reward)
        and not inspect.isabstract(kind)
    }
    needed = {
        known: [p.name for p in inspect.signature(kind).parameters.values() if p.default is p.empty]
        for known, kind in classes.items()
    }
    ready = ", ".join(known for known in needed if not needed[known] and known != "Reward")
    hint = f"set one of {ready}, or the dotted path of your own function, such as my_module.my_function"
    if name not in classes or name == "Reward":
        raise UserError(f"--reward {name}: unknown reward; {hint}")
    if needed[name]:
        raise UserError(f"--reward {name}: it needs {', '.join(needed[name])}; add it to the YAML by hand, or {hint}")
    return {"class_path": f"lightning_grpo.rewards.{name}"}


def _imported(path: str) -> Any:
    module, _, function = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"--reward {path}: can't be imported ({error}); set a function in a module of this folder or of the "
            "environment"
        ) from error
    if not callable(found):
        raise UserError(f"--reward {path}: this is not a function, but {type(found).__name__}")
    return found
