"""Load weights into a running vLLM model, and fingerprint its tensors.

On a CPU vLLM packs each weight matrix into the layout of its kernels and frees the original, and its own reload builds
every layer again. If the layout is known, tensors are written directly into their places here, and only matrices that
changed are packed. The fingerprint of a packed matrix is computed before packing, so that a matrix that was not packed
again is known to be stale.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_grpo.errors import UserError
from lightning_grpo.rollout.verify import Fingerprint, StoredTensor, WeightSyncError


def load_weights(worker: Any, weights: Iterable[tuple[str, Tensor]]) -> list[StoredTensor]:
    """Load a stream of Hugging Face tensors into a running engine.

    Args:
        worker: vLLM's worker, in this process.
        weights: all of the model's tensors, each once, a tied head under the embedding's name. The tensors of a fused
            layer are kept in memory until the layer is complete.

    Returns:
        The engine's tensors, as far as their place in the engine is known: plain, fused and tied linear layers,
        embeddings and norms of models built like Llama, unless they are quantized. Empty for models whose tensors vLLM
        transposes or reorders (GPT-2, Falcon).

    Raises:
        WeightSyncError: a parameter of the engine received no value, or a tensor belongs to none.
        UserError: a tensor has another shape than its place.
    """
    model = worker.get_model()
    _compute_from_parameters(model)
    places = _places(model)
    blocks: dict[tuple[str, str], tuple[Fingerprint, Fingerprint]] = {}
    stream = _noting_blocks(weights, places, blocks)
    first = next(stream, ("", None))
    stream = chain([first], stream)
    # If vLLM renames the checkpoint's tensors, the first name is unknown already.
    if worker.device.type == "cpu" and first[0] in places and _are_complete(places, model):
        stored = _write(places, stream)
    else:
        _reload(worker, stream)
        _compute_from_parameters(model)
        stored = _stored(_places(model))
    return [_of_whole(h, blocks) for h in stored]


def stored_weights(worker: Any) -> list[StoredTensor]:
    """The tensors in the parameters of a running engine, in the form that `load_weights` returns."""
    return _stored(_places(worker.get_model()))


def replace_functions() -> None:
    """Replace two functions of vLLM that are unsuitable on a CPU: one binds the process's memory to a NUMA node, the
    other compiles for up to 20 s to count the rank of a sampled token."""
    from vllm.platforms import current_platform
    from vllm.v1.sample import sampler

    if current_platform.is_cpu():
        operators: Any = torch.ops._C
        operators.init_cpu_memory_env = lambda nodes: None
        sampler.batched_count_greater_than = lambda x, values: (x >= values).sum(-1)


# ── Places of the checkpoint's tensors ────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Place:
    """A block of a checkpoint's tensor in rows of a parameter; the whole tensor unless ranks share the model."""

    name: str
    prefix: str
    layer: nn.Module
    parameter: str
    shape: tuple[int, ...]
    """The shape of the checkpoint's tensor."""
    corner: tuple[int, ...]
    """The index in the tensor at which the block begins."""
    block: tuple[int, ...]
    """The block's shape."""
    row: int
    """The row of the parameter at which the block begins."""
    parts: tuple[str, ...]
    """Names of all tensors that the parameter is made of."""

    @property
    def value(self) -> nn.Parameter:
        return getattr(self.layer, self.parameter)

    @property
    def is_packed(self) -> bool:
        return self.parameter == "weight" and hasattr(self.layer, "cpu_linear") and self.value.numel() == 0

    def block_of(self, tensor: Tensor) -> Tensor:
        if tensor.shape != self.shape:
            raise UserError(
                f"the shape of {self.name} is {tuple(tensor.shape)}, but {self.prefix} requires {self.shape}"
            )
        for dim, (start, size) in enumerate(zip(self.corner, self.block, strict=True)):
            tensor = tensor.narrow(dim, start, size)
        return tensor

    def rows_of(self, whole: Tensor) -> Tensor:
        return whole[self.row : self.row + self.block[0]] if self.block else whole


