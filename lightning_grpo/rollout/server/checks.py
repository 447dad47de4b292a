"""The flags with which a vLLM server must be started, and the check that it was."""

import json
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_grpo.errors import UnreachableError, UserError
from lightning_grpo.rollout.server.endpoint import Endpoint, EndpointLost

log = logging.getLogger(__name__)
RECEIVER = "lightning_grpo.rollout.server.receiver.WeightReceiver"
SERVER_FLAGS = (
    "--enable-scale-out",
    "--logprobs-mode",
    "processed_logprobs",
    "--generation-config",
    "vllm",
    "--worker-extension-cls",
    RECEIVER,
    "--middleware",
    "lightning_grpo.rollout.server.access.RequireKey",
)
"""The flags that a server needs besides the model. The middleware reads the API key from VLLM_API_KEY."""
SERVER_ENVIRONMENT = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1"}
"""The environment variables that it needs; the second one only for adapters."""
CHECK_SEQUENCES = 4
"""Sequences that a server scores after a weight sync while it samples completions."""


@dataclass(frozen=True, kw_only=True)
class ServerInfo:
    """How a server was started."""

    url: str
    dtype: torch.dtype
    """The dtype that it computes in."""
    max_num_seqs: int
    """Completions that each copy of the model samples at the same time."""
    copies: int
    """Copies of the model, among which it distributes requests."""
    has_tokenizer: bool
    """Whether it has a tokenizer, which stop strings require."""
    adapter_rank: int | None
    """The largest rank of a LoRA adapter that it loads in place of whole weights; None if it loads whole weights."""
    transfer: str | None
    """vLLM's own weight transfer that it was started for, such as nccl; None if it was started for none."""


async def check_server(endpoint: Endpoint) -> ServerInfo:
    """Check that a server was started as needed.

    Raises:
        ConnectionError: it cannot be reached.
        PermissionError: it rejects the API key.
        UserError: it was started with other flags; the message has the command to use.
    """
    try:
        await endpoint.call("/health", method="GET")
    except EndpointLost as error:
        raise UnreachableError(f"{error}: cannot be reached; is the vLLM server up?") from error
    try:
        info = await endpoint.call("/server_info?config_format=json", method="GET")
        # The server is still paused if an earlier run died during a sync.
        await endpoint.call("/resume")
    except ValueError as error:
        raise UserError(f"{endpoint.url} cannot load weights; start it with: {command()}") from error
    if await endpoint.is_open("/get_world_size"):
        log.warning(
            "%s accepts weights and commands from everyone without an API key; start it with: %s",
            endpoint.url,
            command(),
        )
    config = info["vllm_config"]
    model, parallel = config["model_config"], config["parallel_config"]
    extension = parallel.get("worker_extension_cls")
    if model.get("logprobs_mode") != "processed_logprobs" or extension != RECEIVER:
        raise UserError(
            f"{endpoint.url} has logprobs_mode {model.get('logprobs_mode')!r} and worker_extension_cls {extension!r}; "
            f"start it with: {command()}"
        )
    try:
        await endpoint.call("/inference/v1/generate", {"token_ids": [0], "sampling_params": {"max_tokens": 1}})
    except ValueError as error:
        raise UserError(
            f"{endpoint.url} does not sample from token ids ({error}); start it with: {command()}"
        ) from error
    return ServerInfo(
        url=endpoint.url,
        dtype=getattr(torch, str(model["dtype"]).removeprefix("torch.")),
        max_num_seqs=config["scheduler_config"]["max_num_seqs"],
        copies=_copies(parallel),
        has_tokenizer=not model["skip_tokenizer_init"],
        adapter_rank=(config["lora_config"] or {}).get("max_lora_rank"),
        transfer=(config["weight_transfer_config"] or {}).get("backend"),
    )


def _copies(parallel: dict[str, Any]) -> int:
    # With an external or hybrid load balancer every copy, or every node, is a server of its own.
    if parallel["data_parallel_external_lb"]:
        return 1
    return parallel["data_parallel_size_local" if parallel["data_parallel_hybrid_lb"] else "data_parallel_size"]


def check_alike(infos: Sequence[ServerInfo], adapter: dict[str, Any] | None) -> None:
    """Check that servers can be used together, for the adapter that `adapter_settings` describes or for whole weights.

    Raises:
        UserError: names the first server that cannot.
    """
    for info in infos:
        if info.dtype != infos[0].dtype:
            raise UserError(
                f"{info.url} computes in {info.dtype}, {infos[0].url} in {infos[0].dtype}; start them with one dtype"
            )
        if adapter is None and info.adapter_rank is not None:
            raise UserError(f"{info.url} takes adapters; set rollout lora: adapter, or start it with: {command()}")
        if adapter is not None and (info.adapter_rank or 0) < adapter["max_lora_rank"]:
            raise UserError(
                f"{info.url} takes no adapters of rank {adapter['max_lora_rank']}; set rollout lora: merged, or start "
                f"it with: {command(**adapter)}"
            )


def check_stop(infos: Sequence[ServerInfo], stop: Sequence[str]) -> None:
    """Raise `UserError` if there are stop strings and a server has no tokenizer."""
    for info in infos:
        if stop and not info.has_tokenizer:
            raise UserError(
                f"sampling.stop is {stop}, but {info.url} was started without a tokenizer; start it with: {command()} "
                "(and without --tokens-only or --skip-tokenizer-init)"
            )


def choose_transfer(infos: Sequence[ServerInfo], wanted: str, adapter: dict[str, Any] | None) -> str:
    """Choose how weights are sent: tcp, ipc or nccl. auto is nccl if there is a GPU here and all servers were started
    for it, else tcp.

    Raises:
        UserError: the servers were not started for the wanted transfer.
    """
    for_nccl = all(info.transfer == "nccl" for info in infos)
    if wanted == "auto":
        return "nccl" if torch.cuda.is_available() and adapter is None and for_nccl else "tcp"
    if wanted != "tcp" and adapter is not None:
        raise UserError(f"transfer is {wanted}, but an adapter goes to servers over tcp alone; set transfer: tcp")
    if wanted == "nccl" and not for_nccl:
        raise UserError(
            "transfer is nccl, but not all servers were started for it; set tcp, or start them with: "
            + command(weight_transfer_config={"backend": "nccl"})
        )
    return wanted


def command(**engine_args: Any) -> str:
    """The shell command that starts such a server."""
    environment = [f"{name}={value}" for name, value in SERVER_ENVIRONMENT.items()] + ["VLLM_API_KEY=KEY"]
    program = "python -m vllm.entrypoints.openai.api_server --model MODEL"
    return " ".join([*environment, program, *SERVER_FLAGS, *map(shlex.quote, as_flags(engine_args))])


def as_flags(engine_args: dict[str, Any]) -> list[str]:
    """``{"max_num_seqs": 64, "enforce_eager": True}`` → ``["--max-num-seqs", "64", "--enforce-eager"]``."""
    flags = []
    for name, value in engine_args.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            flags += [f"--{flag}", *map(str, values)]
    return flags
