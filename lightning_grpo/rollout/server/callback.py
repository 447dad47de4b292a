"""The callbacks for vLLM servers: one in a child process, or any number of running ones."""

import os
import secrets
from collections.abc import Iterator
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor

from lightning_grpo.errors import UserError
from lightning_grpo.policy.weights import require_untied_adapters
from lightning_grpo.rollout.callback import PolicyModule, RolloutCallback, eos_token_ids, policy_module
from lightning_grpo.rollout.server.checks import CHECK_SEQUENCES
from lightning_grpo.rollout.server.engine import ServerEngine
from lightning_grpo.rollout.server.process import ServerProcess
from lightning_grpo.rollout.vllm.callback import (
    VLLMRollout,
    adapter_engine_args,
    refuse_bias,
    require_sendable,
    rounding_for,
    stop_strings,
    weights_for,
)

TransferName = Literal["auto", "tcp", "ipc", "nccl"]


class VLLMProcessRollout(VLLMRollout):
    """Samples with a vLLM server in a child process, on cores or a GPU of its own, with separate memory, threads and
    libraries. Each rank starts one. It can sample while the policy trains.

    Args:
        cores: CPU cores of the server, by number. Empty shares the trainer's cores.
        environment: additional environment variables of the server, such as CUDA_VISIBLE_DEVICES.
        tensor_parallel_size: number of GPUs that share one copy of the model.
        data_parallel_size: number of copies of the model.
        transfer: how weights are sent: tcp, ipc (through memory of the GPU that trainer and server share), nccl
            (between GPUs) or auto: tcp on a CPU, ipc if the server has no GPU of its own (no CUDA_VISIBLE_DEVICES in
            environment and no parallelism), else nccl.
        start_timeout: seconds that the server may take to start.
        kwargs: the options of `VLLMRollout`; sleep_level has no effect.
    """

    engine_class = ServerEngine

    def __init__(
        self,
        *,
        cores: list[int] | None = None,
        environment: dict[str, str] | None = None,
        tensor_parallel_size: int = 1,
        data_parallel_size: int = 1,
        transfer: TransferName = "auto",
        start_timeout: float = 900.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.cores = cores
        self.environment = environment
        self.start_timeout = start_timeout
        self.sleeps = False
        parallel = {"tensor_parallel_size": tensor_parallel_size, "data_parallel_size": data_parallel_size}
        self.engine_args |= {name: size for name, size in parallel.items() if size != 1}
        shares_gpu = (
            "CUDA_VISIBLE_DEVICES" not in (environment or {}) and tensor_parallel_size * data_parallel_size == 1
        )
        self._shares_gpu = torch.cuda.is_available() and shares_gpu
        self.shares_memory = shares_gpu or not torch.cuda.is_available()
        if transfer == "auto" and torch.cuda.is_available() and self.lora == "merged":
            transfer = "ipc" if shares_gpu else "nccl"
        self.transfer = transfer
        if transfer in ("ipc", "nccl"):
            _require_gpu(transfer)
        if transfer == "nccl":
            self.engine_args["weight_transfer_config"] = {"backend": "nccl"}
        self._server: ServerProcess | None = None

    def build_engine(self, trainer: L.Trainer, pl_module: PolicyModule) -> ServerEngine:
        require_untied_adapters(pl_module.policy)
        self._server = ServerProcess(
            pl_module.model_path,
            engine_args=self.settings(pl_module),
            log_file=self.log_path(trainer),
            environment=self._gpu_environment() | (self.environment or {}),
            cores=self.cores,
            start_timeout=self.start_timeout,
        )
        engine = ServerEngine(
            [self._server.url],
            eos_token_ids=eos_token_ids(pl_module.policy, pl_module.tokenizer),
            api_key=self._server.api_key,
            sampling_args=self.sampling_args,
            adapter=adapter_engine_args(pl_module) if self.lora == "adapter" else None,
            transfer=self.transfer,
        )
        return _checked(engine, pl_module)

    def settings(self, pl_module: PolicyModule) -> dict[str, Any]:
        settings = super().settings(pl_module)
        # The check sequences are scored while completions are sampled.
        return settings | {"max_num_seqs": settings["max_num_seqs"] + CHECK_SEQUENCES}

    def _gpu_environment(self) -> dict[str, str]:
        environment = {}
        if self._shares_gpu:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            index = torch.cuda.current_device()
            environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[index] if visible else str(index)
        return environment

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None


class VLLMServerRollout(RolloutCallback):
    """Samples with vLLM servers that are already running, here or on other machines.

    Start them with VLLM_SERVER_DEV_MODE=1, an API key and the flags in ``docs/engines.md``. One of these flags protects
    all routes with the key; without it vLLM accepts weights and commands from everyone.

    Args:
        urls: URLs of the servers, such as http://node7:8000. Each request goes to the server with the most room.
        api_key_variable: environment variable with the servers' API key, if they require one.
        max_in_flight: the largest number of requests at one server at a time; at most its ``--max-num-seqs``, less four
            that are reserved for the check after a sync.
        lora: what a sync sends if adapters are trained: merged (whole weights) or adapter (only the adapter; the
            servers need flags for it, which the error message shows if they are missing).
        sampling_args: any other argument of vLLM's SamplingParams, by name.
        weights_host: this machine's address at which the servers reach it. Empty detects it.
        transfer: how weights are sent: tcp, ipc (through memory of the GPU that trainer and servers share), or nccl
            (between GPUs; the servers must be started for it). auto is nccl if all servers were started for it, else
            tcp.
        tolerance: the largest |Δ log-prob| in nats, mean and max, that is accepted after a weight sync. Empty derives
            both from the dtypes and the first sync.
    """

    engine_class = ServerEngine
    shares_memory = False

    def __init__(
        self,
        urls: list[str],
        *,
        api_key_variable: str = "VLLM_API_KEY",
        max_in_flight: int = 256,
        lora: Literal["merged", "adapter"] = "merged",
        sampling_args: dict[str, Any] | None = None,
        weights_host: str | None = None,
        transfer: TransferName = "auto",
        tolerance: tuple[float, float] | None = None,
    ) -> None:
        super().__init__(tolerance=tolerance)
        if not urls:
            raise UserError("urls is empty; name at least one vLLM server, such as http://localhost:8000")
        self.urls = urls
        self.api_key_variable = api_key_variable
        self.max_in_flight = max_in_flight
        self.lora = lora
        self.sampling_args = sampling_args
        self.weights_host = weights_host
        self.transfer = transfer
        if transfer in ("ipc", "nccl"):
            _require_gpu(transfer)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        module = policy_module(pl_module)
        require_sendable(module, self.lora)
        if stage == "fit":
            refuse_bias(module, self.sampling_args or {})

    def build_engine(self, trainer: L.Trainer, pl_module: PolicyModule) -> ServerEngine:
        require_untied_adapters(pl_module.policy)
        engine = ServerEngine(
            self.urls,
            eos_token_ids=eos_token_ids(pl_module.policy, pl_module.tokenizer),
            api_key=os.environ.get(self.api_key_variable),
            max_in_flight=self.max_in_flight,
            sampling_args=self.sampling_args,
            adapter=adapter_engine_args(pl_module) if self.lora == "adapter" else None,
            weights_host=self.weights_host,
            transfer=self.transfer,
            pushes=trainer.is_global_zero,
            barrier=trainer.strategy.barrier,
            run=trainer.strategy.broadcast(secrets.token_hex(4)),
        )
        return _checked(engine, pl_module)

    def weights(self, pl_module: PolicyModule) -> Iterator[tuple[str, Tensor]]:
        return weights_for(pl_module, self.lora)

    def rounding(self, pl_module: PolicyModule) -> float:
        return rounding_for(pl_module, self.lora)


def _checked(engine: ServerEngine, pl_module: PolicyModule) -> ServerEngine:
    try:
        engine.check_stop(stop_strings(pl_module))
        engine.check_tokenizer(pl_module.tokenizer)
    except BaseException:
        engine.close()
        raise
    return engine


def _require_gpu(transfer: str) -> None:
    if not torch.cuda.is_available():
        raise UserError(f"transfer is {transfer}, which sends weights from a GPU, and there is none here; set tcp")
