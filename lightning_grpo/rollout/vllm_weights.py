"""Weights into a live vLLM model, and fingerprints of what it then computes with.

On a CPU vLLM packs each weight matrix into the layout of its kernels and drops the original, and its own reload builds
every layer anew. Where the layout is known, tensors are written straight into their places here, and only matrices
that moved are packed. The fingerprint of a packed matrix is taken where it enters the packing, so that what was not
packed anew is known as stale.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_grpo.rollout.proof import Fingerprint, Held, WeightSyncError


def load_weights(worker: Any, weights: Iterable[tuple[str, Tensor]]) -> list[Held]:
    """Load a stream of Hugging Face tensors into a running engine.

    Args:
        worker: vLLM's worker, in this process.
        weights: all of the model's tensors, each once, a tied head under the embedding's name. The tensors of a fused
            layer are kept until it is whole.

    Returns:
        What the engine holds now, for every tensor whose place in the engine is known: plain, fused and tied linear
        layers, embeddings and norms of models built like Llama, as far as they are not quantized. Nothing for models
        whose tensors vLLM transposes or reorders (GPT-2, Falcon).

    Raises:
        WeightSyncError: where a parameter of the engine got no value, or a tensor has no place in it.
        ValueError: where a tensor has another shape than its place.
    """
    model = worker.get_model()
    _compute_from_parameters(model)
    on_cpu = worker.device.type == "cpu"
    places = _places(model)
    stream = iter(weights)
    first = next(stream, ("", None))
    stream = chain([first], stream)
    # Where vLLM renames the checkpoint's tensors, the first has another name already.
    if on_cpu and worker.parallel_config.world_size == 1 and first[0] in places and _are_complete(places, model):
        return _write(places, stream)
    _reload(worker, stream)
    _compute_from_parameters(model)
    return _held(_places(model))


def held_weights(worker: Any) -> list[Held]:
    """What a running engine holds in the parameters themselves, as `load_weights` returns it."""
    return _held(_places(worker.get_model()))


def replace_functions() -> None:
    """Two functions that are wrong for a guest on a CPU: one binds the process's memory to a NUMA node, one compiles
    for up to 20 s to count the rank of a sampled token."""
    from vllm.platforms import current_platform
    from vllm.v1.sample import sampler

    if current_platform.is_cpu():
        torch.ops._C.init_cpu_memory_env = lambda nodes: None
        sampler.batched_count_greater_than = lambda x, values: (x >= values).sum(-1)


# ── Where the checkpoint's tensors lie ────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Place:
    """A tensor of the checkpoint in a layer of the engine."""

    name: str
    prefix: str
    layer: nn.Module
    parameter: str
    parts: tuple[tuple[str, int | None], ...]
    """The checkpoint's names of what makes up the parameter, with the rows of each; None stands for all rows."""
    is_packed: bool

    @property
    def value(self) -> nn.Parameter:
        return getattr(self.layer, self.parameter)

    def write(self, tensor: Tensor) -> None:
        target = _part(self.value.data, self.parts, self.name)
        if target.shape != tensor.shape:
            raise ValueError(f"its shape is {tuple(tensor.shape)}, but {self.prefix} takes {tuple(target.shape)}")
        target.copy_(tensor)


def _part(whole: Tensor, parts: Iterable[tuple[str, int | None]], name: str) -> Tensor:
    """The rows of `whole` that are the part with this name."""
    start = 0
    for part, rows in parts:
        if part == name:
            return whole if rows is None else whole[start : start + rows]
        start += rows or 0
    raise KeyError(name)


def _places(model: nn.Module) -> dict[str, list[_Place]]:
    """By the tensor's name; a tied one has several. Nothing of quantized layers and fused experts."""
    places: dict[str, list[_Place]] = {}
    fusions = getattr(model, "packed_modules_mapping", {})
    if "qkv_proj" not in fusions:
        return places
    tied = getattr(model.config, "tie_word_embeddings", False)
    embedding = next((prefix for prefix, layer in model.named_modules() if hasattr(layer, "org_vocab_size")), None)
    for prefix, layer in model.named_modules():
        method = getattr(layer, "quant_method", None)
        if method is not None and not type(method).__name__.startswith("Unquantized"):
            continue
        parent, _, leaf = prefix.rpartition(".")
        names, sizes = fusions.get(leaf), getattr(layer, "output_sizes", None)
        for parameter, value in layer.named_parameters(recurse=False):
            if value.ndim > 2:
                continue
            if names and sizes and len(names) == len(sizes):
                parts = tuple((f"{parent}.{name}.{parameter}", rows) for name, rows in zip(names, sizes, strict=True))
            else:
                owner = embedding if prefix == "lm_head" and parameter == "weight" and tied else prefix
                rows = getattr(layer, "org_vocab_size", None) if parameter == "weight" else None
                parts = ((f"{owner}.{parameter}", rows),)
            is_packed = parameter == "weight" and hasattr(layer, "cpu_linear") and value.numel() == 0
            for name, _ in parts:
                places.setdefault(name, []).append(_Place(name, prefix, layer, parameter, parts, is_packed))
    return places


