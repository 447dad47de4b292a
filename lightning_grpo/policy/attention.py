"""Attention functions registered with transformers.

`train_attention` (`NAME`) is SDPA, except for rows of several sequences on CPUs (`policy.packing`): those have
`kernels.attention`, which computes no masked blocks, and in bfloat16 takes a fraction of SDPA's time
(benchmarks/packing.py). `decode_attention` (`DECODING_NAME`) is for sampling token by token.

Shapes: N rows, T queries, L keys, H query heads, K key heads, D head size.
"""

import functools

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import is_tracing

from lightning_grpo.errors import RunError
from lightning_grpo.kernels.attention import attention
from lightning_grpo.policy.packing import Layout

# transformers rejects models without SDPA if the name contains "sdpa".
NAME, DECODING_NAME = "sdpa_or_products", "sdpa_one_query"

# Arguments that change the result.
UNSUPPORTED = ("position_bias", "cache", "s_aux", "dropout")


def attention_for(config: PreTrainedConfig, requested: str | None) -> str | None:
    """Return the attention to load a causal language model with: ``requested``.

    For models without SDPA or a choice of attention, such as Falcon, `NAME` becomes None, transformers' default.
    """
    models = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), ())
    models = models if isinstance(models, tuple) else (models,)
    supported = all(model._supports_sdpa and model._can_set_attn_implementation() for model in models)
    return requested if supported or requested != NAME else None


def train_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    layout: Layout | None = None,
    **options,
) -> tuple[Tensor, None]:
    """Return attention [N, T, H, D] of query [N, H, T, D], key and value [N, K, L, D] and mask [N, 1, T, L] or None.

    The signature and the result are those of transformers' SDPA. With ``layout`` the only row has these sequences,
    and the mask is not used.

    Raises:
        RunError: with ``layout``, an argument of the module that is not supported.
    """
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    window = options.get("sliding_window")
    refused = [name for name in UNSUPPORTED if isinstance(options.get(name), Tensor) or options.get(name)]
    # Of a row of ones a model makes a mask for windows only, or if it is traced.
    if attention_mask is not None and window is None and not is_tracing(attention_mask):
        refused.append("attention_mask")
    if refused:
        raise RunError(
            f"{type(module).__name__} calls its attention with {', '.join(refused)}, which rows of several completions "
            "do not support; set attn_implementation to sdpa"
        )
    device_type, dtype = query.device.type, query.dtype
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
    computed = torch.float32 if dtype == torch.bfloat16 and not _multiplies_bfloat16() else dtype
    scale = options.get("scaling")
    with torch.autocast(device_type, enabled=False):
        query, key, value = (x.to(computed) for x in (query, key, value))
        blocks = layout.blocks(query.shape[1], window)
        out = attention(query, key, value, blocks, query.shape[-1] ** -0.5 if scale is None else scale).to(dtype)
    return out.transpose(1, 2), None


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
