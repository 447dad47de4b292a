"""Peak memory by phase (generate, score, update) and by part, from a model's config alone.

Parameters are counted exactly, saved activations are measured on fake tensors (`activations`), and the rest follows
from the numbers of the run. States are as in "ZeRO" (Rajbhandari et al. 2020, arXiv:1910.02054, section 3): with Adam
in fp32, 4 (weights) + 4 (gradients) + 8 (moments) bytes per trained parameter.
"""

from dataclasses import dataclass

from lightning_grpo.configure.activations import Activations, activations, packs
from lightning_grpo.configure.workload import STATE_BYTES, Workload
from lightning_grpo.devices import GiB, Hardware
from lightning_grpo.kernels.blocks import budget, width_within
from lightning_grpo.policy.quantized import BYTES_PER_WEIGHT

Parts = dict[str, float]

VLLM_WORKSPACE = 1.8 * GiB
"""Bytes that vLLM takes on a GPU besides weights and cache: profiling batch, workspaces and CUDA graphs. Users report
0.7 to 2 GB."""

VLLM_ASLEEP = 0.8 * GiB
"""Bytes that vLLM keeps while it sleeps."""


@dataclass(frozen=True)
class Memory:
    """Predicted peak bytes of one rank: {phase: {part: bytes}}."""

    phases: dict[str, Parts]

    def total(self, phase: str) -> float:
        return sum(self.phases[phase].values())

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=self.total)

    @property
    def peak(self) -> float:
        return self.total(self.peak_phase)


def predict_memory(w: Workload, hardware: Hardware) -> Memory:
    """Return the peak bytes of each phase on one rank once the optimizer state exists.

    All prompts and completions are taken at full length.
    """
    context = {"context": hardware.context}
    awake, asleep = _engine(w, hardware)
    return Memory(
        {
            "generate": _states(w) | _generate(w) | awake | context,
            "score": _states(w) | _score(w, hardware) | _gathered(w) | asleep | context,
            "update": _update(w, hardware) | _gathered(w) | asleep | context,
        }
    )


def _states(w: Workload) -> Parts:
    """Return what is in memory all the time after the first optimizer step; gradients exist only in the update."""
    state = STATE_BYTES[w.optimizer]
    if w.optimizer != "adamw_8bit":
        state *= w.trained_bytes / 4
    parts: dict[str, float] = {"weights": w.shape.params * w.weight_bytes}
    if w.quantization:
        parts["weights"] -= w.shape.linear * (w.weight_bytes - BYTES_PER_WEIGHT)
        # one layer's values at a time, in the dtype that they were quantized from and in that of the product
        largest = max(rows * columns for _, rows, columns in w.shape.linears)
        parts["dequantized layer"] = largest * (w.weight_bytes + w.compute_bytes)
    if w.lora_rank:
        parts["LoRA adapters"] = w.trained * w.trained_bytes
    parts["optimizer"] = w.trained * state
    if w.needs_reference and not w.lora_rank:
        parts["reference"] = w.shape.params * w.weight_bytes
    parts = {part: size / w.shards for part, size in parts.items()}
    if w.reward_models:
        parts["reward models"] = w.reward_models
    return parts


def _gathered(w: Workload) -> Parts:
    """Return the weights that FSDP gathers: those of the current and the next layer, embedding and head."""
    if w.shards == 1:
        return {}
    ends = w.shape.head * (1 if w.shape.tied else 2)
    return {"gathered weights": (2 * w.shape.layer_params + ends) * w.compute_bytes}


def _weight_copies(w: Workload) -> float:
    """Return the bytes of autocast's copies of trained weights, which exist until the context of the forward ends."""
    return 2 * w.shape.linear if w.is_mixed and w.dtype == "float32" and not w.lora_rank else 0


