"""Weights into a live vLLM model, and fingerprints of what it then computes with.

On a CPU vLLM packs each weight matrix into the layout of its kernels and drops the original, so the fingerprint is
taken where a matrix enters the packing; what was not packed anew is thereby known as stale.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_grpo.rollout.proof import Fingerprint, Held, WeightSyncError


def load_weights(worker: Any, weights: Iterable[tuple[str, Tensor]]) -> list[Held]:
    """Load a stream of Hugging Face tensors into a running engine.

    Args:
        worker: vLLM's worker, in this process.
        weights: all of the model's tensors, each once, a tied head under the embedding's name.

    Returns:
        What the engine holds now, for every tensor whose place in the engine is known: plain, fused and tied linear
        layers, embeddings and norms of models built like Llama, as far as they are not quantized. Nothing for models
        whose tensors vLLM transposes or reorders (GPT-2, Falcon).

    Raises:
        WeightSyncError: where a parameter of the engine got no value.
    """
    model = worker.get_model()
    prefixes = {module: prefix for prefix, module in model.named_modules()}
    packed: dict[nn.Module, dict[str, Fingerprint]] = {}
    loaded: set[str] = set()
    load = model.load_weights

    def recording(stream: Iterable[tuple[str, Tensor]]) -> set[str]:
        names = load(stream)
        loaded.update(names or ())
        return names

    model.load_weights = recording
    try:
        with _watching_the_packing(lambda layer: packed.__setitem__(layer, _pieces(model, layer, prefixes[layer]))):
            worker.reload_weights(weights_iterator=iter(weights))
            _pack_head(model)
    except Exception:
        _abandon_reload(worker, model)
        raise
    finally:
        del model.load_weights
    missing = {name.replace(".base_layer.", ".") for name, _ in model.named_parameters()} - loaded
    if loaded and missing:
        raise WeightSyncError(
            f"no weights came for {len(missing)} parameters of the engine: {', '.join(sorted(missing)[:8])}"
        )
    return list(_held(model, packed)) if "qkv_proj" in _fusions(model) else []


def _fusions(model: nn.Module) -> dict[str, list[str]]:
    """Names of vLLM's fused layers, with the checkpoint's names of their parts."""
    return getattr(model, "packed_modules_mapping", {})


def replace_functions() -> None:
    """Two functions that are wrong for a guest on a CPU: one binds the process's memory to a NUMA node, one compiles
    for up to 20 s to count the rank of a sampled token."""
    from vllm.platforms import current_platform
    from vllm.v1.sample import sampler

    if current_platform.is_cpu():
        torch.ops._C.init_cpu_memory_env = lambda nodes: None
        sampler.batched_count_greater_than = lambda x, values: (x >= values).sum(-1)


def _abandon_reload(worker: Any, model: nn.Module) -> None:
    """Give layers that waited for their weights the earlier ones back, so that a next stream finds them whole."""
    from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload

    finalize_layerwise_reload(model, worker.model_config)


def _pack_head(model: nn.Module) -> None:
    """The output head computes with a packed copy, which a reload of the embedding it is tied to leaves stale."""
    head = getattr(model, "lm_head", None)
    if head is None or not hasattr(head, "cpu_linear"):
        return
    from vllm.model_executor.layers import utils

    utils.dispatch_cpu_unquantized_gemm(head, remove_weight=False)


@contextmanager
def _watching_the_packing(watch: Callable[[nn.Module], None]) -> Iterator[None]:
    from vllm.model_executor.layers import utils

    original = utils.dispatch_cpu_unquantized_gemm

    def watched(layer: nn.Module, remove_weight: bool) -> None:
        watch(layer)
        original(layer, remove_weight)

    utils.dispatch_cpu_unquantized_gemm = watched
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = original


def _held(model: nn.Module, packed: dict[nn.Module, dict[str, Fingerprint]]) -> Iterator[Held]:
    for prefix, layer in model.named_modules():
        method = getattr(layer, "quant_method", None)
        if method is not None and not type(method).__name__.startswith("Unquantized"):
            continue
        if hasattr(layer, "cpu_linear"):
            fingerprints = packed.get(layer, {})
            parameters = [name for name, p in layer.named_parameters(recurse=False) if p is not None]
            for name in (piece for p in parameters for piece, _ in _checkpoint_pieces(model, prefix, layer, p)):
                yield Held(name, prefix, fingerprints.get(name))
        else:
            for name, fingerprint in _pieces(model, layer, prefix).items():
                yield Held(name, prefix, fingerprint)


def _pieces(model: nn.Module, layer: nn.Module, prefix: str) -> dict[str, Fingerprint]:
    """Fingerprints of a layer's parameters, fused ones cut into the tensors of the checkpoint."""
    fingerprints = {}
    for name, parameter in layer.named_parameters(recurse=False):
        start = 0
        for piece, rows in _checkpoint_pieces(model, prefix, layer, name):
            part = parameter if rows is None else parameter[start : start + rows]
            fingerprints[piece] = Fingerprint.of(part)
            start += rows or 0
    return fingerprints


def _checkpoint_pieces(model: nn.Module, prefix: str, layer: nn.Module, name: str) -> list[tuple[str, int | None]]:
    """The checkpoint's names of what makes up a parameter, with the rows of each; None stands for all rows."""
    parent, _, leaf = prefix.rpartition(".")
    parts, sizes = _fusions(model).get(leaf), getattr(layer, "output_sizes", None)
    if parts and sizes and len(parts) == len(sizes):
        return [(f"{parent}.{part}.{name}", rows) for part, rows in zip(parts, sizes, strict=True)]
    if prefix == "lm_head" and name == "weight" and getattr(model.config, "tie_word_embeddings", False):
        prefix = next(name for name, module in model.named_modules() if hasattr(module, "org_vocab_size"))
    return [(f"{prefix}.{name}", getattr(layer, "org_vocab_size", None) if name == "weight" else None)]
