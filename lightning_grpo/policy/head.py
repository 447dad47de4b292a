"""What a Hugging Face causal LM does with its last hidden states, found out from the model itself."""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from lightning_grpo.kernels import linear_logprob, logits_logprob

log = logging.getLogger(__name__)

# Tokens at a time through a head that is no plain linear layer.
HEAD_CHUNK = 1024


@dataclass
class Head:
    """What the model does with its last hidden states: softcap(scale·module(hidden)), its first ``vocabulary`` ids."""

    module: nn.Module
    scale: float
    softcap: float | None
    vocabulary: int

    @property
    def linear(self) -> bool:
        """Whether the module is hidden @ weight.T + bias and nothing else."""
        return type(self.module).forward is nn.Linear.forward

    def logprobs(self, forward: Callable, hidden: Tensor, options: dict) -> tuple[Tensor, Tensor]:
        """Of ``hidden`` [A, H]; ``forward`` is the module's own."""
        # A weight that stays sharded while its module runs (tensor parallelism) is the module's own business.
        if self.linear and not isinstance(self.module.weight, DTensor):
            weight, bias = self.module.weight, self.module.bias
            if self.vocabulary < len(weight):
                weight, bias = weight[: self.vocabulary], None if bias is None else bias[: self.vocabulary]
            return linear_logprob(hidden, weight, bias=bias, scale=self.scale, softcap=self.softcap, **options)

        def chunk(hidden, targets, temperature):
            logits = forward(hidden)[:, : self.vocabulary].float() * self.scale
            if self.softcap is not None:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            return logits_logprob(logits, targets, temperature=temperature, entropy_grad=options["entropy_grad"])

        temperature = torch.as_tensor(options["temperature"], device=hidden.device).expand(len(hidden))
        parts = [x.split(HEAD_CHUNK) for x in (hidden, options["targets"], temperature)]
        found = [checkpoint(chunk, *part, use_reentrant=False) for part in zip(*parts, strict=True)]
        return tuple(torch.cat(x) for x in zip(*found, strict=True))


@contextmanager
def replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Let ``module`` compute ``forward`` when it is called, its hooks (FSDP2's among them) as ever."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


_heads: WeakKeyDictionary[nn.Module, Head | None] = WeakKeyDictionary()
_said: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def say_once(model: nn.Module, message: str) -> None:
    """Log a warning about this model, unless it was logged before."""
    said = _said.setdefault(model, set())
    if message not in said:
        said.add(message)
        log.warning(message)


def head_of(model: nn.Module, ids: Tensor) -> Head | None:
    """The head and what follows it, proved once on the model by ``ids`` [1, ≥ 1]; None where it is something else."""
    module = model.get_output_embeddings()
    if model not in _heads or (_heads[model] is not None and _heads[model].module is not module):
        _heads[model] = None if module is None else _probe(model, module, ids)
        name = type(model).__name__
        if _heads[model] is None:
            say_once(model, f"{name}: logits are no known function of its output embeddings; whole logits are held")
        elif not _heads[model].linear:
            say_once(
                model, f"{name}: the head is a {type(module).__name__}; its logits are made {HEAD_CHUNK} at a time"
            )
    return _heads[model]


def model_inputs(model: nn.Module, ids: Tensor, mask: Tensor) -> dict:
    """What a model is called with; ``ids`` are the last columns of ``mask``."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
    if "position_ids" in inspect.signature(base.forward).parameters:
        inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return inputs


@torch.no_grad()
def _probe(model: nn.Module, module: nn.Module, ids: Tensor) -> Head | None:
    """Put a ramp in the place of the head's output and see what logits the model makes of it."""
    ramp = None

    def forward(hidden: Tensor) -> Tensor:
        nonlocal ramp
        width = own(hidden).shape[-1]
        ramp = torch.cat(
            [hidden.new_tensor([1e-3, 1e6], dtype=torch.float32), torch.linspace(-99, 99, width - 2).to(hidden.device)]
        )
        return ramp.expand(*hidden.shape[:-1], width)

    own = module.forward
    device = ids.device
    # The probe must not shift the random numbers that dropout draws.
    with (
        torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type),
        replaced(module, forward),
    ):
        logits = model(**model_inputs(model, ids, torch.ones_like(ids, dtype=torch.bool))).logits[0, -1].float()
    if ramp is None or len(logits) > len(ramp):
        return None
    ramp = ramp[: len(logits)]
    scale = float(logits[0] / ramp[0])
    softcap = None if torch.isclose(logits[1], scale * ramp[1], rtol=1e-2) else float(logits[1])
    expected = scale * ramp if softcap is None else softcap * torch.tanh(scale * ramp / softcap)
    return Head(module, scale, softcap, len(logits)) if torch.allclose(logits, expected, rtol=1e-4, atol=1e-4) else None
