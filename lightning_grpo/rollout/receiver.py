"""The worker extension that lets a vLLM server fetch the policy's weights.

Start the server with ``--worker-extension-cls lightning_grpo.rollout.receiver.WeightReceiver`` and the environment
variable ``VLLM_SERVER_DEV_MODE=1``.
"""

from typing import Any

from lightning_grpo.rollout.proof import Held
from lightning_grpo.rollout.tokenizer_check import tokenizer_facts
from lightning_grpo.rollout.vllm_adapter import load_adapter
from lightning_grpo.rollout.vllm_weights import held_weights, load_weights, replace_functions
from lightning_grpo.rollout.wire import fetch


class WeightReceiver:
    """Mixed into vLLM's worker; its methods are called by name through ``/collective_rpc``."""

    def receive_policy(self, host: str, port: str, token: str) -> list[dict[str, Any]]:
        """Fetch and load what is offered, the adapter alone where the server takes adapters (``--enable-lora``); tells
        what is held afterwards (nothing where it is sharded)."""
        replace_functions()
        load = load_weights if self.lora_config is None else load_adapter
        return self._told(load(self, fetch(host, int(port), token)))

    def held_policy(self) -> list[dict[str, Any]]:
        """What is held of weights that came another way."""
        return self._told(held_weights(self))

    def tokenizer_facts(self) -> dict[str, Any]:
        """Of the tokenizer with which the server looks for stop strings."""
        from vllm.tokenizers import cached_tokenizer_from_config

        return tokenizer_facts(cached_tokenizer_from_config(self.model_config))

    def _told(self, held: list[Held]) -> list[dict[str, Any]]:
        return [] if self.parallel_config.world_size > 1 else [h.to_json() for h in held]
