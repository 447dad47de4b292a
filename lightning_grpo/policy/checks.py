"""Checks before training: all weights of the model exist and are finite, and a token ends completions.

transformers would initialize missing weights at random and only log a warning.
"""

import logging
from collections.abc import Collection, Mapping
from itertools import islice
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from lightning_grpo.errors import UserError

log = logging.getLogger(__name__)


def shortened(names: Collection[str], limit: int = 3) -> str:
    """Return the first names in order, and the number of further ones."""
    further = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(islice(sorted(names), limit)) + further


def require_causal(model: str, config: PreTrainedConfig) -> None:
    """Raise `UserError` for encoder-decoders, and for encoders with a language-model head."""
    if config.is_encoder_decoder:
        raise UserError(
            f"model is {model!r}: {config.model_type} is an encoder-decoder; set a causal (decoder-only) language model"
        )
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and getattr(config, "is_decoder", True) is False:
        raise UserError(
            f"model is {model!r}: {config.model_type} with is_decoder false attends to the tokens that it has to "
            "predict; set a causal language model"
        )


def require_complete(model: str, loading_info: Mapping[str, Any]) -> None:
    """Raise `UserError` if weights are missing in the checkpoint, or have another shape than in its configuration.

    Args:
        model: the folder or hub name, for messages.
        loading_info: the information that ``from_pretrained`` returns with ``output_loading_info``. A tied head is
            not missing.
    """
    missing, unexpected = loading_info["missing_keys"], loading_info["unexpected_keys"]
    if mismatched := loading_info["mismatched_keys"]:
        name, saved, expected = min(mismatched)
        raise UserError(
            f"model is {model!r}: {len(mismatched)} of its tensors differ in shape from config.json: {name} is "
            f"{tuple(saved)}, not {tuple(expected)}; use the configuration of these weights"
        )
    if missing:
        others = f" (it has {shortened(unexpected)}, which the model lacks)" if unexpected else ""
        raise UserError(
            f"model is {model!r}: its weights lack {len(missing)} tensors of the model: {shortened(missing)}{others}; "
            "copy the checkpoint again, or set from_scratch to true to train from random weights"
        )
    if unexpected:
        log.warning("%s has %d tensors that the model doesn't use: %s", model, len(unexpected), shortened(unexpected))


@torch.no_grad()
def require_finite(model: str, policy: torch.nn.Module) -> None:
    """Raise `UserError` if any weight is NaN or infinite."""
    # aminmax needs one pass and no copy, and is NaN if any value is NaN
    broken = [
        name
        for name, p in policy.named_parameters()
        if p.numel() and not p.is_meta and not torch.stack(p.aminmax()).isfinite().all()
    ]
    if broken:
        raise UserError(
            f"model is {model!r}: {len(broken)} of its tensors have NaN or infinite values: {shortened(broken)}; use "
            "an earlier checkpoint, or, if dtype is float16, set it to float32 or bfloat16"
        )


def require_end_token(
    model: str, tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig, generation: GenerationConfig
) -> None:
    """Raise `UserError` if no token ends completions, or a special token is not in the embedding."""
    ends = generation.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    if not ends:
        raise UserError(
            f"model is {model!r}: neither its tokenizer nor its generation_config.json has an end-of-sequence token, "
            "so completions would never end; set eos_token in tokenizer_config.json, or eos_token_id in "
            "generation_config.json"
        )
    if invalid := [end for end in ends if not isinstance(end, int)]:
        raise UserError(
            f"model is {model!r}: eos_token_id in its generation_config.json is {invalid[0]!r}; set a token's id, or a "
            "list of them"
        )
    rows = config.get_text_config().vocab_size
    for token in ends | {tokenizer.pad_token_id} - {None}:
        if 0 <= token < rows:
            continue
        raise UserError(
            f"model is {model!r}: the special token {tokenizer.convert_ids_to_tokens(token)!r} has the id {token}, but "
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
