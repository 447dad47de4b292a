"""Time of a rollout and its update: Cost = G · generate + G · reward + update.

A phase takes flops / (rate · efficiency) + bytes / (bandwidth · efficiency). Floating-point operations: 2 per weight
and token in the forward, 4 in the backward (2 with frozen weights); attention 2 · query width · length² per layer and
sequence in the forward (causal) and twice that in the backward. They follow "Scaling Laws" (Kaplan et al. 2020,
arXiv:2001.08361, section 2.1).
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from lightning_grpo.configure.activations import activations, packs
from lightning_grpo.configure.workload import Workload
from lightning_grpo.devices import Hardware

MEASURED = "measured here"
"""Source of efficiencies that were measured on this machine."""


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """Shares of the hardware's peak rates."""

    flops: float
    """Share of the dense rate in the matrix products of update and prefill."""
    bandwidth: float
    """Share of the memory bandwidth in decoding, element-wise operations and the optimizer."""
    token_overhead: float
    """Seconds per decoding step besides reading weights and cache."""
    decoding: float = 1.0
    """Share of ``flops`` that the few rows of a decoding step reach."""
    generate_factor: float = 1.0
    """Measured seconds of generation divided by those predicted without this factor."""
    update_factor: float = 1.0
    """The same for update and scoring."""
    spread: float
    """Factor within which the true time is expected, up or down."""
    source: str

    @classmethod
    def assumed(cls, hardware: Hardware, engine: str) -> "Efficiency":
        """Return assumptions for a device without measurements."""
        if hardware.is_cpu:
            return cls(
                flops=0.95,
                decoding=0.5,
                bandwidth=0.4,
                token_overhead=0.03 if engine != "hf" else 0.1,
                # groups without signal are skipped
                update_factor=0.75,
                spread=1.5,
                source="assumed",
            )
        overhead = 0.003 if engine != "hf" else 0.03
        return cls(flops=0.4, bandwidth=0.7, token_overhead=overhead, spread=2.0, source="assumed")


@dataclass(frozen=True)
class Cost:
    """Seconds per rollout with its updates, by phase, and the share of groups without signal."""

    seconds: dict[str, float]
    """Seconds by phase. Of a rollout sampled ahead, only the remaining wait is counted."""
    generated_tokens: float
    """Tokens sampled per rollout, over all ranks."""
    zero_variance: float
    """Expected share of groups whose rewards are all equal."""
    efficiency: Efficiency

    @property
    def total(self) -> float:
        return sum(self.seconds.values())

    @property
    def effective(self) -> float:
        """Seconds per rollout's worth of groups with a signal: total / (1 − zero-variance share)."""
        return self.total / max(1e-9, 1 - self.zero_variance)


def zero_variance_share(pass_rates: Sequence[float], num_generations: int) -> float:
    """Return the expected share of groups of G equal 0/1 rewards: the mean of p^G + (1 − p)^G over prompts."""
    return sum(p**num_generations + (1 - p) ** num_generations for p in pass_rates) / len(pass_rates)


def pass_rate_grid(mean: float, count: int = 32, spread: float = 0.8) -> list[float]:
    """Return pass rates around ``mean``: quantiles of a Beta distribution with a + b = ``spread``.

    Below 2 the distribution is U-shaped: most prompts are solved nearly always or nearly never, as measurements of
    pass rates show.
    """
    draws = random.Random(0)
    rates = sorted(draws.betavariate(mean * spread, (1 - mean) * spread) for _ in range(128 * count))
    return rates[64::128]


def alive_shares(mean_fill: float, points: int = 32) -> list[float]:
    """Return the share of unfinished completions at ``points`` moments from the start to the maximum length.

    Lengths are exponential, truncated at the maximum, with a mean of ``mean_fill`` times the maximum.
    """
    if mean_fill >= 0.999:
        return [1.0] * points
    low, high = 1e-6, 1e3
    for _ in range(80):
        rate = math.sqrt(low * high)
        low, high = (rate, high) if (1 - math.exp(-rate)) / rate > mean_fill else (low, rate)
    return [math.exp(-rate * (i + 0.5) / points) for i in range(points)]


def rate(w: Workload, hardware: Hardware, efficiency: Efficiency) -> float:
    """Return the FLOP/s of matrix products in the precision of ``w``."""
    return efficiency.flops * (hardware.flops_fp32 if w.compute_bytes == 4 else hardware.flops)


def predict_cost(
    w: Workload,
    hardware: Hardware,
    efficiency: Efficiency | None = None,
    *,
    reward_seconds: float = 0.002,
    pass_rates: Sequence[float] = (),
) -> Cost:
    """Predict the seconds of one rollout and its updates.

    Args:
        w: the run.
        hardware: device of each rank.
        efficiency: measured shares of the peak rates; None assumes them.
        reward_seconds: seconds per completion; a rank scores one completion after another.
        pass_rates: shares of correct completions by prompt, for the zero-variance share, which is 0 without them.
    """
    efficiency = efficiency or Efficiency.assumed(hardware, w.engine)
    seconds = {
        "generate": _generate(w, hardware, efficiency),
        "reward": w.local_samples * reward_seconds,
        "score": w.scoring_passes * score_seconds(w, hardware, efficiency),
        "update": w.num_iterations * update_seconds(w, hardware, efficiency),
        "sync": 0.0 if w.engine == "hf" else w.engine_bytes * w.shape.params / hardware.link,
    }
    if w.rollout_ahead:
        seconds["generate"] = max(0.0, seconds["generate"] - seconds["score"] - seconds["update"])
    return Cost(
        seconds=seconds,
        generated_tokens=w.samples * w.mean_length,
        zero_variance=zero_variance_share(pass_rates, w.num_generations) if pass_rates else 0.0,
        efficiency=efficiency,
    )


