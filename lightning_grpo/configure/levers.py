"""What to pull when memory is short, cheapest first.

A smaller engine cache costs waves; a smaller micro-batch, with more accumulation, costs nothing while a forward pass
still has some thousand tokens; activation checkpointing costs a third more compute; a micro-batch below that costs
utilisation; a sleeping engine its wake-up; β = 0 the reference; then come an 8-bit optimizer, sharding and LoRA, which
leave the batch alone; a shorter completion changes what can be learned and comes last. Two are missing: logits are
never held whole, so that lever is always pulled; and a smaller group saves nothing, since the peak follows the tokens
of a micro-batch, while P(all rewards of a group equal) = p^G + (1 − p)^G rises.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from lightning_grpo.configure.devices import GiB, Hardware
from lightning_grpo.configure.memory import Memory, predict_memory
from lightning_grpo.configure.workload import Workload

HEADROOM = 0.92
"""Share of the memory that a plan fills: the rest is for fragmentation and what the model leaves out."""


SATURATING_TOKENS = 4096
"""Tokens of one forward pass from which a larger one is hardly faster."""


@dataclass(frozen=True)
class Lever:
    """A change that saves memory."""

    name: str
    pull: Callable[[Workload], Workload | None]
    """The changed run, or None where there is nothing (more) to pull."""
    setting: Callable[[Workload], str]
    """What to set, of a run where it was pulled."""
    trades: str
    pins: tuple[str, ...]
    """Options that this lever changes; pinning any of them forbids it."""
    price: float = 1.0
    """Rough cost, to order sets of levers by: 1 is a little time, 10 another result."""
    gpu_only: bool = False


def _smaller_micro_batch(w: Workload, tokens: int = 0) -> Workload | None:
    """The next smaller divisor that leaves at least so many tokens a forward pass."""
    if w.micro_batch_size == 1:
        return None
    smaller = max(d for d in range(1, w.micro_batch_size) if w.micro_batch_size % d == 0)
    if smaller * (w.prompt_length + w.completion_length) < tokens:
        return None
    factor = w.micro_batch_size // smaller
    return replace(w, micro_batch_size=smaller, accumulate_grad_batches=w.accumulate_grad_batches * factor)


def _micro_batch_setting(w: Workload) -> str:
    return f"micro_batch_size: {w.micro_batch_size}, accumulate_grad_batches: {w.accumulate_grad_batches}"


def _smaller_cache(w: Workload) -> Workload | None:
    """Down to one wave in eight at full length."""
    row = (w.prompt_length + w.completion_length) * w.shape.cache_bytes
    if w.engine != "vllm" or w.engine_cache / 2 < row * max(1, w.samples // w.ranks // 8):
        return None
    cache = w.engine_cache / 2
    return replace(w, engine_cache=cache, engine_sequences=max(1, min(w.engine_sequences, int(cache // row))))


def _lora(w: Workload) -> Workload | None:
    return None if w.lora_rank else replace(w, lora_rank=16, optimizer="adamw", dtype="bfloat16")


LEVERS = (
    Lever(
        "smaller engine cache",
        _smaller_cache,
        lambda w: f"rollout kv_cache_memory_bytes: {w.engine_cache:.0f} ({w.engine_sequences} sequences at once)",
        "more waves a rollout",
        ("engine_cache",),
        price=0.5,
    ),
    Lever(
        "smaller micro-batch",
        lambda w: _smaller_micro_batch(w, SATURATING_TOKENS),
        _micro_batch_setting,
        f"nothing: the gradient is the same, and {SATURATING_TOKENS} tokens still fill a device",
        ("micro_batch_size", "accumulate_grad_batches"),
        price=0.1,
    ),
    Lever(
        "activation checkpointing",
        lambda w: None if w.gradient_checkpointing else replace(w, gradient_checkpointing=True),
        lambda w: "gradient_checkpointing: true",
        "about a third more compute in the update, and prompts no longer shared",
        ("gradient_checkpointing",),
        price=2,
    ),
    Lever(
        "smallest micro-batch",
        _smaller_micro_batch,
        _micro_batch_setting,
        "utilisation; the gradient is the same",
        ("micro_batch_size", "accumulate_grad_batches"),
        price=2.5,
    ),
    Lever(
        "engine sleep",
        lambda w: replace(w, engine_sleep=True) if w.engine == "vllm" and not w.engine_sleep else None,
        lambda w: "rollout sleep: true",
        "seconds a rollout to wake up",
        ("engine_sleep",),
        price=0.5,
    ),
    Lever(
        "no reference",
        lambda w: replace(w, beta=0.0) if w.beta else None,
        lambda w: "objective.beta: 0",
        "the pull back to where the policy started",
        ("beta",),
        price=2,
    ),
    Lever(
        "8-bit Adam",
        lambda w: replace(w, optimizer="adamw_8bit") if w.optimizer == "adamw" and not w.lora_rank else None,
        lambda w: "optimizer: bitsandbytes.optim.AdamW8bit",
        "a package (bitsandbytes, GPU only) and rounded moments",
        ("optimizer",),
        price=2,
        gpu_only=True,
    ),
    Lever(
        "sharding",
        lambda w: replace(w, shards=w.ranks) if w.shards < w.ranks and w.engine != "hf" else None,
        lambda w: "trainer.strategy: fsdp",
        "gathers weights in every forward and backward",
        ("strategy",),
        price=2,
    ),
    Lever(
        "LoRA",
        _lora,
        lambda w: f"lora.rank: {w.lora_rank}, dtype: bfloat16 (frozen weights only)",
        "needs about ten times the learning rate",
        ("lora",),
        price=4,
    ),
    Lever(
        "shorter completions",
        lambda w: replace(w, completion_length=w.completion_length // 2) if w.completion_length >= 128 else None,
        lambda w: f"max_completion_length: {w.completion_length}",
        "answers that need the length are cut off and get no reward",
        ("max_completion_length",),
        price=10,
    ),
)


def fits(memory: Memory, hardware: Hardware) -> bool:
    """Whether a peak leaves the headroom free."""
    return memory.peak <= HEADROOM * hardware.memory


def ways_to_fit(
    w: Workload, hardware: Hardware, pins: Collection[str] = (), count: int = 3
) -> list[tuple[Workload, list[Lever]]]:
    """The cheapest sets of levers that make ``w`` fit, by the sum of their prices.

    Args:
        w: the run.
        hardware: one rank's device.
        pins: options that must stay as they are.
        count: how many sets to find.
    """
    if fits(predict_memory(w, hardware), hardware):
        return [(w, [])]
    levers = [lever for lever in LEVERS if not set(lever.pins) & set(pins) and not (lever.gpu_only and hardware.is_cpu)]
    if _pull(w, hardware, levers) is None:
        return []
    sets = [chosen for size in range(1, len(levers) + 1) for chosen in combinations(levers, size)]
    found: list[tuple[Workload, list[Lever]]] = []
    for chosen in sorted(sets, key=lambda chosen: sum(lever.price for lever in chosen)):
        if any(set(known) <= set(chosen) for _, known in found):
            continue
        run = _pull(w, hardware, chosen)
        if run is not None and all(run != known for known, _ in found):
            found.append((run, list(chosen)))
            if len(found) == count:
                break
    return found


def _pull(w: Workload, hardware: Hardware, levers: Sequence[Lever]) -> Workload | None:
    """``w`` with the levers pulled in turn, each while it lowers the peak, until it fits; None where it doesn't."""
    peak, moved = predict_memory(w, hardware).peak, True
    while moved:
        moved = False
        for lever in levers:
            while (further := lever.pull(w)) is not None and (lower := predict_memory(further, hardware).peak) < peak:
                w, peak, moved = further, lower, True
                if peak <= HEADROOM * hardware.memory:
                    return w
    return None


def describe_way(run: Workload, levers: list[Lever], hardware: Hardware) -> str:
    """What to set, the peak it leads to, and what it trades."""
    settings = "; ".join(lever.setting(run) for lever in levers)
    trades = "; ".join(lever.trades for lever in levers)
    return f"{settings} ({predict_memory(run, hardware).peak / GiB:.1f} GiB; trades {trades})"
