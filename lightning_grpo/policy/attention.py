"""Attention functions registered with transformers, which replace SDPA if they are faster.

`train_attention` (`NAME`) uses `kernels.attention` on CPUs: in bfloat16, SDPA takes 1.3 to 4 times as long there,
mostly in the backward (benchmarks/attention.py). In float32 both are equally fast, and SDPA is used.
`decode_attention` (`DECODING_NAME`) is for sampling token by token.

Shapes: N rows, T queries, L keys, H query heads, K key heads, D head size.
"""

import functools

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lightning_grpo.kernels.attention import attention

# transformers rejects models without SDPA if the name contains "sdpa".
NAME, DECODING_NAME = "sdpa_or_products", "sdpa_one_query"

# The largest number of keys for which matrix products are faster.
MAX_KEYS = 2048

# Arguments that change the result of SDPA or of other attentions.
UNSUPPORTED = ("position_bias", "cache", "softcap", "s_aux")


def attention_for(config: PreTrainedConfig, requested: str | None) -> str | None:
    """Return the attention to load a causal language model with: ``requested``.

    For models without SDPA or a choice of attention, such as Falcon, `NAME` becomes None, transformers' default.
    """
    models = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), ())
    models = models if isinstance(models, tuple) else (models,)
    supported = all(model._supports_sdpa and model._can_set_attn_implementation() for model in models)
    return requested if supported or requested != NAME else None


def train_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options
) -> tuple[Tensor, None]:
    """Return attention [N, T, H, D] of query [N, H, T, D], key and value [N, K, L, D] and mask [N, 1, T, L] or None.

    The signature and the result are those of transformers' SDPA.
    """
    device_type = query.device.type
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else query.dtype
    if dtype != torch.bfloat16 or not _supports(module, query, key, value, attention_mask, options):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scale = options.get("scaling")
    with torch.autocast(device_type, enabled=False):
        query, key, value = (x.to(dtype) for x in (query, key, value))
        out = attention(query, key, value, attention_mask, query.shape[-1] ** -0.5 if scale is None else scale)
    return out.transpose(1, 2), None


def _supports(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict) -> bool:
    N, _, T, D = query.shape
    L = key.shape[2]
    if query.device.type != "cpu" or T == 1 or L > MAX_KEYS or value.shape[-1] != D or not _multiplies_bfloat16():
        return False
    if (
        options.get("dropout")
        or options.get("output_attentions")
        or any(options.get(x) is not None for x in UNSUPPORTED)
    ):
        return False
    if mask is not None:
        return mask.dtype == torch.bool and mask.shape == (N, 1, T, L)
    causal = options.get("is_causal")
    return T == L and (getattr(module, "is_causal", True) if causal is None else causal)


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Whether oneDNN has bfloat16 matrix products for this processor; those of torch are slow."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def decode_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options
) -> tuple[Tensor, None]:
    """Return attention [N, T, H, D] like SDPA. For one query per row, heads that share keys become further queries.

    The keys are then neither repeated for each of these heads nor read more than once.
    """
    N, H, T, D = query.shape
    plain = options.get("position_bias") is None and (attention_mask is None or attention_mask.shape[1] == 1)
    if T > 1 or not plain:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    folded = query.reshape(N, key.shape[1], -1, D)
    out = scaled_dot_product_attention(folded, key, value, attn_mask=attention_mask, scale=options.get("scaling"))
    return out.reshape(N, 1, H, -1), None


for _name, _function in ((NAME, train_attention), (DECODING_NAME, decode_attention)):
    AttentionInterface.register(_name, _function)
    AttentionMaskInterface.register(_name, sdpa_mask)
