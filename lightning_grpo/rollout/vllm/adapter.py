"""Load a LoRA adapter into a running vLLM engine in memory, and fingerprint the engine's copy.

vLLM reads adapters from disk, unless its manager has one under the number in the request. The adapter is therefore put
into the manager directly.
"""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from lightning_grpo.errors import UserError
from lightning_grpo.rollout.verify import Fingerprint, StoredTensor, WeightSyncError

ADAPTER = 1
ADAPTER_NAME = "policy"
ADAPTER_PATH = "in memory"
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks for which vLLM can reserve memory."""


def adapter_settings(rank: int, layers: Iterable[str]) -> dict[str, Any]:
    """The engine's arguments for one adapter.

    Args:
        rank: the adapter's rank.
        layers: names of the layers with an adapter. vLLM prepares only these: a prepared output head could not score
            sequences on a CPU.

    Raises:
        UserError: the rank is larger than vLLM supports.
    """
    if rank > RANKS[-1]:
        raise UserError(
            f"lora.rank is {rank}: vLLM supports at most {RANKS[-1]}; lower it, or set rollout lora: merged"
        )
    room = next(r for r in RANKS if r >= rank)
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_cpu_loras": 1,
        "max_lora_rank": room,
        "lora_target_modules": sorted({layer.rpartition(".")[2] for layer in layers}),
    }


def adapter_request() -> Any:
    """The argument of a request that is to be computed with the adapter."""
    from vllm.lora.request import LoRARequest

    return LoRARequest(ADAPTER_NAME, ADAPTER, ADAPTER_PATH)


def load_adapter(worker: Any, weights: Iterable[tuple[str, Tensor]]) -> list[StoredTensor]:
    """Replace the engine's adapter by the tensors of `lightning_grpo.policy.weights.adapter_weights`.

    Returns:
        Each tensor as the engine's layers store it.

    Raises:
        WeightSyncError: layers of the engine accept no adapter.
    """
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    tensors = dict(weights)
    rank = max(tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_A.weight"))
    manager = worker.model_runner.lora_manager._adapter_manager
    mapper = getattr(manager.model, "hf_to_vllm_mapper", None)
    adapter = LoRAModel.from_lora_tensors(
        ADAPTER,
        tensors,
        # alpha = r, because the tensors include the scaling.
        PEFTHelper(r=rank, lora_alpha=rank, target_modules=[]),
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
        weights_mapper=mapper and mapper.get_rename_mapper(),
    )
    manager.remove_adapter(ADAPTER)
    manager.add_adapter(adapter)
    manager.activate_adapter(ADAPTER)
    stored = list(_stored(manager, rank))
    if missing := sorted(tensors.keys() - {tensor.name for tensor in stored}):
        raise WeightSyncError(
            f"the engine has no place for {len(missing)} tensors of the adapter: {', '.join(missing[:4])}; narrow "
            "lora.target_modules, or set rollout lora: merged"
        )
    return stored


def _stored(manager: Any, rank: int) -> Iterator[StoredTensor]:
    slot = manager.lora_index_to_id.index(ADAPTER)
    for place, layer in manager.modules.items():
        parent, _, leaf = place.rpartition(".")
        parts = manager.packed_modules_mapping.get(leaf, [leaf])
        # Embeddings and the output head have one tensor instead of a tuple; `adapter_weights` does not include them.
        if not isinstance(layer.lora_a_stacked, tuple) or len(parts) != len(layer.lora_a_stacked):
            continue
        for part, A, B in zip(parts, layer.lora_a_stacked, layer.lora_b_stacked, strict=True):
            name = f"base_model.model.{parent}.{part}"
            yield StoredTensor(f"{name}.lora_A.weight", place, _fingerprint(A[slot, 0, :rank]))
            yield StoredTensor(f"{name}.lora_B.weight", place, _fingerprint(B[slot, 0, :, :rank]))


def _fingerprint(part: Tensor) -> Fingerprint:
    return Fingerprint.of(part.contiguous())
