"""Where a NaN or infinite value comes from, and a file with the batch that caused it."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import Trainer
from torch import Tensor, nn

from lightning_grpo.module import GRPOModule
from lightning_grpo.training.experience import Experience

INPUTS = ("rewards", "advantages", "rollout_logprobs", "old_logprobs", "ref_logprobs")
"""Columns of an experience that must be finite. A reward of NaN does not apply."""


class Origin(NamedTuple):
    """The first tensor that is not finite."""

    tensor: str
    """Its name, such as ``the output of model.layers.1.mlp``."""
    place: int | None = None
    """Row of the experience for which it is not finite; None if it belongs to no row."""


def find_origin(module: GRPOModule, experience: Experience, places: Sequence[int], trainer: Trainer) -> Origin | None:
    """Look for the origin in the order of the computation: inputs, weights, forward pass, gradients.

    The passes are repeated for one completion after the other. With sharded weights only the inputs are searched.

    Args:
        module: holds the gradients of the step.
        experience: of this rank.
        places: rows of the optimizer step.
        trainer: of the module.
    """
    if (origin := _in_inputs(experience, places)) or module.device_mesh is not None:
        return origin
    for name, parameter in module.policy.named_parameters():
        if not parameter.isfinite().all():
            return Origin(f"the weight {name}")
    for place in places:
        if tensor := _in_forward(module, experience.rows([place], module.device), trainer):
            return Origin(tensor, place)
    return _in_gradients(module, experience, places, trainer)


def _in_inputs(experience: Experience, places: Sequence[int]) -> Origin | None:
    for name in INPUTS:
        values = getattr(experience, name)
        for place in places if values is not None else ():
            row = values[place]
            if (row.isinf() if name == "rewards" else ~row.isfinite()).any():
                return Origin(name, place)
    return None


def _in_forward(module: GRPOModule, row: Experience, trainer: Trainer) -> str | None:
    """The first output of a submodule that is not finite, or the log-probs."""
    found: list[str] = []

    def look(name: str, _module: nn.Module, _inputs: object, output: Any) -> None:
        tensors = [x for x in (output if isinstance(output, tuple) else [output]) if isinstance(x, Tensor)]
        if not found and not all(x.isfinite().all() for x in tensors if x.is_floating_point()):
            found.append(f"the output of {name}")

    hooks = [part.register_forward_hook(partial(look, name)) for name, part in module.policy.named_modules() if name]
    try:
        with torch.no_grad():
            logprobs = _logprobs(module, row, trainer)[0]
    finally:
        for hook in hooks:
            hook.remove()
    if not found and not logprobs[row.completion_mask].isfinite().all():
        found.append("the log-probs")
    return found[0] if found else None


def _in_gradients(module: GRPOModule, experience: Experience, places: Sequence[int], trainer: Trainer) -> Origin | None:
    """The last weight whose gradient is not finite, which is the first one in the backward pass."""
    broken = [
        (name, parameter)
        for name, parameter in module.policy.named_parameters()
        if parameter.grad is not None and not parameter.grad.isfinite().all()
    ]
    if not broken:
        return None
    name, parameter = broken[-1]
    for place in places:
        row = experience.rows([place], module.device)
        logprobs, entropy = _logprobs(module, row, trainer)
        tokens = float(row.completion_mask.sum())
        loss, _ = module.compute_loss(logprobs, entropy, row, num_tokens=tokens, num_sequences=1)
        gradient = torch.autograd.grad(loss, parameter, allow_unused=True)[0] if loss.requires_grad else None
        if gradient is not None and not gradient.isfinite().all():
            return Origin(f"the gradient of {name}", place)
    return Origin(f"the gradient of {name}")


def _logprobs(module: GRPOModule, row: Experience, trainer: Trainer) -> tuple[Tensor, ...]:
    with trainer.precision_plugin.forward_context():
        return module.scorer.logprobs(module.policy, row, entropy_grad=module.objective.needs_entropy_grad)


def save_batch(
    path: Path, experience: Experience, places: Sequence[int], metrics: Mapping[str, float], origin: Origin | None
) -> None:
    """Write the rows of the optimizer step, the metrics of the step before it, and the origin, for ``torch.load``."""
    columns: dict[str, Any] = {
        name: x.detach().cpu() if isinstance(x, Tensor) else x
        for name, x in vars(experience.rows(places)).items()
        if isinstance(x, Tensor | int)
    }
    first = None if origin is None else {"tensor": origin.tensor, "row": _index(places, origin.place)}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"experience": columns, "metrics": dict(metrics), "first": first}, path)


def _index(places: Sequence[int], place: int | None) -> int | None:
    return None if place is None else list(places).index(place)
