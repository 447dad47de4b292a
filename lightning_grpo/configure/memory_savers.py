"""Changes that save memory.

Their costs order them: a smaller engine cache, or fewer completions sampled at once, takes more waves per rollout; a
smaller micro-batch with more accumulation is free while a forward pass still has some thousand tokens, and then lowers
utilization; activation checkpointing takes a third more compute; a sleeping engine takes time to wake up; an engine
split over ranks exchanges activations; β = 0 drops the KL penalty; an 8-bit optimizer, sharding and LoRA leave the
batch unchanged. A shorter completion limit changes what can be learned and comes last. Smaller groups are missing on
purpose: the peak follows the tokens of a micro-batch, while the share of groups without signal, p^G + (1 − p)^G, rises.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import combinations

from lightning_grpo.configure.memory import Memory, predict_memory
from lightning_grpo.configure.workload import Workload
from lightning_grpo.devices import GiB, Hardware
from lightning_grpo.training.batching import divisors

USABLE = 0.92
"""Share of the memory that a plan may fill; the rest is for fragmentation and for what the model leaves out."""

SATURATING_TOKENS = 4096
"""Tokens per forward pass above which a larger one is hardly faster."""

_BATCH = ("micro_batch_size", "accumulate_grad_batches")

SHARDED = "lightning.pytorch.strategies.ModelParallelStrategy"


@dataclass(frozen=True)
class MemorySaver:
    """A change of the run that saves memory."""

    name: str
    apply: Callable[[Workload], Workload | None]
    """Returns the changed run, or None if nothing (more) can be changed."""
    settings: Callable[[Workload], dict[str, str]]
    """Returns the options of ``lightning-grpo fit``, by name, that describe a run changed by ``apply``."""
    tradeoff: str
    options: tuple[str, ...]
    """Options that this changes. It is not used if any of them is fixed."""
    cost: float = 1.0
    """Rough cost, to order sets of changes: 1 is a little time, 10 a different result."""
    gpu_only: bool = False
    package: str | None = None
    """Package that must be installed."""

    def available(self, hardware: Hardware) -> bool:
        """Whether the device supports it and its package is installed."""
        return not (self.gpu_only and hardware.is_cpu) and (self.package is None or find_spec(self.package) is not None)


def _smaller_micro_batch(w: Workload, tokens: int = 0) -> Workload | None:
    """Take the next smaller divisor that leaves at least ``tokens`` per forward pass."""
    if w.micro_batch_size == 1:
        return None
    smaller = divisors(w.micro_batch_size)[-2]
    if smaller * w.max_length < tokens:
        return None
    factor = w.micro_batch_size // smaller
    return replace(w, micro_batch_size=smaller, accumulate_grad_batches=w.accumulate_grad_batches * factor)


def _micro_batch_settings(w: Workload) -> dict[str, str]:
    return {
        "model.micro_batch_size": f"{w.micro_batch_size}",
        "trainer.accumulate_grad_batches": f"{w.accumulate_grad_batches}",
    }


def _rollout_settings(w: Workload, **options: int) -> dict[str, str]:
    """Options of the rollout callback, after its class, which a configuration may not name."""
    return {"rollout": w.rollout_class} | {f"rollout.{name}": f"{value}" for name, value in options.items()}


def _cache_settings(w: Workload) -> dict[str, str]:
    sequences = w.engine_sequences * w.engine_shards
    return _rollout_settings(w, kv_cache_memory_bytes=int(w.engine_cache), max_num_seqs=sequences)


def _smaller_cache(w: Workload, waves: int | None = 8) -> Workload | None:
    """Halve the cache, down to 1 / ``waves`` of a rollout at full length; None goes down to a single sequence."""
    rows = 1 if waves is None else max(1, w.local_samples // waves)
    if w.engine != "vllm" or w.engine_cache <= rows * w.engine_row:
        return None
    cache = max(w.engine_cache / 2, rows * w.engine_row)
    sequences = max(1, min(w.engine_sequences, int(cache / w.engine_row)))
    return replace(w, engine_cache=cache, engine_sequences=sequences)


def _fewer_rows(w: Workload) -> Workload | None:
    rows = min(w.engine_sequences, w.local_samples)
    return replace(w, engine_sequences=rows // 2) if w.engine == "hf" and rows > 1 else None


def _split_engine(w: Workload) -> Workload | None:
    """Split over the next larger number of ranks of a node that divides the model's heads, with the cache unchanged."""
    if w.engine != "vllm" or w.engine_process:
        return None
    # vLLM stores key-value heads several times if there are fewer of them than ranks
    heads, kv_heads = w.shape.heads, w.shape.kv_heads
    larger = [n for n in divisors(w.ranks_per_node) if n > w.engine_shards]
    sizes = [n for n in larger if heads % n == 0 and (kv_heads % n == 0 or n % kv_heads == 0)]
    return replace(w, engine_shards=sizes[0]) if sizes else None