def _places(model: nn.Module) -> dict[str, list[_Place]]:
    """Places by tensor name; a tied tensor has several. Quantized layers and fused experts are omitted."""
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
        for parameter, value in layer.named_parameters(recurse=False):
            if value.ndim > 2:
                continue
            owner = embedding if prefix == "lm_head" and parameter == "weight" and tied else prefix
            names, row = [f"{owner}.{parameter}"], 0
            blocks = [(tuple(value.shape), (0,) * value.ndim, tuple(value.shape))]
            if hasattr(layer, "org_vocab_size"):
                blocks = [_vocabulary_block(layer, value)]
            elif hasattr(layer, "output_partition_sizes"):
                fused = fusions.get(leaf, [])
                if len(fused) == len(layer.output_partition_sizes):
                    names = [f"{parent}.{part}.{parameter}" for part in fused]
                blocks = _linear_blocks(layer, matrix=parameter == "weight")
                if len(names) < len(blocks):
                    # The tensor is fused in the checkpoint: ranks would have several blocks of one tensor.
                    if layer.tp_size > 1:
                        continue
                    shape = (sum(block[0] for _, _, block in blocks), *blocks[0][0][1:])
                    blocks = [(shape, (0,) * len(shape), shape)]
            for name, (shape, corner, block) in zip(names, blocks, strict=True):
                place = _Place(name, prefix, layer, parameter, shape, corner, block, row, tuple(names))
                places.setdefault(name, []).append(place)
                row += block[0] if block else 0
    return places


_Block = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def _vocabulary_block(layer: Any, value: Tensor) -> _Block:
    rows, rest = layer.shard_indices, tuple(value.shape[1:])
    start, end = rows.org_vocab_start_index, rows.org_vocab_end_index
    return (layer.org_vocab_size, *rest), (start, *(0 for _ in rest)), (end - start, *rest)


