"""What a model must have to be trained: all of its weights, each a finite number, and a token that ends a completion.

transformers fills in what a checkpoint lacks with random numbers, and goes on.
"""

import logging
from collections.abc import Collection, Mapping
from itertools import islice
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from lightning_grpo.errors import UserError

log = logging.getLogger(__name__)


def some(names: Collection[str], most: int = 3) -> str:
    """The first few names in order, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(islice(sorted(names), most)) + more


def require_causal(model: str, config: PreTrainedConfig) -> None:
    """Refuse encoder-decoders, and encoders that a language-model head was put on."""
    if config.is_encoder_decoder:
        raise UserError(
            f"model is {model!r}: {config.model_type} is an encoder-decoder; set a causal (decoder-only) language model"
        )
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and getattr(config, "is_decoder", True) is False:
        raise UserError(
            f"model is {model!r}: {config.model_type} with is_decoder false sees the tokens that it is to predict; set "
            "a causal language model"
        )


def require_complete(model: str, loading_info: Mapping[str, Any]) -> None:
    """Refuse weights that were not in the checkpoint, or not in the shape that its configuration asks for.

    Args:
        model: the folder or hub name, for messages.
        loading_info: what ``from_pretrained`` returns under ``output_loading_info``. A tied head counts as there.
    """
    missing, unexpected = loading_info["missing_keys"], loading_info["unexpected_keys"]
    if mismatched := loading_info["mismatched_keys"]:
        name, held, wanted = min(mismatched)
        raise UserError(
            f"model is {model!r}: {len(mismatched)} of its tensors differ in shape from its config.json: {name} is "
            f"{tuple(held)}, not {tuple(wanted)}; use the configuration that belongs to these weights"
        )
    if missing:
        others = f" (it has {some(unexpected)}, which the model lacks)" if unexpected else ""
        raise UserError(
            f"model is {model!r}: its weights lack {len(missing)} tensors of the model: {some(missing)}{others}; copy "
            "the checkpoint again, or set from_scratch to true to train from random weights"
        )
    if unexpected:
        log.warning("%s has %d tensors that the model doesn't use: %s", model, len(unexpected), some(unexpected))


@torch.no_grad()
def require_finite(model: str, policy: PreTrainedModel) -> None:
    """Refuse weights that are NaN or infinite."""
    # the extremes take one pass without a copy, and are NaN if any value is
    broken = [
        name
        for name, p in policy.named_parameters()
        if p.numel() and not p.is_meta and not torch.stack(p.aminmax()).isfinite().all()
    ]
    if broken:
        raise UserError(
            f"model is {model!r}: {len(broken)} of its tensors hold NaN or infinite values: {some(broken)}; use an "
            "earlier checkpoint, or, if dtype is float16, set it to float32 or bfloat16"
        )


def require_end_token(
    model: str, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, generation: GenerationConfig
) -> None:
    """Refuse a model without a token that ends completions, and special tokens beyond its embedding."""
    ends = generation.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    if not ends:
        raise UserError(
            f"model is {model!r}: neither its tokenizer nor its generation_config.json has an end-of-sequence token, "
            "so no completion would ever end; set eos_token in tokenizer_config.json, or eos_token_id in "
            "generation_config.json"
        )
    if odd := [end for end in ends if not isinstance(end, int)]:
        raise UserError(
            f"model is {model!r}: eos_token_id in its generation_config.json is {odd[0]!r}; set a token's id, or a "
            "list of them"
        )
    rows = config.get_text_config().vocab_size
    for token in ends | {tokenizer.pad_token_id} - {None}:
        if 0 <= token < rows:
            continue
        raise UserError(
            f"model is {model!r}: the special token {tokenizer.convert_ids_to_tokens(token)!r} has the id {token}, and "
            f"the model's embedding has {rows} rows: tokens were added without resizing it; call "
            "model.resize_token_embeddings(len(tokenizer)) and save both again"
        )


def context_length(config: PreTrainedConfig) -> int | None:
    """The number of positions that the model supports; None if its configuration sets no limit."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def require_context(model: str, config: PreTrainedConfig, max_prompt_length: int, max_completion_length: int) -> None:
    """Refuse a prompt and a completion that together are longer than the model supports."""
    limit, needed = context_length(config), max_prompt_length + max_completion_length
    if limit is None or needed <= limit:
        return
    ways = []
    if max_prompt_length < limit:
        ways.append(f"max_completion_length to {limit - max_prompt_length} or less")
    if max_completion_length < limit:
        ways.append(f"max_prompt_length to {limit - max_completion_length} or less")
    raise UserError(
        f"max_prompt_length {max_prompt_length} + max_completion_length {max_completion_length} = {needed} tokens, but "
        f"{model} supports {limit}; set {' or '.join(ways) or f'each to {limit // 2} or less'}"
    )
