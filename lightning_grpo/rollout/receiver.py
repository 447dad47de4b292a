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
        what is held afterwards. Of weights that workers share, each compares its part with the same part of what came;
        of an adapter that they share, nothing is told."""
        replace_functions()
        weights = fetch(host, int(port), token)
        if self.lora_config is None:
            return _as_json(load_weights(self, weights))
        held = load_adapter(self, weights)
        return [] if self._is_shared else _as_json(held)

    def held_policy(self) -> list[dict[str, Any]]:
        """What is held of weights that came another way; nothing where workers share them."""
        return [] if self._is_shared else _as_json(held_weights(self))

    def tokenizer_facts(self) -> dict[str, Any]:
        """Of the tokenizer with which the server looks for stop strings."""
        from vllm.tokenizers import cached_tokenizer_from_config

        return tokenizer_facts(cached_tokenizer_from_config(self.model_config))

    @property
    def _is_shared(self) -> bool:
        return self.parallel_config.world_size > 1


def _as_json(held: list[Held]) -> list[dict[str, Any]]:
    return [h.to_json() for h in held]
