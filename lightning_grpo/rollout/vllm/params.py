"""What both vLLM engines send with a request and read from its end, in process and over HTTP."""

from collections.abc import Sequence
from typing import Any

from lightning_grpo.rollout.types import FinishReason, Sampling


def sampling_params(sampling: Sampling, *, max_tokens: int, eos_token_ids: Sequence[int]) -> dict[str, Any]:
    """Arguments of `vllm.SamplingParams` by name, all but the seed.

    The engine has no tokenizer unless there are stop strings, so that the end-of-sequence tokens are passed as stop
    tokens.
    """
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "stop": list(sampling.stop),
        "stop_token_ids": list(eos_token_ids),
        "ignore_eos": True,
        "max_tokens": max_tokens,
        # Only that of the sampled token.
        "logprobs": 0,
        "detokenize": bool(sampling.stop),
        "skip_special_tokens": False,
    }


def finish_reason(reason: str | None) -> FinishReason:
    """vLLM's reason; all but "stop" and "length" count as "abort"."""
    return "stop" if reason == "stop" else "length" if reason == "length" else "abort"