def _are_complete(places: dict[str, list[_Place]], model: nn.Module) -> bool:
    return {id(p) for p in model.parameters()} == {
        id(getattr(place.layer, place.parameter)) for homes in places.values() for place in homes
    }


def _compute_from_parameters(model: nn.Module) -> None:
    """Take packed copies away from layers that have their weight itself: an embedding multiplies with nothing, and an
    output head samples as fast without, but would keep the old copy when the embedding it is tied to is written."""
    for layer in model.modules():
        if hasattr(layer, "cpu_linear") and getattr(layer, "weight", torch.empty(0)).numel():
            layer.cpu_linear = F.linear


def _held(places: dict[str, list[_Place]]) -> list[Held]:
    """What lies in the parameters themselves; a tied one is read once."""
    held = []
    for name, homes in places.items():
        fingerprints: dict[int, Fingerprint] = {}
        for place in homes:
            if place.is_packed:
                continue
            if place.parameter == "weight" and getattr(place.layer, "cpu_linear", F.linear) is not F.linear:
                held.append(Held(name, place.prefix, None))
                continue
            if id(place.value) not in fingerprints:
                fingerprints[id(place.value)] = Fingerprint.of(_part(place.value, place.parts, name))
            held.append(Held(name, place.prefix, fingerprints[id(place.value)]))
    return held


# ── Straight into their places ────────────────────────────────────────────────────────────────────────────────────

_packed: WeakKeyDictionary[nn.Module, dict[str, Fingerprint]] = WeakKeyDictionary()
"""What each layer's packed matrix was made from."""


def _write(places: dict[str, list[_Place]], weights: Iterable[tuple[str, Tensor]]) -> list[Held]:
    waiting: dict[nn.Module, dict[str, Tensor]] = {}
    held: list[Held] = []
    missing = set(places)
    for name, tensor in weights:
        if name not in places:
            raise WeightSyncError(f"the engine has no place for {name}")
        missing.discard(name)
        for place in places[name]:
            if place.is_packed:
                pieces = waiting.setdefault(place.layer, {})
                pieces[name] = tensor
                if len(pieces) == len(place.parts):
                    held += _pack(place, waiting.pop(place.layer))
            elif place is places[name][0] or place.value is not places[name][0].value:
                place.write(tensor)
    if missing:
        raise WeightSyncError(
            f"no weights came for {len(missing)} tensors of the engine: {', '.join(sorted(missing)[:8])}"
        )
    return held + _held(places)


def _pack(place: _Place, pieces: dict[str, Tensor]) -> list[Held]:
    """Pack a layer's matrix for vLLM's kernels, unless it is packed from the same bits already."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    layer = place.layer
    for name, rows in place.parts:
        shape = (rows or layer.output_size, layer.input_size)
        if pieces[name].shape != shape:
            raise ValueError(f"the shape of {name} is {tuple(pieces[name].shape)}, but {place.prefix} takes {shape}")
    parts = [pieces[name] for name, _ in place.parts]
    whole = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(layer.weight.dtype).contiguous()
    fingerprints = {name: Fingerprint.of(_part(whole, place.parts, name)) for name in pieces}
    if _packed.get(layer) != fingerprints:
        _packed.pop(layer, None)
        # The old one goes first: its memory is the new one's.
        layer.cpu_linear = None
        layer.weight = nn.Parameter(whole, requires_grad=False)
        dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
        _packed[layer] = fingerprints
    return [Held(name, place.prefix, fingerprint) for name, fingerprint in fingerprints.items()]


# ── By vLLM's own loaders ─────────────────────────────────────────────────────────────────────────────────────────


def _reload(worker: Any, weights: Iterable[tuple[str, Tensor]]) -> None:
    from vllm.model_executor.model_loader.reload.layerwise import finalize_layerwise_reload

    model = worker.get_model()
    loaded: set[str] = set()
    load = model.load_weights

    def recording(stream: Iterable[tuple[str, Tensor]]) -> set[str]:
        names = load(stream)
        loaded.update(names or ())
        return names

    model.load_weights = recording
    try:
        worker.reload_weights(weights_iterator=iter(weights))
    except Exception:
        # Layers that waited for their weights get the earlier ones back, so that a next stream finds them whole.
        finalize_layerwise_reload(model, worker.model_config)
        raise
    finally:
        del model.load_weights
    missing = {name.replace(".base_layer.", ".") for name, _ in model.named_parameters()} - loaded
    if loaded and missing:
        raise WeightSyncError(
            f"no weights came for {len(missing)} parameters of the engine: {', '.join(sorted(missing)[:8])}"
        )