def padded_length(w: Workload) -> float:
    """Return the mean tokens per completion in a padded micro-batch, which are those of its longest row."""
    shares = alive_shares(w.mean_fill)
    longest = sum(1 - (1 - share) ** w.micro_batch_size for share in shares) / len(shares)
    return max(1.0, w.completion_length * longest)


def _trunk_length(w: Workload, hardware: Hardware) -> float:
    """Return the mean tokens per completion in the trainer's trunk."""
    return _head_tokens(w) if packs(w, hardware) else padded_length(w)


def _head_tokens(w: Workload) -> float:
    """Return the tokens per row in the head, which skips padding."""
    return max(1.0, w.mean_length)


def forward_flops(w: Workload, hardware: Hardware) -> float:
    """Return the floating-point operations of the trunk's forward for one row.

    A shared prompt is computed once per micro-batch.
    """
    shares = w.share_prompt if packs(w, hardware) else w.shares_prompt
    prompt = w.prompt_length / (min(w.micro_batch_size, w.num_generations) if shares else 1)
    tokens, keys = (length + _trunk_length(w, hardware) for length in (prompt, w.prompt_length))
    return 2 * w.shape.trunk_linear * tokens + 2 * w.shape.layers * w.shape.query_width * keys * tokens


def micro_batch_work(w: Workload, hardware: Hardware) -> tuple[float, float]:
    """Return the operations of one forward and backward, and the bytes moved besides those of matrix products."""
    rows = w.micro_batch_size
    completion = _head_tokens(w)
    backward = 1 if w.lora_rank else 2
    trunk = forward_flops(w, hardware) * (1 + backward + w.gradient_checkpointing)
    head = completion * w.shape.head * (4 if w.lora_rank else 8)

    saved = activations(w, packed=packs(w, hardware))
    full = saved.layer * w.shape.layers + saved.ends
    written = full * _trunk_length(w, hardware) / w.completion_length
    logits = rows * completion * w.shape.vocab * 4
    copies = 6 * w.shape.linear if w.is_mixed else 0
    accumulate = 3 * w.trained * w.trained_bytes
    return rows * (trunk + head), 4 * written + 6 * logits + copies + accumulate


def optimizer_bytes(w: Workload) -> float:
    """Return the bytes moved by clipping and Adam: weight, gradient and two moments are read and written."""
    return w.trained * (7 * w.trained_bytes + 12) / w.shards


def update_seconds(w: Workload, hardware: Hardware, efficiency: Efficiency) -> float:
    """Return the seconds of one pass over the completions of a rank, including optimizer steps."""
    micro_batches = w.local_samples / w.micro_batch_size
    flops, moved = micro_batch_work(w, hardware)
    traffic = micro_batches * moved + micro_batches / w.accumulate_grad_batches * optimizer_bytes(w)
    seconds = micro_batches * flops / rate(w, hardware, efficiency)
    return efficiency.update_factor * (seconds + traffic / (hardware.bandwidth * efficiency.bandwidth))


def score_seconds(w: Workload, hardware: Hardware, efficiency: Efficiency) -> float:
    """Return the seconds of one forward pass with log-probs over the completions of a rank."""
    completion, local = _head_tokens(w), w.local_samples
    flops = local * (forward_flops(w, hardware) + 2 * completion * w.shape.head)
    traffic = local * completion * w.shape.vocab * 12
    seconds = flops / rate(w, hardware, efficiency) + traffic / (hardware.bandwidth * efficiency.bandwidth)
    return efficiency.update_factor * seconds


def decode_seconds(w: Workload, hardware: Hardware, efficiency: Efficiency, rows: float, length: float) -> float:
    """Return the seconds of one decoding step of ``rows`` sequences of ``length`` tokens, without its overhead."""
    weights = w.shape.trunk_linear + w.shape.head
    # the policy itself is cast once per rollout
    size = w.engine_bytes if w.engine != "hf" else min(w.weight_bytes, w.compute_bytes)
    cached = rows * length * w.shape.cache_bytes * w.engine_bytes / 2
    # a shared engine has the rows of all its ranks, and a part of the weights on each
    read = size * (w.shape.read_linear(rows * w.engine_shards) + w.shape.head) / w.engine_shards + cached
    bandwidth = hardware.bandwidth * efficiency.bandwidth
    products = 2 * weights * rows / (efficiency.decoding * rate(w, hardware, efficiency))
    return max(read / bandwidth, products)


def _generate(w: Workload, hardware: Hardware, efficiency: Efficiency) -> float:
    """Return the seconds to sample the completions of a rank: prefill, then decoding in waves."""
    prefill = w.prompts_per_rollout / w.ranks * w.prompt_length * 2 * w.shape.trunk_linear
    waves = math.ceil(w.local_samples / w.engine_sequences)
    rows = w.local_samples / waves
    alive = alive_shares(w.mean_fill)
    decode = 0.0
    for i, share in enumerate(alive):
        length = w.prompt_length + w.completion_length * (i + 0.5) / len(alive)
        step = decode_seconds(w, hardware, efficiency, max(1.0, rows * share), length) + efficiency.token_overhead
        decode += step * w.completion_length / len(alive)
    return efficiency.generate_factor * (prefill / rate(w, hardware, efficiency) + waves * decode)
