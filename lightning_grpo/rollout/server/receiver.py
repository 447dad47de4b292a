"""The worker extension that lets a vLLM server fetch the policy's weights.

Start the server with ``--worker-extension-cls lightning_grpo.rollout.server.receiver.WeightReceiver`` and the
environment variable ``VLLM_SERVER_DEV_MODE=1``.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lightning_grpo.rollout.server.buckets import fetch_buckets
from lightning_grpo.rollout.server.tcp import WeightClient
from lightning_grpo.rollout.verify import StoredTensor, place_of
from lightning_grpo.rollout.vllm.adapter import load_adapter
from lightning_grpo.rollout.vllm.tokenizer import tokenizer_facts
from lightning_grpo.rollout.vllm.weights import load_weights, replace_functions, stored_weights


class WeightReceiver:
    """Mixed into vLLM's worker; its methods are called by name through ``/collective_rpc``."""

    # attributes of the worker
    device: torch.device
    rank: int
    model_config: Any
    lora_config: Any
    parallel_config: Any

    def receive_policy(self, host: str, port: str, token: str, url: str) -> None:
        """Fetch and load the weights, or the adapter if the server takes adapters (``--enable-lora``), and answer with
        the tensors that this worker of the server at ``url`` then stores. Workers that share a model compare their part
        of each tensor with the same part of the received one; if they share an adapter, they report nothing."""
        with WeightClient(host, int(port), token) as client:
            client.answer(self._report(self._load(client.weights()), url))

    def receive_policy_on_gpu(self, host: str, port: str, token: str, url: str) -> None:
        """As `receive_policy`, through memory of the GPU that this worker and the trainer share."""
        with WeightClient(host, int(port), token) as client:
            client.answer(self._report(self._load(fetch_buckets(client, self.device)), url))

    def report_weights(self, host: str, port: str, token: str, url: str) -> None:
        """Answer with the stored tensors after another transfer; with none if workers share the model."""
        stored = [] if self._shares_model else stored_weights(self)
        with WeightClient(host, int(port), token) as client:
            client.answer(self._report(stored, url))

    def tokenizer_facts(self) -> dict[str, Any]:
        """The `tokenizer_facts` of the tokenizer that the server uses for stop strings."""
        from vllm.tokenizers import cached_tokenizer_from_config

        return tokenizer_facts(cached_tokenizer_from_config(self.model_config))

    def _load(self, weights: Iterable[tuple[str, Tensor]]) -> list[StoredTensor]:
        replace_functions()
        if self.lora_config is None:
            return load_weights(self, weights)
        stored = load_adapter(self, weights)
        return [] if self._shares_model else stored

    @property
    def _shares_model(self) -> bool:
        return self.parallel_config.world_size > 1

    def _report(self, stored: list[StoredTensor], url: str) -> dict[str, Any]:
        at = place_of(url, self.parallel_config.data_parallel_index)
        if self._shares_model:
            at += f", worker {self.rank}"
        return {"stored": [tensor.to_json(at=at) for tensor in stored]}
