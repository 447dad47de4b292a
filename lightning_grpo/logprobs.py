"""From a Hugging Face causal LM and a batch of completions to per-token log-probs, without [tokens, V] logits.

The model is called as it is, wrappers and hooks included, but its head is handed a function that keeps only the hidden
states which predict a completion's token and passes them to `linear_logprob` with the head's weight. Shapes: N rows, P
prompt length, T completion length, V vocabulary, H hidden.
"""

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lightning_grpo.kernels import linear_logprob, logits_logprob

log = logging.getLogger(__name__)

# Tokens at a time through a head that is no plain linear layer.
HEAD_CHUNK = 1024


def completion_logprobs(
    model: nn.Module,
    *,
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    temperature: float | Tensor = 1.0,
    share_prompt: bool = True,
    entropy_grad: bool = False,
    coefficient: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-prob of each completion token given what precedes it, and the entropy of the distribution it came from.

    Args:
        model: any Hugging Face causal LM, bare or wrapped (PEFT, FSDP2), tied or not, in any precision.
        prompt_ids: [N, P] int64, left-padded.
        prompt_mask: [N, P] bool, True on real tokens.
        completion_ids: [N, T] int64, right-padded.
        completion_mask: [N, T] bool, True on real tokens.
        temperature: divides the logits; a number or [N], one for each row.
        share_prompt: where rows have the same prompt, compute it once (with gradients) and let them all attend to it.
        entropy_grad: let gradients flow from the entropy too.
        coefficient: [N, T], ∂loss/∂logprob where it is known ahead: see `linear_logprob`, which it spares work.

    Returns:
        (logprobs, entropy), [N, T] each, fp32, in nats; 0 where ``completion_mask`` is False.
    """
    mask = completion_mask
    P0, T1 = _padding(prompt_mask), completion_mask.shape[1] - _padding(completion_mask.flip(1))
    batch = _Batch(
        prompt_ids[:, P0:],
        prompt_mask[:, P0:].bool(),
        completion_ids[:, :T1],
        completion_mask[:, :T1].bool(),
        temperature,
        entropy_grad,
        None if coefficient is None else coefficient[:, :T1],
    )
    head = _head_of(model, batch)
    if head is None:
        found = _through_logits(model, batch)
    else:
        shared = _shared_prompts(model, batch) if share_prompt else None
        run = _unshared if shared is None else _shared
        found = run(model, head, batch, shared)
    return tuple(torch.zeros(mask.shape, device=x.device).masked_scatter(mask.bool(), x) for x in found)


def _padding(mask: Tensor) -> int:
    """Leading columns in which no row has a token, but never all of them."""
    used = mask.any(0)
    return int(used.int().argmax()) if used.any() else mask.shape[1] - 1


@dataclass
class _Batch:
    prompt_ids: Tensor
    prompt_mask: Tensor
    completion_ids: Tensor
    completion_mask: Tensor
    temperature: float | Tensor
    entropy_grad: bool
    coefficient: Tensor | None

    def options(self) -> dict:
        """What `linear_logprob` is told of the active tokens, in the order of ``x[completion_mask]``."""
        t = self.temperature
        if isinstance(t, Tensor) and t.dim():
            t = t[:, None].expand(self.completion_mask.shape)[self.completion_mask]
        return {
            "targets": self.completion_ids[self.completion_mask],
            "temperature": t,
            "entropy_grad": self.entropy_grad,
            "coefficient": None if self.coefficient is None else self.coefficient[self.completion_mask],
        }

    def inputs(self, model: nn.Module) -> dict:
        """The model's arguments; the last token predicts nothing and is left out."""
        mask = torch.cat([self.prompt_mask, self.completion_mask], 1)[:, :-1]
        return _inputs(model, torch.cat([self.prompt_ids, self.completion_ids], 1)[:, :-1], mask)


def _inputs(model: nn.Module, ids: Tensor, mask: Tensor) -> dict:
    """``ids`` are the last columns of ``mask``."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    inputs = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}
    if "position_ids" in inspect.signature(base.forward).parameters:
        inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    return inputs


# --- the head ---------------------------------------------------------------------------------------------------------


@dataclass
class _Head:
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
def _replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    """Let ``module`` compute ``forward`` when it is called, its hooks (FSDP2's among them) as ever."""
    own = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


_heads: WeakKeyDictionary[nn.Module, _Head | None] = WeakKeyDictionary()
_said: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


def _say_once(model: nn.Module, message: str) -> None:
    said = _said.setdefault(model, set())
    if message not in said:
        said.add(message)
        log.warning(message)


def _head_of(model: nn.Module, batch: _Batch) -> _Head | None:
    """The head and what follows it, proved on the model itself once; None where it is another function."""
    module = model.get_output_embeddings()
    if model not in _heads or (_heads[model] is not None and _heads[model].module is not module):
        _heads[model] = None if module is None else _probe(model, module, batch)
        name = type(model).__name__
        if _heads[model] is None:
            _say_once(model, f"{name}: logits are no known function of its output embeddings; whole logits are held")
        elif not _heads[model].linear:
            _say_once(
                model, f"{name}: the head is a {type(module).__name__}; its logits are made {HEAD_CHUNK} at a time"
            )
    return _heads[model]


@torch.no_grad()
def _probe(model: nn.Module, module: nn.Module, batch: _Batch) -> _Head | None:
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
    ids = batch.prompt_ids[:1, -2:]
    device = ids.device
    # The probe must not shift the random numbers that dropout draws.
    with (
        torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type),
        _replaced(module, forward),
    ):
        logits = model(**_inputs(model, ids, torch.ones_like(ids, dtype=torch.bool))).logits[0, -1].float()
    if ramp is None or len(logits) > len(ramp):
        return None
    ramp = ramp[: len(logits)]
    scale = float(logits[0] / ramp[0])
    softcap = None if torch.isclose(logits[1], scale * ramp[1], rtol=1e-2) else float(logits[1])
    expected = scale * ramp if softcap is None else softcap * torch.tanh(scale * ramp / softcap)
    return (
        _Head(module, scale, softcap, len(logits)) if torch.allclose(logits, expected, rtol=1e-4, atol=1e-4) else None
    )


# --- the forward passes -----------------------------------------------------------------------------------------------


def _unshared(model, head: _Head, batch: _Batch, _) -> tuple[Tensor, Tensor]:
    T = batch.completion_ids.shape[1]
    return _call(model, head, batch, batch.inputs(model), lambda hidden: hidden[:, -T:])


def _call(model, head: _Head, batch: _Batch, inputs: dict, predicting: Callable):
    """Run the model; ``predicting`` takes its hidden states to those [N, T, H] that predict the completions' tokens."""
    found = None

    def forward(hidden: Tensor) -> Tensor:
        nonlocal found
        active = predicting(hidden)[batch.completion_mask]
        found = head.logprobs(own, active, batch.options())
        return hidden[..., :1]

    own = head.module.forward
    with _replaced(head.module, forward):
        logits = model(**inputs).logits
    if isinstance(model, FSDPModule):
        # Its backward hooks hang on the model's output.
        found = (found[0] + 0 * logits.sum(), found[1])
    return found


def _through_logits(model, batch: _Batch) -> tuple[Tensor, Tensor]:
    T = batch.completion_ids.shape[1]
    logits = model(**batch.inputs(model)).logits[:, -T:][batch.completion_mask]
    options = batch.options()
    del options["coefficient"]
    return logits_logprob(logits, **options)


# --- prompts shared by rows -------------------------------------------------------------------------------------------


@dataclass
class _Shared:
    rows: Tensor
    """[U], one row for each different prompt"""
    inverse: Tensor
    """[N], which of the U prompts a row has"""
    cache: DynamicCache


def _shared_prompts(model: nn.Module, batch: _Batch) -> _Shared | None:
    """How rows share prompts; None where nothing is saved or the model cannot be proved to give the same."""
    N, T = batch.completion_ids.shape
    key = batch.prompt_ids.masked_fill(~batch.prompt_mask, -1)
    unique, inverse = torch.unique(key, dim=0, return_inverse=True)
    if len(unique) == N or T == 1:
        return None
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    cache = DynamicCache(config=base.config)
    strange = {type(layer).__name__ for layer in cache.layers} - {
        DynamicLayer.__name__,
        DynamicSlidingWindowLayer.__name__,
    }
    reason = None
    if model.training and getattr(base, "is_gradient_checkpointing", False):
        reason = "gradient checkpointing drops the key-value cache"
    elif isinstance(model, FSDPModule):
        reason = "its shards are gathered for one forward at a time"
    elif strange or not cache.layers:
        reason = f"its cache has {', '.join(sorted(strange)) or 'no layers'}"
    if reason:
        _say_once(model, f"{type(model).__name__}: prompts are computed once a row, not once a group: {reason}")
        return None
    rows = torch.empty(len(unique), dtype=torch.long, device=inverse.device)
    rows[inverse] = torch.arange(N, device=inverse.device)
    return _Shared(rows, inverse, cache)


def _shared(model, head: _Head, batch: _Batch, shared: _Shared) -> tuple[Tensor, Tensor]:
    """Each different prompt once into a key-value cache, with its graph; then all completions against theirs."""
    last = None

    def forward(hidden: Tensor) -> Tensor:
        nonlocal last
        last = hidden[:, -1:]
        return last[..., :1]

    caching = {"past_key_values": shared.cache, "use_cache": True}
    prompts = _inputs(model, batch.prompt_ids[shared.rows], batch.prompt_mask[shared.rows])
    with _replaced(head.module, forward):
        model(**{**prompts, **caching})
    P = batch.prompt_ids.shape[1]
    if shared.cache.get_seq_length() != P:
        raise RuntimeError(
            f"{type(model).__name__} put {shared.cache.get_seq_length()} of {P} prompt positions into its key-value "
            f"cache; set share_prompt to false for this model"
        )
    shared.cache.batch_select_indices(shared.inverse)
    mask = torch.cat([batch.prompt_mask, batch.completion_mask[:, :-1]], 1)
    completions = {**_inputs(model, batch.completion_ids[:, :-1], mask), **caching}
    predicting = lambda hidden: torch.cat([last[shared.inverse], hidden], 1)
    return _call(model, head, batch, completions, predicting)
