"""Per-token log-probs of completions under a Hugging Face causal LM, without [tokens, V] logits.

The model is called unchanged, including wrappers and hooks. Only the forward of its head is replaced, by a function
that selects the hidden states which predict a completion token, and passes them to `linear_logprob` with the head's
weight. Where the model supports it, a micro-batch is one row without padding (`policy.packing`).

Shapes: N rows, P prompt length, T completion length, A scored tokens, V vocabulary, H hidden.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from lightning_grpo.errors import RunError
from lightning_grpo.kernels import logits_logprob
from lightning_grpo.policy.head import Head, head_of, model_inputs, override_forward, warn_once
from lightning_grpo.policy.load import base_model
from lightning_grpo.policy.packable import packs
from lightning_grpo.policy.packing import pack
from lightning_grpo.policy.shared_prompts import PromptOfPass


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
    grad_norm: bool = False,
    prompt: PromptOfPass | None = None,
) -> tuple[Tensor, ...]:
    """Return the log-prob of each completion token given the preceding tokens, and the entropy of its distribution.

    Args:
        model: any Hugging Face causal LM, bare or wrapped (PEFT, FSDP2), tied or not, in any precision.
        prompt_ids: [N, P] int64, left-padded.
        prompt_mask: [N, P] bool, True on real tokens.
        completion_ids: [N, T] int64, right-padded.
        completion_mask: [N, T] bool, True for tokens to score. A token that is False before the last True one of its
            row is context for later tokens, and is not scored.
        temperature: divides the logits; a number, or [N] with one value per row.
        share_prompt: compute a prompt that several rows share only once (with gradients), if the model supports it.
        entropy_grad: propagate gradients from the entropy too.
        coefficient: [N, T], ∂loss/∂logprob if it is known before the loss, which saves work in `linear_logprob`.
        grad_norm: also return the squared norm of ∂log-prob/∂logits, without gradients for any result.
        prompt: of all rows, if several passes share it. It is computed in the first of them, or in each if the model
            does not support it.

    Returns:
        (logprobs, entropy), [N, T] each, fp32, in nats; 0 at positions where ``completion_mask`` is False. With
        ``grad_norm`` a third value.
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
        grad_norm,
    )
    head = head_of(model, batch.prompt_ids[:1, -2:])
    # An empty prompt has no token that predicts the first one.
    packed = packs(model) and bool(batch.prompt_mask.any(1).all())
    cached = share_prompt and head is not None and (prompt is not None or not packed)
    shared = _shared_prompts(model, batch, prompt) if cached else None
    with _casts_once():
        if head is not None and shared is not None:
            results = _shared(model, head, batch, shared)
        else:
            inputs, predicting = _packed(batch, share_prompt) if packed else _padded(model, batch)
            run = _through_logits if head is None else _call
            results = run(model, head, batch, inputs, predicting)
    return tuple(x.new_zeros(mask.shape).masked_scatter(mask.bool(), x) for x in results)


def shares_prompts(model: nn.Module) -> bool:
    """Return whether a prompt that several rows share can be computed only once."""
    return packs(model) or _no_cache(model) is None


def _padding(mask: Tensor) -> int:
    """The number of leading columns in which no row has a token, at most all but one."""
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
    grad_norm: bool

    def options(self) -> dict:
        """The arguments of `linear_logprob` for the active tokens, in the order of ``x[completion_mask]``."""
        t = self.temperature
        if isinstance(t, Tensor) and t.dim():
            t = t[:, None].expand(self.completion_mask.shape)[self.completion_mask]
        return {
            "targets": self.completion_ids[self.completion_mask],
            "temperature": t,
            "entropy_grad": self.entropy_grad,
            "coefficient": None if self.coefficient is None else self.coefficient[self.completion_mask],
            "grad_norm": self.grad_norm,
        }

    @property
    def context(self) -> Tensor:
        """[N, T] bool: the completion tokens to attend to, which are all up to the last scored one."""
        return self.completion_mask.flip(1).cummax(1).values.flip(1)

    def inputs(self, model: nn.Module) -> dict:
        """The model's arguments. The last token predicts nothing, and is omitted."""
        mask = torch.cat([self.prompt_mask, self.context], 1)[:, :-1]
        return model_inputs(model, torch.cat([self.prompt_ids, self.completion_ids], 1)[:, :-1], mask)


@contextmanager
def _casts_once() -> Iterator[None]:
    """Make autocast cast each weight once for all forward passes inside, and keep one copy for the backward.

    Without gradients the cache is not enabled: later passes with gradients must not find casts that have none.
    """
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(cached or torch.is_grad_enabled())
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def _padded(model, batch: _Batch) -> tuple[dict, Callable]:
    """Return the model's arguments, and the function that selects the hidden states which predict active tokens."""
    T = batch.completion_ids.shape[1]
    return batch.inputs(model), lambda hidden: hidden[:, -T:][batch.completion_mask]