def _sleep(w: Workload) -> Workload | None:
    return replace(w, engine_sleep=True) if w.engine == "vllm" and not (w.engine_process or w.engine_sleep) else None


def _sharding_settings(w: Workload) -> dict[str, str]:
    sizes = {"data_parallel_size": w.shards, "tensor_parallel_size": 1}
    return {"trainer.strategy": SHARDED} | {f"trainer.strategy.{name}": f"{size}" for name, size in sizes.items()}


def _lora(w: Workload) -> Workload | None:
    if w.lora_rank:
        return None
    return replace(w, lora_rank=16, optimizer="adamw", dtype=w.compute_dtype)


def _lora_settings(w: Workload) -> dict[str, str]:
    return {"model.lora.rank": f"{w.lora_rank}", "model.dtype": w.dtype}


def _four_bits(w: Workload) -> Workload | None:
    if w.quantization or w.shards > 1:
        return None
    return replace(w, quantization="nf4")


MEMORY_SAVERS = (
    MemorySaver(
        "smaller engine cache", _smaller_cache, _cache_settings, "more waves per rollout", ("engine_cache",), 0.5
    ),
    MemorySaver(
        "fewer completions at once",
        _fewer_rows,
        lambda w: _rollout_settings(w, max_num_seqs=w.engine_sequences),
        "more waves per rollout",
        ("engine_sequences",),
        0.6,
    ),
    MemorySaver(
        "smaller micro-batch",
        lambda w: _smaller_micro_batch(w, SATURATING_TOKENS),
        _micro_batch_settings,
        f"none: the gradient is the same, and {SATURATING_TOKENS} tokens still saturate a device",
        _BATCH,
        0.1,
    ),
    MemorySaver(
        "activation checkpointing",
        lambda w: None if w.gradient_checkpointing else replace(w, gradient_checkpointing=True),
        lambda w: {"model.gradient_checkpointing": "true"},
        "about a third more compute in the update; on GPUs prompts are no longer shared",
        ("gradient_checkpointing",),
        2,
    ),
    MemorySaver(
        "smallest micro-batch",
        _smaller_micro_batch,
        _micro_batch_settings,
        "lower utilization; the gradient is the same",
        _BATCH,
        2.5,
    ),
    MemorySaver(
        "engine sleep",
        _sleep,
        lambda w: _rollout_settings(w, sleep_level=1),
        "some seconds per rollout to wake up",
        ("engine_sleep",),
        0.5,
        gpu_only=True,
    ),
    MemorySaver(
        "split engine",
        _split_engine,
        lambda w: _rollout_settings(w, tensor_parallel_size=w.engine_shards) | _cache_settings(w),
        "ranks exchange activations for every sampled token",
        ("engine_shards",),
        1.5,
    ),
    MemorySaver(
        "smallest engine cache",
        lambda w: _smaller_cache(w, None),
        _cache_settings,
        "only a few completions are sampled at a time",
        ("engine_cache",),
        2.5,
    ),
    MemorySaver(
        "no reference",
        lambda w: replace(w, beta=0.0) if w.beta else None,
        lambda w: {"model.objective.beta": "0"},
        "no KL penalty towards the initial policy",
        ("beta",),
        2,
    ),
    MemorySaver(
        "8-bit Adam",
        lambda w: replace(w, optimizer="adamw_8bit") if w.optimizer == "adamw" and not w.lora_rank else None,
        # naming another class resets the learning rate
        lambda w: {"model.optimizer": "bitsandbytes.optim.AdamW8bit", "model.optimizer.lr": f"{w.learning_rate:.10g}"},
        "moments are rounded to 8 bits (package bitsandbytes, GPU only)",
        ("optimizer",),
        2,
        gpu_only=True,
        package="bitsandbytes",
    ),
    MemorySaver(
        "sharding",
        lambda w: replace(w, shards=w.ranks) if w.shards < w.ranks and w.engine != "hf" else None,
        _sharding_settings,
        "weights are gathered in every forward and backward",
        ("strategy",),
        2,
    ),
    MemorySaver(
        "LoRA",
        _lora,
        _lora_settings,
        "trains adapters only, which need about ten times the learning rate",
        ("lora",),
        4,
    ),
    MemorySaver(
        "4-bit base weights",
        lambda w: _four_bits(w) if w.lora_rank else None,
        lambda w: {"model.quantization": f"{w.quantization}"},
        "trains adapters of a model whose weights are rounded to 4 bits",
        ("quantization",),
        5,
        package="bitsandbytes",
    ),
    MemorySaver(
        "LoRA on 4-bit base weights",
        lambda w: _four_bits(_lora(w) or w),
        lambda w: _lora_settings(w) | {"model.quantization": f"{w.quantization}"},
        "trains adapters only, of a model whose weights are rounded to 4 bits, with ten times the learning rate",
        ("lora", "quantization"),
        8,
        package="bitsandbytes",
    ),
    MemorySaver(
        "shorter completions",
        lambda w: replace(w, completion_length=w.completion_length // 2) if w.completion_length >= 128 else None,
        lambda w: {"model.max_completion_length": f"{w.completion_length}"},
        "longer answers are truncated and get no reward",
        ("max_completion_length",),
        10,
    ),
)
"""In the order in which several of them are applied."""


def fits(memory: Memory, hardware: Hardware) -> bool:
    """Return whether the peak is within the usable share of the device's memory."""
    return memory.peak <= USABLE * hardware.memory


def changes_to_fit(
    w: Workload, hardware: Hardware, fixed: Collection[str] = (), count: int = 3
) -> list[tuple[Workload, list[MemorySaver]]]:
    """Return the cheapest sets of memory savers that make ``w`` fit, with the changed run.

    Args:
        w: the run.
        hardware: device of one rank.
        fixed: options that must not change.
        count: number of sets to find.
    """
    if fits(predict_memory(w, hardware), hardware):
        return [(w, [])]
    savers = usable(w, hardware, fixed)
    if not fits(predict_memory(_apply_all(w, hardware, savers), hardware), hardware):
        return []
    sets = [chosen for size in range(1, len(savers) + 1) for chosen in combinations(savers, size)]
    found: list[tuple[Workload, list[MemorySaver]]] = []
    for chosen in sorted(sets, key=lambda chosen: sum(saver.cost for saver in chosen)):
        if any(set(known) <= set(chosen) for _, known in found):
            continue
        run = _apply_all(w, hardware, chosen)
        if fits(predict_memory(run, hardware), hardware) and all(run != known for known, _ in found):
            found.append((run, list(chosen)))
            if len(found) == count:
                break
    return found


def usable(w: Workload, hardware: Hardware, fixed: Collection[str] = ()) -> list[MemorySaver]:
    """Return the memory savers that change ``w``, change no ``fixed`` option, and are available on the device."""
    return [
        saver
        for saver in MEMORY_SAVERS
        if not set(saver.options) & set(fixed) and saver.available(hardware) and saver.apply(w) is not None
    ]


def lowest_memory(w: Workload, hardware: Hardware, fixed: Collection[str] = ()) -> Workload:
    """Return ``w`` with every usable memory saver applied for as long as it lowers the peak, or until the run fits."""
    return _apply_all(w, hardware, usable(w, hardware, fixed))


def _apply_all(w: Workload, hardware: Hardware, savers: Sequence[MemorySaver]) -> Workload:
    """Apply the savers in turn, each while it lowers the peak, until the run fits or nothing lowers the peak."""
    peak, changed = predict_memory(w, hardware).peak, True
    while changed:
        changed = False
        for saver in savers:
            while (further := saver.apply(w)) is not None and (lower := predict_memory(further, hardware).peak) < peak:
                w, peak, changed = further, lower, True
                if peak <= USABLE * hardware.memory:
                    return w
    return w


def flags(run: Workload, savers: Sequence[MemorySaver]) -> list[str]:
    """Return the arguments of ``lightning-grpo fit`` that make a configuration into ``run``."""
    settings = {name: value for saver in savers for name, value in saver.settings(run).items()}
    return [text for name, value in settings.items() for text in (f"--{name}", value)]


def describe_change(run: Workload, savers: list[MemorySaver], hardware: Hardware) -> str:
    """Describe what to set, the resulting peak, and the trade-offs."""
    tradeoffs = "; ".join(saver.tradeoff for saver in savers)
    peak = predict_memory(run, hardware).peak / GiB
    return f"{' '.join(flags(run, savers))} (peak {peak:.1f} GiB; trade-off: {tradeoffs})"
