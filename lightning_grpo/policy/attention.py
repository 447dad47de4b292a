"""The attention of a policy on CPUs, under the name `NAME` in transformers: SDPA, and `kernels.attention` where faster.

In bfloat16 torch's SDPA takes 1.3 to 4 times as long on a CPU (benchmarks/attention.py), most of it in the backward; in
float32 it is as fast, and used.
"""

import functools

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lightning_grpo.kernels.attention import attention

# With "sdpa" in its name transformers refuses models that have none, as for its own.
NAME = "sdpa_or_products"

# Keys up to which products are faster.
LONGEST = 2048

# Arguments that change what is computed: by SDPA, or that other attentions heed.
OTHERS = ("position_bias", "cache", "softcap", "s_aux")


def attention_for(config: PreTrainedConfig, asked: str | None) -> str | None:
    """The attention to load a causal language model with: ``asked``, except that `NAME` is None, transformers' own
    choice, for a model that has no SDPA or can't be given an attention by name, such as Falcon."""
    models = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), ())
    models = models if isinstance(models, tuple) else (models,)
    takes = all(model._supports_sdpa and model._can_set_attn_implementation() for model in models)
    return asked if takes or asked != NAME else None


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options
) -> tuple[Tensor, None]:
    """transformers' SDPA [N, T, H, D] of query [N, H, T, D], key and value [N, K, L, D], mask [N, 1, T, L] or None."""
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    if dtype != torch.bfloat16 or not _takes(module, query, key, value, attention_mask, options):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scale = options.get("scaling")
    with torch.autocast(kind, enabled=False):
        cast = (x.to(dtype) for x in (query, key, value))
        found = attention(*cast, attention_mask, query.shape[-1] ** -0.5 if scale is None else scale)
    return found.transpose(1, 2), None


def _takes(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict) -> bool:
    N, _, T, D = query.shape
    L = key.shape[2]
    if query.device.type != "cpu" or T == 1 or L > LONGEST or value.shape[-1] != D or not _multiplies_bfloat16():
        return False
    if options.get("dropout") or options.get("output_attentions") or any(options.get(x) is not None for x in OTHERS):
        return False
    if mask is not None:
        return mask.dtype == torch.bool and mask.shape == (N, 1, T, L)
    causal = options.get("is_causal")
    return T == L and (getattr(module, "is_causal", True) if causal is None else causal)


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Whether oneDNN has bfloat16 products for this processor; without them torch's are slow."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
