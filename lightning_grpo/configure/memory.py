"""Peak memory by phase (generate, score, update) and by part, from a model's config alone.

Parameters are counted exactly, kept activations measured on fake tensors (`activations`), the rest follows from the
numbers of the run. States as in "ZeRO" (Rajbhandari et al. 2020, arXiv:1910.02054, section 3): with Adam in fp32,
4 (weights) + 4 (gradients) + 8 (moments) bytes a trained parameter.
"""

from dataclasses import dataclass

from lightning_grpo.configure.activations import Activations, activations
from lightning_grpo.configure.devices import GiB, Hardware
from lightning_grpo.configure.workload import STATE_BYTES, Workload
from lightning_grpo.kernels.blocks import budget, width_within
from lightning_grpo.policy.attention import NAME as ATTENTION

Parts = dict[str, float]

# vLLM on a GPU: its profiling batch and workspaces, its CUDA graphs, and what stays behind while it sleeps. Its users
# report 0.7 to 2 GB in all.
VLLM_WORKSPACE = 1.0 * GiB
VLLM_GRAPHS = 0.8 * GiB
VLLM_RESIDUE = 0.8 * GiB


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
    """Peak bytes of each phase on one rank, once the optimizer's state exists.

    Shapes are the longest planned: prompts and completions all of full length.
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
    """What lies in memory all the time, from the first optimizer step on. Gradients don't outlive the update."""
    state = STATE_BYTES[w.optimizer]
    if w.optimizer != "adamw_8bit":
        state *= w.trained_bytes / 4
    parts: dict[str, float] = {"weights": w.shape.params * w.weight_bytes}
    if w.lora_rank:
        parts["LoRA adapters"] = w.trained * w.trained_bytes
    parts["optimizer"] = w.trained * state
    if w.needs_reference and not w.lora_rank:
        parts["reference"] = w.shape.params * w.weight_bytes
    return {part: size / w.shards for part, size in parts.items()}


def _gathered(w: Workload) -> Parts:
    """FSDP's whole weights: those of the layer at work and the next one, embedding and head."""
    if w.shards == 1:
        return {}
    ends = w.shape.head * (1 if w.shape.tied else 2)
    return {"gathered weights": (2 * w.shape.layer_params + ends) * w.compute_bytes}


def _weight_copies(w: Workload) -> float:
    """Autocast's low-precision copies of trained weights, kept until the forward's context ends."""
    return 2 * w.shape.linear if w.precision.endswith("mixed") and w.dtype == "float32" and not w.lora_rank else 0


def _head(w: Workload, hardware: Hardware, trained: bool) -> float:
    """The log-prob kernel's blocks: logits [n, W] of W ids of the vocabulary, and what it multiplies them with.

    A trained head keeps blocks for the backward up to a budget, and multiplies for the others again.
    """
    n, H, V, size = w.micro_batch_size * w.completion_length, w.shape.hidden, w.shape.vocab, w.compute_bytes
    logit = size if hardware.is_cpu else 4
    sizes = budget(gpu=not hardware.is_cpu, itemsize=size)
    W = width_within(sizes.block, n * logit, V)
    block = n * W * logit
    kept = min(n * V, sizes.kept // (n * W * size) * n * W) * size if trained and not w.lora_rank else 0
    scratch = 0 if logit == size else n * W * size
    products = (w.weight_bytes != size) + (trained and not w.lora_rank)
    return block + kept + scratch + size * W * H * products + 8 * n * H


def _generate(w: Workload) -> Parts:
    if w.engine != "hf":
        return {}
    rows = min(w.engine_sequences, w.samples // w.ranks)
    length = w.prompt_length + w.completion_length
    # One layer after another is copied when rows leave.
    cache = rows * length * 2 * w.shape.layers * w.shape.kv_width * w.compute_bytes * (1 + 1 / w.shape.layers)
    # All of them stay for the whole rollout, the head's too.
    copies = _weight_copies(w) and _weight_copies(w) + 2 * w.shape.head
    return {"KV cache": cache, "weight copies": copies, "sampling": 12 * rows * w.shape.vocab}


def _kept(w: Workload, hardware: Hardware) -> Activations:
    return activations(w, ATTENTION if hardware.is_cpu else "sdpa")


def _score(w: Workload, hardware: Hardware) -> Parts:
    """Old and reference log-probs, without gradients: one layer's activations at a time."""
    if not (w.needs_old_logprobs or w.needs_reference):
        return {}
    tokens = w.micro_batch_size * (w.prompt_length + w.completion_length)
    return {
        "activations": _kept(w, hardware).layer + 2 * tokens * w.shape.hidden * w.weight_bytes,
        "weight copies": _weight_copies(w),
        "logits blocks": _head(w, hardware, trained=False),
    }


def _update(w: Workload, hardware: Hardware) -> Parts:
    """The largest of three moments: the loss is known, the last gradient arrives, the optimizer steps."""
    states = _states(w) | {"gradients": w.trained * w.trained_bytes / w.shards}
    kept = _kept(w, hardware)
    tokens = w.micro_batch_size * (w.prompt_length + w.completion_length)
    # The residual stream has the parameters' type, also under autocast.
    residual = tokens * w.shape.hidden * w.weight_bytes
    if w.gradient_checkpointing:
        body = {
            "activations (checkpoints)": w.shape.layers * residual + kept.ends,
            "one layer, recomputed": max(kept.layer, _weight_copies(w)),
        }
    else:
        body = {"activations": w.shape.layers * kept.layer + kept.ends}
    head_gradient = 0 if w.lora_rank else w.shape.head * w.weight_bytes / w.shards
    loss = body | {
        "hidden states": 2 * residual,
        "logits blocks": _head(w, hardware, trained=True),
        "head gradient": head_gradient,
    }
    last = {"head gradient": 2 * head_gradient}
    # On a GPU, PyTorch's AdamW works on all parameters at once and holds one temporary of their size; on a CPU, on one
    # after another, the largest being the head.
    at_once = 2 * head_gradient if hardware.is_cpu else w.trained * w.trained_bytes / w.shards
    step = {"optimizer temporaries": at_once}
    return states | max((loss, last, step), key=lambda parts: sum(parts.values()))


def _engine(w: Workload, hardware: Hardware) -> tuple[Parts, Parts]:
    """What the engine holds (awake, asleep)."""
    if w.engine != "vllm":
        return {}, {}
    awake = {"engine weights": w.engine_bytes * w.shape.params / w.engine_shards, "KV cache": w.engine_cache}
    if hardware.is_cpu:
        return awake, awake
    awake |= {"engine workspace": VLLM_WORKSPACE + VLLM_GRAPHS * w.engine_graphs}
    return awake, {"engine asleep": VLLM_RESIDUE} if w.engine_sleep else awake