def _head(w: Workload, hardware: Hardware, trained: bool) -> float:
    """Return the bytes of the log-prob kernel: a block of logits [n, W] for W ids of the vocabulary, and its factors.

    A trained head keeps gradients for the backward up to a budget and recomputes the others.
    """
    n, H, V, size = w.rows_per_pass * w.completion_length, w.shape.hidden, w.shape.vocab, w.compute_bytes
    sizes = budget(itemsize=size, memory=None if hardware.is_cpu else hardware.memory)
    if hardware.is_cpu:
        W = width_within(sizes.block, n * size, V)
        kept = min(n * V, sizes.kept // (n * W * size) * n * W) * size if trained and not w.lora_rank else 0
        products = (w.weight_bytes != size) + (trained and not w.lora_rank)
        return n * W * size + kept + size * W * H * products + 8 * n * H
    matrix = min(n * V * size, sizes.chunk)
    kept = min(n * V * size, sizes.kept) if trained and not w.lora_rank else 0
    cast = V * H * size if w.weight_bytes != size else 0
    return sizes.block + max(matrix, kept) + cast + 8 * n * H


def _generate(w: Workload) -> Parts:
    if w.engine != "hf":
        return {}
    rows = min(w.engine_sequences, w.local_samples)
    # layers are copied one after another when rows finish
    cache = rows * w.max_length * 2 * w.shape.layers * w.shape.kv_width * w.compute_bytes * (1 + 1 / w.shape.layers)
    # the copies of all layers and of the head stay for the whole rollout
    copies = _weight_copies(w) and _weight_copies(w) + 2 * w.shape.head
    return {"KV cache": cache, "weight copies": copies, "sampling": 12 * rows * w.shape.vocab}


def _residual(w: Workload) -> int:
    """Return the bytes of the residual stream, which has the dtype of the parameters, also under autocast."""
    return w.rows_per_pass * w.max_length * w.shape.hidden * w.weight_bytes


def _saved(w: Workload, hardware: Hardware) -> Activations:
    return activations(w, packed=packs(w, hardware))


def _score(w: Workload, hardware: Hardware) -> Parts:
    """Return the memory for old and reference log-probs without gradients: the activations of one layer at a time."""
    if not w.scoring_passes:
        return {}
    return {
        "activations": _saved(w, hardware).layer + 2 * _residual(w),
        "weight copies": _weight_copies(w),
        "logits blocks": _head(w, hardware, trained=False),
    }


def _update(w: Workload, hardware: Hardware) -> Parts:
    """Return the largest of three moments: after the loss, at the last gradient, and in the optimizer step."""
    states = _states(w) | {"gradients": w.trained * w.trained_bytes / w.shards}
    saved, residual = _saved(w, hardware), _residual(w)
    if w.gradient_checkpointing:
        body = {
            "activations (checkpoints)": w.shape.layers * residual + saved.ends,
            "one layer, recomputed": max(saved.layer, _weight_copies(w)),
        }
    else:
        body = {"activations": w.shape.layers * saved.layer + saved.ends}
    head_gradient = 0 if w.lora_rank else w.shape.head * w.weight_bytes / w.shards
    loss = body | {
        "hidden states": 2 * residual,
        "logits blocks": _head(w, hardware, trained=True),
        "head gradient": head_gradient,
    }
    last = {"head gradient": 2 * head_gradient}
    # PyTorch's AdamW has temporaries for all parameters on a GPU, but only for one at a time on a CPU, of which
    # the head is the largest
    temporaries = 2 * head_gradient if hardware.is_cpu else w.trained * w.trained_bytes / w.shards
    step = {"optimizer temporaries": temporaries}
    return states | max((loss, last, step), key=lambda parts: sum(parts.values()))


def _engine(w: Workload, hardware: Hardware) -> tuple[Parts, Parts]:
    """Return the memory of the engine while it samples and while the policy trains."""
    if w.engine != "vllm":
        return {}, {}
    awake = {"engine weights": w.engine_bytes * w.shape.params / w.engine_shards, "KV cache": w.engine_cache}
    if hardware.is_cpu:
        return awake, awake
    awake |= {"engine workspace": VLLM_WORKSPACE}
    return awake, {"engine asleep": VLLM_ASLEEP} if w.engine_sleep else awake
