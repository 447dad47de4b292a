"""Whether a model computes rows of several completions, verified by a tiny comparison with rows of one."""

import inspect
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from lightning_grpo.errors import RunError
from lightning_grpo.kernels.attention import Block
from lightning_grpo.policy.attention import NAME
from lightning_grpo.policy.head import model_inputs, warn_once
from lightning_grpo.policy.load import base_model
from lightning_grpo.policy.packing import Layout, PackedRow

# Kinds of layers that see other tokens through attention only.
ATTENTION_LAYERS = {"full_attention", "sliding_attention"}

_packs: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


def packs(model: nn.Module) -> bool:
    """Return whether `completion_logprobs` computes a micro-batch as one row, as for models on CPUs with `NAME`.

    A model is verified when it is first asked for. All ranks must ask.
    """
    base = base_model(model)
    if base.config._attn_implementation != NAME or next(base.parameters()).device.type != "cpu":
        return False
    if model not in _packs:
        reason = _unsupported(model)
        _packs[model] = reason is None
        if reason is not None:
            warn_once(model, f"{type(model).__name__}: completions are padded instead of packed: {reason}")
    return _packs[model]


@dataclass(frozen=True, eq=False)
class _CountedLayout(Layout):
    calls: list[int] = field(default_factory=list)
    """The number of heads of each attention that used the layout."""

    def blocks(self, heads: int, window: int | None = None) -> list[Block]:
        self.calls.append(heads)
        return super().blocks(heads, window)


@torch.no_grad()
def _unsupported(model: nn.Module) -> str | None:
    """Return why the model can't compute rows of several completions, or None if it can.

    The model must hand the layout to the attention of each layer, and give two completions of a shared prompt the
    logits that they have in a row of their own.
    """
    base = base_model(model)
    config = base.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ()) - ATTENTION_LAYERS
    if kinds or getattr(config, "attention_chunk_size", None):
        return f"it has layers of kind {', '.join(sorted(kinds)) or 'chunked_attention'}"
    if "position_ids" not in inspect.signature(base.forward).parameters:
        return "its forward has no position_ids"
    padded = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6]])
    layout = _CountedLayout([2], [[2, 2]])
    row = PackedRow(torch.arange(1, 7)[None], layout, torch.zeros(2, 2, dtype=torch.long))
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False  # dropout would differ
        with torch.autocast("cpu", enabled=False):
            expected = model(**model_inputs(model, padded, torch.ones_like(padded, dtype=torch.bool))).logits
            found = model(**row.inputs()).logits[0]
    except (RunError, TypeError, ValueError) as error:
        return str(error)
    finally:
        for module in training:
            module.training = True
    if len(layout.calls) != config.num_hidden_layers:
        return f"{len(layout.calls)} of {config.num_hidden_layers} layers use the layout of such a row"
    exact = not isinstance(model, FSDPModule) and all(p.dtype == torch.float32 for p in model.parameters())
    if not _close(found[torch.tensor([[0, 1, 2, 3], [0, 1, 4, 5]])], expected, 1e-4 if exact else 5e-2):
        return "its logits are others than those of padded rows"
    return None


def _close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())
