"""What a vLLM server must have been started with to be sampled from and to take weights."""

from dataclasses import dataclass

import torch

from lightning_grpo.rollout.endpoint import Endpoint, EndpointLost

RECEIVER = "lightning_grpo.rollout.receiver.WeightReceiver"
SERVER_FLAGS = (
    "--enable-scale-out",
    "--logprobs-mode",
    "processed_logprobs",
    "--generation-config",
    "vllm",
    "--worker-extension-cls",
    RECEIVER,
)
"""What a server needs beside the model, together with VLLM_SERVER_DEV_MODE=1 in its environment."""
COMMAND = " ".join(["VLLM_SERVER_DEV_MODE=1 python -m vllm.entrypoints.openai.api_server --model MODEL", *SERVER_FLAGS])
CANARIES = 4
"""Sequences that a server scores beside its completions after a weight sync."""


@dataclass(frozen=True, kw_only=True)
class ServerInfo:
    """How a server was started."""

    dtype: torch.dtype
    """What it computes in."""
    max_num_seqs: int
    """Completions that it samples at once."""
    has_tokenizer: bool
    """Whether it can look for stop strings."""


async def check_server(endpoint: Endpoint) -> ServerInfo:
    """Can this server be used?

    Raises:
        ConnectionError: it can't be reached.
        PermissionError: it refuses the API key.
        ValueError: it was started otherwise; the message has the command.
    """
    try:
        await endpoint.call("/health", method="GET")
    except EndpointLost as error:
        raise ConnectionError(f"{error}: it can't be reached; is the vLLM server up?") from error
    try:
        info = await endpoint.call("/server_info?config_format=json", method="GET")
        # A run that died within a sync leaves the server paused.
        await endpoint.call("/resume")
    except ValueError as error:
        raise ValueError(f"{endpoint.url} can't take weights; start it with: {COMMAND}") from error
    config = info["vllm_config"]
    model = config["model_config"]
    extension = config["parallel_config"].get("worker_extension_cls")
    if model.get("logprobs_mode") != "processed_logprobs" or extension != RECEIVER:
        raise ValueError(
            f"{endpoint.url} has logprobs_mode {model.get('logprobs_mode')!r} and worker_extension_cls {extension!r}; "
            f"start it with: {COMMAND}"
        )
    try:
        await endpoint.call("/inference/v1/generate", {"token_ids": [0], "sampling_params": {"max_tokens": 1}})
    except ValueError as error:
        raise ValueError(
            f"{endpoint.url} does not sample from token ids ({error}); start it with: {COMMAND}"
        ) from error
    return ServerInfo(
        dtype=getattr(torch, str(model["dtype"]).removeprefix("torch.")),
        max_num_seqs=config["scheduler_config"]["max_num_seqs"],
        has_tokenizer=not model["skip_tokenizer_init"],
    )