def _packed(batch: _Batch, share_prompt: bool) -> tuple[dict, Callable]:
    """What `_padded` returns, for one row without padding."""
    row = pack(batch.prompt_ids, batch.prompt_mask, batch.completion_ids, batch.context, share_prompt=share_prompt)
    return row.inputs(), lambda hidden: hidden[0, row.predicting[batch.completion_mask]]


def _call(model, head: Head, batch: _Batch, inputs: dict, predicting: Callable):
    """Run the model; ``predicting`` selects the hidden states [A, H] that predict active completion tokens."""
    result = None

    def forward(hidden: Tensor) -> Tensor:
        nonlocal result
        result = head.logprobs(original, predicting(hidden), batch.options())
        return hidden[..., :1]

    original = head.module.forward
    with override_forward(head.module, forward):
        logits = model(**inputs).logits
    if isinstance(model, FSDPModule):
        # FSDP registers its backward hooks on the output of the model.
        result = (result[0] + 0 * logits.sum(), *result[1:])
    return result


def _through_logits(model, _, batch: _Batch, inputs: dict, predicting: Callable) -> tuple[Tensor, ...]:
    options = batch.options()
    del options["coefficient"]
    return logits_logprob(predicting(model(**inputs).logits), **options)


# ── Prompts shared by padded rows ─────────────────────────────────────────────────────────────────────────────────────


@dataclass
class _Shared:
    rows: Tensor
    """[U], one row for each distinct prompt."""
    inverse: Tensor
    """[N], index of each row's prompt in ``rows``."""
    cache: DynamicCache
    stored: PromptOfPass | None


def _shared_prompts(model: nn.Module, batch: _Batch, stored: PromptOfPass | None) -> _Shared | None:
    """Return how rows share prompts; None if this saves nothing or the model does not support it."""
    N, T = batch.completion_ids.shape
    key = batch.prompt_ids.masked_fill(~batch.prompt_mask, -1)
    unique, inverse = torch.unique(key, dim=0, return_inverse=True)
    if (len(unique) == N and stored is None) or T == 1:
        return None
    if reason := _no_cache(model):
        times = "once per row" if stored is None else "in each pass of their completions"
        warn_once(model, f"{type(model).__name__}: prompts are computed {times} instead of once per group: {reason}")
        return None
    rows = torch.empty(len(unique), dtype=torch.long, device=inverse.device)
    rows[inverse] = torch.arange(N, device=inverse.device)
    return _Shared(rows, inverse, DynamicCache(config=base_model(model).config), stored)


def _no_cache(model: nn.Module) -> str | None:
    """Return why the model can't use the key-value cache of prompts in training, or None."""
    base = base_model(model)
    if model.training and getattr(base, "is_gradient_checkpointing", False):
        return "gradient checkpointing drops the key-value cache"
    if isinstance(model, FSDPModule):
        return "FSDP gathers weights for one forward pass at a time"
    layers = {type(layer).__name__ for layer in DynamicCache(config=base.config).layers}
    unsupported = layers - {DynamicLayer.__name__, DynamicSlidingWindowLayer.__name__}
    if unsupported or not layers:
        return f"its cache has {', '.join(sorted(unsupported)) or 'no layers'}"
    return None


def _shared(model, head: Head, batch: _Batch, shared: _Shared) -> tuple[Tensor, ...]:
    """Run each distinct prompt once, keeping its key-value cache and graph, and then all completions with the cache."""
    compute = lambda: _prompts(model, head, batch, shared)
    cache, last = compute() if shared.stored is None else shared.stored.cache(compute)
    cache.batch_select_indices(shared.inverse)
    mask = torch.cat([batch.prompt_mask, batch.context[:, :-1]], 1)
    inputs = model_inputs(model, batch.completion_ids[:, :-1], mask)
    completions = {**inputs, "past_key_values": cache, "use_cache": True}
    predicting = lambda hidden: torch.cat([last[shared.inverse], hidden], 1)[batch.completion_mask]
    return _call(model, head, batch, completions, predicting)


def _prompts(model, head: Head, batch: _Batch, shared: _Shared) -> tuple[DynamicCache, Tensor]:
    """Run each distinct prompt; return the cache, and the last hidden states [U, 1, H]."""
    last = None

    def forward(hidden: Tensor) -> Tensor:
        nonlocal last
        last = hidden[:, -1:]
        return last[..., :1]

    prompts = model_inputs(model, batch.prompt_ids[shared.rows], batch.prompt_mask[shared.rows])
    with override_forward(head.module, forward):
        model(**{**prompts, "past_key_values": shared.cache, "use_cache": True})
    P = batch.prompt_ids.shape[1]
    if shared.cache.get_seq_length() != P:
        raise RunError(
            f"{type(model).__name__} stored {shared.cache.get_seq_length()} of {P} prompt positions in its key-value "
            f"cache; set share_prompt to false for this model"
        )
    return shared.cache, last
