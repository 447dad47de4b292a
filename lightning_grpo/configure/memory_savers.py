"""What to pull when memory is short, cheapest first.

A smaller engine cache, or fewer completions sampled at once, costs waves; a smaller micro-batch, with more
accumulation, costs nothing while a forward pass still has some thousand tokens; activation checkpointing costs a third
more compute; a micro-batch below that costs utilisation; a sleeping engine its wake-up; an engine split over ranks
their exchange; β = 0 the reference; then come an 8-bit optimizer, sharding and LoRA, which leave the batch alone; a
shorter completion changes what can be learned and comes last. Two are missing: logits are never held whole; and a
smaller group saves nothing, since the peak follows the tokens of a micro-batch, while P(all rewards of a group equal) =
p^G + (1 − p)^G rises.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import combinations
from typing import Literal

from lightning_grpo.configure.devices import GiB, Hardware
from lightning_grpo.configure.memory import Memory, predict_memory
from lightning_grpo.configure.workload import Workload
from lightning_grpo.training.batching import divisors

HEADROOM = 0.92
"""Share of the memory that a plan fills: the rest is for fragmentation and what the model leaves out."""


SATURATING_TOKENS = 4096
"""Tokens of one forward pass from which a larger one is hardly faster."""

SHARDED = "lightning.pytorch.strategies.ModelParallelStrategy"


@dataclass(frozen=True)
class Lever:
    """A change that saves memory."""

    name: str
    pull: Callable[[Workload], Workload | None]
    """The changed run, or None where there is nothing (more) to pull."""
    setting: Callable[[Workload], dict[str, str]]
    """The options of ``lightning-grpo fit`` that it sets, by name, of a run where it was pulled."""
    trades: str
    pins: tuple[str, ...]
    """Options that this lever changes; pinning any of them forbids it."""
    price: float = 1.0
    """Rough cost, to order sets of levers by: 1 is a little time, 10 another result."""
    gpu_only: bool = False
    package: str | None = None
    """What must be installed for it."""

    def available(self, hardware: Hardware) -> bool:
        return not (self.gpu_only and hardware.is_cpu) and (self.package is None or find_spec(self.package) is not None)


def _smaller_micro_batch(w: Workload, tokens: int = 0) -> Workload | None:
    """The next smaller divisor that leaves at least so many tokens a forward pass."""
    if w.micro_batch_size == 1:
        return None
    smaller = max(d for d in range(1, w.micro_batch_size) if w.micro_batch_size % d == 0)
    if smaller * (w.prompt_length + w.completion_length) < tokens:
        return None
    factor = w.micro_batch_size // smaller
    return replace(w, micro_batch_size=smaller, accumulate_grad_batches=w.accumulate_grad_batches * factor)


def _micro_batch_setting(w: Workload) -> dict[str, str]:
    return {
        "model.micro_batch_size": f"{w.micro_batch_size}",
        "trainer.accumulate_grad_batches": f"{w.accumulate_grad_batches}",
    }


def _with_rollout(w: Workload, **options: int) -> dict[str, str]:
    """Options of the rollout callback; its class comes first, for configurations that name none."""
    return {"rollout": w.rollout_class} | {f"rollout.{name}": f"{value}" for name, value in options.items()}


def _cache_setting(w: Workload) -> dict[str, str]:
    sequences = w.engine_sequences * w.engine_shards
    return _with_rollout(w, kv_cache_memory_bytes=int(w.engine_cache), max_num_seqs=sequences)


def _smaller_cache(w: Workload, share: int | None = 8) -> Workload | None:
    """Half of it, down to one wave in ``share`` at full length, or to a single sequence for None."""
    rows = 1 if share is None else max(1, w.samples // w.ranks // share)
    if w.engine != "vllm" or w.engine_cache <= rows * w.engine_row:
        return None
    cache = max(w.engine_cache / 2, rows * w.engine_row)
    sequences = max(1, min(w.engine_sequences, int(cache / w.engine_row)))
    return replace(w, engine_cache=cache, engine_sequences=sequences)


def _fewer_rows(w: Workload) -> Workload | None:
    rows = min(w.engine_sequences, w.samples // w.ranks)
    return replace(w, engine_sequences=rows // 2) if w.engine == "hf" and rows > 1 else None


def _split_engine(w: Workload) -> Workload | None:
    """Over the next larger number of ranks of a node that divides the model's heads. The cache holds as many tokens."""
    if w.engine != "vllm" or w.engine_process:
        return None
    # vLLM keeps key-value heads several times if there are fewer of them than ranks
    heads, kv_heads = w.shape.heads, w.shape.kv_heads
    larger = [n for n in divisors(w.ranks_per_node) if n > w.engine_shards]
    sizes = [n for n in larger if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
    return replace(w, engine_shards=sizes[0]) if sizes else None


def _sleep(w: Workload) -> Workload | None:
    can = w.engine == "vllm" and not w.engine_process
    return replace(w, engine_sleep=True) if can and not w.engine_sleep else None


def _lora(w: Workload) -> Workload | None:
    if w.lora_rank:
        return None
    low: Literal["float16", "bfloat16"] = "float16" if w.precision.startswith("16") else "bfloat16"
    return replace(w, lora_rank=16, optimizer="adamw", dtype="float32" if w.precision == "32-true" else low)


LEVERS = (
    Lever(
        "smaller engine cache",
        _smaller_cache,
        _cache_setting,
        "more waves per rollout",
        ("engine_cache",),
        price=0.5,
    ),
    Lever(
        "fewer completions at once",
        _fewer_rows,
        lambda w: _with_rollout(w, max_num_seqs=w.engine_sequences),
        "more waves per rollout",
        ("engine_sequences",),
        price=0.6,
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
        lambda w: {"model.gradient_checkpointing": "true"},
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
        _sleep,
        lambda w: _with_rollout(w, sleep_level=1),
        "seconds per rollout to wake up",
        ("engine_sleep",),
        price=0.5,
        gpu_only=True,
    ),
    Lever(
        "split engine",
        _split_engine,
        lambda w: _with_rollout(w, tensor_parallel_size=w.engine_shards) | _cache_setting(w),
        "the ranks exchange activations at every sampled token",
        ("engine_shards",),
        price=1.5,
    ),
    Lever(
        "smallest engine cache",
        lambda w: _smaller_cache(w, None),
        _cache_setting,
        "completions are sampled a few at a time",
        ("engine_cache",),
        price=2.5,
    ),
    Lever(
        "no reference",
        lambda w: replace(w, beta=0.0) if w.beta else None,
        lambda w: {"model.objective.beta": "0"},
        "the pull back to where the policy started",
        ("beta",),
        price=2,
    ),
    Lever(
        "8-bit Adam",
        lambda w: replace(w, optimizer="adamw_8bit") if w.optimizer == "adamw" and not w.lora_rank else None,
        # another class begins with its own learning rate
        lambda w: {"model.optimizer": "bitsandbytes.optim.AdamW8bit", "model.optimizer.lr": f"{w.learning_rate:.10g}"},
        "moments rounded to 8 bits (package bitsandbytes, GPU only)",
        ("optimizer",),
        price=2,
        gpu_only=True,
        package="bitsandbytes",
    ),
    Lever(
        "sharding",
        lambda w: replace(w, shards=w.ranks) if w.shards < w.ranks and w.engine != "hf" else None,
        lambda w: {
            "trainer.strategy": SHARDED,
            "trainer.strategy.data_parallel_size": f"{w.shards}",
            "trainer.strategy.tensor_parallel_size": "1",
        },
        "gathers weights in every forward and backward",
        ("strategy",),
        price=2,
    ),
    Lever(
        "LoRA",
        _lora,
        lambda w: {"model.lora.rank": f"{w.lora_rank}", "model.dtype": w.dtype},
        "needs about ten times the learning rate",
        ("lora",),
        price=4,
    ),
    Lever(
        "shorter completions",
        lambda w: replace(w, completion_length=w.completion_length // 2) if w.completion_length >= 128 else None,
        lambda w: {"model.max_completion_length": f"{w.completion_length}"},
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
    levers = usable(w, hardware, pins)
    if not fits(predict_memory(_pull(w, hardware, levers), hardware), hardware):
        return []
    sets = [chosen for size in range(1, len(levers) + 1) for chosen in combinations(levers, size)]
    found: list[tuple[Workload, list[Lever]]] = []
    for chosen in sorted(sets, key=lambda chosen: sum(lever.price for lever in chosen)):
        if any(set(known) <= set(chosen) for _, known in found):
            continue
        run = _pull(w, hardware, chosen)
        if fits(predict_memory(run, hardware), hardware) and all(run != known for known, _ in found):
            found.append((run, list(chosen)))
            if len(found) == count:
                break
    return found


def usable(w: Workload, hardware: Hardware, pins: Collection[str] = ()) -> list[Lever]:
    """The levers that change ``w``, leave ``pins`` alone, and work with this device and what is installed."""
    return [
        lever
        for lever in LEVERS
        if not set(lever.pins) & set(pins) and lever.available(hardware) and lever.pull(w) is not None
    ]


def lowest(w: Workload, hardware: Hardware, pins: Collection[str] = ()) -> Workload:
    """``w`` with every usable lever pulled as far as it lowers the peak, or until it fits."""
    return _pull(w, hardware, usable(w, hardware, pins))


def _pull(w: Workload, hardware: Hardware, levers: Sequence[Lever]) -> Workload:
    """``w`` with the levers pulled in turn, each while it lowers the peak, until it fits or nothing lowers it."""
    peak, moved = predict_memory(w, hardware).peak, True
    while moved:
        moved = False
        for lever in levers:
            while (further := lever.pull(w)) is not None and (lower := predict_memory(further, hardware).peak) < peak:
                w, peak, moved = further, lower, True
                if peak <= HEADROOM * hardware.memory:
                    return w
    return w


def options(run: Workload, levers: Sequence[Lever]) -> dict[str, str]:
    """What to set on the command line of ``lightning-grpo fit``, by option."""
    return {name: value for lever in levers for name, value in lever.setting(run).items()}


def flags(run: Workload, levers: Sequence[Lever]) -> list[str]:
    """`options` as arguments."""
    return [text for name, value in options(run, levers).items() for text in (f"--{name}", value)]


def describe_way(run: Workload, levers: list[Lever], hardware: Hardware) -> str:
    """What to set, the peak it leads to, and what it trades."""
    trades = "; ".join(lever.trades for lever in levers)
    peak = predict_memory(run, hardware).peak / GiB
    return f"{' '.join(flags(run, levers))} ({peak:.1f} GiB; trades {trades})"
