"""How a Hugging Face causal LM computes logits from its last hidden states, determined by a probe of the model."""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from lightning_grpo.kernels import linear_logprob, logits_logprob
from lightning_grpo.policy.load import Float32Linear, base_model

log = logging.getLogger(__name__)

# Tokens per chunk through a head that is not a plain linear layer.
HEAD_CHUNK = 1024


@dataclass
class Head:
    """A head whose logits are the first ``vocabulary`` columns of softcap(scale·module(hidden))."""

    module: nn.Module
    scale: float
    softcap: float | None
    vocabulary: int

    @property
    def is_linear(self) -> bool:
        """Whether the module computes exactly hidden @ weight.T + bias."""
        return type(self.module).forward in (nn.Linear.forward, Float32Linear.forward)

    def logprobs(self, forward: Callable, hidden: Tensor, options: dict) -> tuple[Tensor, ...]:
        """Return the results of `linear_logprob` for ``hidden`` [A, H]; ``forward`` is the module's original one."""
        # A weight that stays sharded while its module runs (tensor parallelism) is only used through the module.
        if self.is_linear and not isinstance(self.module.weight, DTensor):
            linear = cast(nn.Linear, self.module)
            weight: Tensor = linear.weight
            bias: Tensor | None = linear.bias
            if self.vocabulary < len(weight):
                weight, bias = weight[: self.vocabulary], None if bias is None else bias[: self.vocabulary]
            others = {"scale": self.scale, "softcap": self.softcap, **options}
            if isinstance(linear, Float32Linear):
                with torch.autocast(hidden.device.type, enabled=False):
                    bias = None if bias is None else bias.float()
                    return linear_logprob(hidden.float(), weight.float(), bias=bias, **others)
            return linear_logprob(hidden, weight, bias=bias, **others)

        flags = {name: options[name] for name in ("entropy_grad", "grad_norm")}

        def chunk(hidden, targets, temperature):
            logits = forward(hidden)[:, : self.vocabulary].float() * self.scale
            if self.softcap is not None:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            return logits_logprob(logits, targets, temperature=temperature, **flags)

        temperature = torch.as_tensor(options["temperature"], device=hidden.device).expand(len(hidden))
        parts = [x.split(HEAD_CHUNK) for x in (hidden, options["targets"], temperature)]
        results = [checkpoint(chunk, *part, use_reentrant=False) for part in zip(*parts, strict=True)]
        return tuple(torch.cat(x) for x in zip(*results, strict=True))


@contextmanager
def override_forward(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Replace the forward of ``module`` temporarily. Its hooks, such as FSDP2's, run as usual."""
    original = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if original is not None:
            module.forward = original


_heads: WeakKeyDictionary[nn.Module, Head | None] = WeakKeyDictionary()
_warned: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def warn_once(model: nn.Module, message: str) -> None:
    """Log a warning about this model, unless it has been logged before."""
    messages = _warned.setdefault(model, set())
    if message not in messages:
        messages.add(message)
        log.warning(message)


def head_of(model: nn.Module, ids: Tensor) -> Head | None:
    """Return the model's head, or None if its logits are computed in an unsupported way.

    The model is probed once, with ``ids`` [1, ≥ 1].
    """
    module = base_model(model).get_output_embeddings()
    if model not in _heads or (_heads[model] is not None and _heads[model].module is not module):
        _heads[model] = None if module is None else _probe(model, module, ids)
        name = type(model).__name__
        if _heads[model] is None:
            warn_once(
                model,
                f"{name}: the logits are not a supported function of the output embeddings; materializing full logits",
            )
        elif not _heads[model].is_linear:
            warn_once(
                model,
                f"{name}: the head is a {type(module).__name__}, not a linear layer; computing logits for {HEAD_CHUNK} "
                "tokens at a time",
            )
    return _heads[model]


def model_inputs(model: nn.Module, ids: Tensor, mask: Tensor) -> dict:
    """Return the arguments of the model's forward for ``ids``, the last columns of ``mask``."""
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
    if "position_ids" in inspect.signature(base_model(model).forward).parameters:
        inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return inputs


@torch.no_grad()
def _probe(model: nn.Module, module: nn.Module, ids: Tensor) -> Head | None:
    """Replace the head's output by a ramp, and derive scale and softcap from the logits that the model returns."""
    ramp = None

    def forward(hidden: Tensor) -> Tensor:
        nonlocal ramp
        width = original(hidden).shape[-1]
        ramp = torch.cat(
            [hidden.new_tensor([1e-3, 1e6], dtype=torch.float32), torch.linspace(-99, 99, width - 2).to(hidden.device)]
        )
        return ramp.expand(*hidden.shape[:-1], width)

    original = module.forward
    device = ids.device
    # The probe must not change the random numbers that dropout draws.
    with (
        torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type),
        override_forward(module, forward),
    ):
        logits = model(**model_inputs(model, ids, torch.ones_like(ids, dtype=torch.bool))).logits[0, -1].float()
    if ramp is None or len(logits) > len(ramp):
        return None
    ramp = ramp[: len(logits)]
    scale = float(logits[0] / ramp[0])
    softcap = None if torch.isclose(logits[1], scale * ramp[1], rtol=1e-2) else float(logits[1])
    expected = scale * ramp if softcap is None else softcap * torch.tanh(scale * ramp / softcap)
    return Head(module, scale, softcap, len(logits)) if torch.allclose(logits, expected, rtol=1e-4, atol=1e-4) else None