def _linear_blocks(layer: Any, *, matrix: bool) -> list[_Block]:
    """For each tensor of the layer: its shape in the checkpoint, and the corner and shape of this rank's block."""
    whole = getattr(layer, "output_sizes", [layer.output_size])
    if hasattr(layer, "total_num_kv_heads"):
        # With more ranks than heads, ranks share a head, which the layer's own sizes count twice.
        keys = layer.total_num_kv_heads
        whole = [layer.total_num_heads * layer.head_size, keys * layer.head_size, keys * layer.v_head_size]
    sizes = list(zip(whole, layer.output_partition_sizes, strict=True))
    columns = [(layer.input_size, getattr(layer, "input_size_per_partition", layer.input_size))] if matrix else []
    blocks = []
    for size in sizes:
        dims = [size, *columns]
        corner = [layer.tp_rank * (n // local) // layer.tp_size * local if n != local else 0 for n, local in dims]
        blocks.append((tuple(n for n, _ in dims), tuple(corner), tuple(local for _, local in dims)))
    return blocks


def _are_complete(places: dict[str, list[_Place]], model: nn.Module) -> bool:
    return {id(p) for p in model.parameters()} == {
        id(getattr(place.layer, place.parameter)) for homes in places.values() for place in homes
    }


def _compute_from_parameters(model: nn.Module) -> None:
    """Remove the packed copies of layers that also keep their weight. An embedding is used in no matrix product. An
    output head is as fast without, and would keep an old copy when the embedding that it is tied to is replaced."""
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "cpu_linear") and getattr(layer, "weight", torch.empty(0)).numel():
            layer.cpu_linear = F.linear


def _stored(places: dict[str, list[_Place]]) -> list[StoredTensor]:
    """The tensors in the parameters; a tied parameter is read once."""
    stored = []
    for name, homes in places.items():
        fingerprints: dict[int, Fingerprint] = {}
        for place in homes:
            if place.is_packed:
                continue
            if place.parameter == "weight" and getattr(place.layer, "cpu_linear", F.linear) is not F.linear:
                stored.append(StoredTensor(name, place.prefix, None))
                continue
            if id(place.value) not in fingerprints:
                fingerprints[id(place.value)] = Fingerprint.of(place.rows_of(place.value))
            stored.append(StoredTensor(name, place.prefix, fingerprints[id(place.value)]))
    return stored


def _noting_blocks(
    weights: Iterable[tuple[str, Tensor]],
    places: dict[str, list[_Place]],
    blocks: dict[tuple[str, str], tuple[Fingerprint, Fingerprint]],
) -> Iterator[tuple[str, Tensor]]:
    """Pass the weights on, and record the fingerprints of this rank's blocks and of the whole tensors."""
    for name, tensor in weights:
        for place in places.get(name, ()):
            if place.block != place.shape:
                cast = tensor.to(place.value.dtype)
                blocks[name, place.prefix] = Fingerprint.of(place.block_of(cast)), Fingerprint.of(cast)
        yield name, tensor


def _of_whole(stored: StoredTensor, blocks: dict[tuple[str, str], tuple[Fingerprint, Fingerprint]]) -> StoredTensor:
    """The tensor as the sender can compare it: with the whole tensor's fingerprint if this rank's block is right."""
    if (stored.name, stored.place) not in blocks:
        return stored
    block, whole = blocks[stored.name, stored.place]
    return replace(stored, fingerprint=whole if stored.fingerprint == block else None)


# ── Direct writing ────────────────────────────────────────────────────────────────────────────────────────────────

_packed: WeakKeyDictionary[nn.Module, dict[str, Fingerprint]] = WeakKeyDictionary()
"""The fingerprints of the tensors from which each layer's matrix was packed."""


def _write(places: dict[str, list[_Place]], weights: Iterable[tuple[str, Tensor]]) -> list[StoredTensor]:
    waiting: dict[nn.Module, dict[str, Tensor]] = {}
    stored: list[StoredTensor] = []
    missing = set(places)
    for name, tensor in weights:
        if name not in places:
            raise WeightSyncError(f"the engine has no place for {name}")
        missing.discard(name)
        for place in places[name]:
            if place.is_packed:
                pieces = waiting.setdefault(place.layer, {})
                pieces[name] = place.block_of(tensor)
                if len(pieces) == len(place.parts):
                    stored += _pack(place, waiting.pop(place.layer))
            elif place is places[name][0] or place.value is not places[name][0].value:
                place.rows_of(place.value.data).copy_(place.block_of(tensor))
    if missing:
        raise WeightSyncError(
            f"the weights lack {len(missing)} tensors of the engine: {', '.join(sorted(missing)[:8])}"
        )
    return stored + _stored(places)


def _pack(place: _Place, pieces: dict[str, Tensor]) -> list[StoredTensor]:
    """Pack a layer's matrix for vLLM's kernels, unless it was packed from the same bits before."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    layer: Any = place.layer
    parts = [pieces[name] for name in place.parts]
    whole = (parts[0] if len(parts) == 1 else torch.cat(parts)).to(layer.weight.dtype).contiguous()
    rows = whole.split([len(part) for part in parts])
    fingerprints = {name: Fingerprint.of(part) for name, part in zip(place.parts, rows, strict=True)}
    if _packed.get(layer) != fingerprints:
        _packed.pop(layer, None)
        # The old matrix is freed first, so that the new one can take its memory.
        layer.cpu_linear = None
        layer.weight = nn.Parameter(whole, requires_grad=False)
        dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
        _packed[layer] = fingerprints
    return [StoredTensor(name, place.prefix, fingerprint) for name, fingerprint in fingerprints.items()]


# ── vLLM's own loaders ────────────────────────────────────────────────────────────────────────────────────────────


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
        # Incomplete layers get their earlier weights back, so that the next stream finds complete layers.
        finalize_layerwise_reload(model, worker.model_config)
        raise
    finally:
        del model.load_weights
    missing = {name.replace(".base_layer.", ".") for name, _ in model.named_parameters()} - loaded
    if loaded and missing:
        raise WeightSyncError(
            f"the weights lack {len(missing)} parameters of the engine: {', '.join(sorted(missing)[:8])}"
        )
