"""The worker extension that lets a vLLM server fetch the policy's weights.

Start the server with ``--worker-extension-cls lightning_grpo.rollout.receiver.WeightReceiver`` and the environment
variable ``VLLM_SERVER_DEV_MODE=1``.
"""

from typing import Any

from lightning_grpo.rollout.vllm_adapter import load_adapter
from lightning_grpo.rollout.vllm_weights import load_weights, replace_functions
from lightning_grpo.rollout.wire import fetch


class WeightReceiver:
    """Mixed into vLLM's worker; its methods are called by name through ``/collective_rpc``."""

    def receive_policy(self, host: str, port: str, token: str) -> list[dict[str, Any]]:
        """Fetch and load what is offered, the adapter alone where the server takes adapters (``--enable-lora``); tells
        what is held afterwards (nothing where it is sharded)."""
        replace_functions()
        load = load_weights if self.lora_config is None else load_adapter
        held = load(self, fetch(host, int(port), token))
        if self.parallel_config.world_size > 1:
            return []
        return [h.to_json() for h in held]
