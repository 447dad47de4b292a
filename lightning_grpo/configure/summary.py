"""What `fit` says before it starts: the batch in one line, predicted memory and time; and when it refuses to start."""

import time
from collections.abc import Collection
from importlib.util import find_spec

from lightning_grpo.configure.cost import Cost, Efficiency, predict_cost
from lightning_grpo.configure.devices import GiB, Hardware
from lightning_grpo.configure.hardware import this_machine
from lightning_grpo.configure.memory import Memory, predict_memory
from lightning_grpo.configure.memory_savers import HEADROOM, LEVERS, describe_way, fits, lowest, usable, ways_to_fit
from lightning_grpo.configure.workload import Workload
from lightning_grpo.errors import UserError
from lightning_grpo.training.batching import check_batch_arithmetic

REFUSE_ABOVE = 1.15
"""A run predicted to need more than this multiple of the machine's memory is refused; up to there, it is warned of."""


def identity_line(w: Workload) -> str:
    """prompts × G = micro-batch × accumulation × ranks × steps, with the numbers (one pass over a rollout)."""
    steps = w.steps_per_rollout // w.num_iterations // w.accumulate_grad_batches
    line = (
        f"{w.prompts_per_rollout} prompts × {w.num_generations} generations = {w.samples} completions a rollout = "
        f"{w.micro_batch_size} (micro-batch) × {w.accumulate_grad_batches} (accumulation) × {w.ranks} (ranks) × "
        f"{steps} (optimizer steps)"
    )
    return line if w.num_iterations == 1 else f"{line}, {w.num_iterations} passes"


def describe_run(
    w: Workload,
    hardware: Hardware | None = None,
    *,
    max_steps: int = -1,
    efficiency: Efficiency | None = None,
    refuse: bool = True,
) -> str:
    """The start-up summary, several lines.

    Args:
        w: the run. ``prompt_length`` should be that of the longest prompt there is, not the longest allowed.
        hardware: one rank's device; None takes what is in this machine.
        max_steps: optimizer steps of the whole run; −1 where it is open-ended.
        efficiency: measured shares of the peak rates; None assumes them.
        refuse: raise where the run cannot fit; otherwise only say so.

    Raises:
        ValueError: the batch's numbers don't divide, or the run cannot fit; then with the three cheapest ways out.
    """
    hardware = hardware or this_machine()
    check_batch_arithmetic(
        prompts_per_rollout=w.prompts_per_rollout,
        num_generations=w.num_generations,
        micro_batch_size=w.micro_batch_size,
        accumulate_grad_batches=w.accumulate_grad_batches,
        num_iterations=w.num_iterations,
        ranks=w.ranks,
    )
    memory = predict_memory(w, hardware)
    if refuse and memory.peak > REFUSE_ABOVE * hardware.memory:
        raise UserError(refusal(w, memory, hardware))
    cost = predict_cost(w, hardware, efficiency)
    kind = f"LoRA rank {w.lora_rank}, {w.trained / 1e6:.1f}M of " if w.lora_rank else ""
    lines = [
        f"model   {w.shape.name}: {kind}{w.shape.params / 1e6:,.0f}M parameters, {w.precision}",
        f"batch   {identity_line(w)}",
        f"tokens  up to {w.samples * (w.prompt_length + w.completion_length):,} a rollout "
        f"({w.prompt_length} prompt + {w.completion_length} completion)",
        f"memory  {memory_line(memory, hardware)}",
        f"time    {time_line(w, cost, max_steps)}",
    ]
    if not fits(memory, hardware):
        lines.append(f"warning: this may not fit\n{ways_out(w, hardware)}")
    return "\n".join(lines)


def memory_line(memory: Memory, hardware: Hardware) -> str:
    """Peak by phase, against what the device has."""
    phases = ", ".join(f"{phase} {memory.total(phase) / GiB:.2f}" for phase in memory.phases)
    return (
        f"peak {memory.peak / GiB:.2f} GiB predicted in {memory.peak_phase} ({phases}) of "
        f"{hardware.memory / GiB:.1f} GiB, {hardware.name}"
    )


def time_line(w: Workload, cost: Cost, max_steps: int) -> str:
    """Seconds of a rollout and of an optimizer step, and when the run ends."""
    phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in cost.seconds.items() if seconds >= 0.05)
    updates = w.updates_per_rollout
    step = cost.total / updates
    text = (
        f"about {cost.total:.1f} s a rollout of {updates} optimizer step{'s' * (updates > 1)} ({phases}; efficiencies "
        f"{cost.efficiency.source}, within ×{cost.efficiency.spread:g})"
    )
    if max_steps > 0:
        total = step * max_steps
        end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + total))
        text += f"; {max_steps} steps take {hours(total)}, until about {end}"
    return text


def hours(seconds: float) -> str:
    """Seconds in words: ``45 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def refusal(w: Workload, memory: Memory, hardware: Hardware, pins: Collection[str] = ()) -> str:
    """Why a run cannot fit: what is short, by how much, what takes it, and the three cheapest ways out."""
    phase = memory.peak_phase
    parts = sorted(memory.phases[phase].items(), key=lambda part: -part[1])[:4]
    largest = ", ".join(f"{part} {size / GiB:.1f}" for part, size in parts)
    short = memory.peak - HEADROOM * hardware.memory
    return (
        f"this run cannot fit {hardware.name}: {phase} needs {memory.peak / GiB:.1f} GiB of "
        f"{hardware.memory / GiB:.1f} GiB, {short / GiB:.1f} GiB too much with {1 - HEADROOM:.0%} left free "
        f"(largest: {largest} GiB)\n{ways_out(w, hardware, pins)}"
    )


def ways_out(w: Workload, hardware: Hardware, pins: Collection[str] = ()) -> str:
    """The three cheapest sets of changes that make ``w`` fit, one per line, or how far all of them together come."""
    ways = [describe_way(run, levers, hardware) for run, levers in ways_to_fit(w, hardware, pins)]
    if ways:
        return "the cheapest ways out:\n" + "\n".join(f"  {i}. {way}" for i, way in enumerate(ways, 1))
    least = predict_memory(lowest(w, hardware, pins), hardware)
    tried = ", ".join(lever.name for lever in usable(w, hardware, pins)) or "nothing, since every option is fixed"
    text = (
        f"even with everything changed that saves memory ({tried}), {least.peak_phase} needs {least.peak / GiB:.1f} "
        f"GiB of {hardware.memory / GiB:.1f} GiB: take a smaller model, more memory per device or more devices"
    )
    missing = [lever for lever in LEVERS if lever.package and not find_spec(lever.package) and not hardware.is_cpu]
    if missing and not w.lora_rank:
        names = ", ".join(f"{lever.name} (pip install {lever.package})" for lever in missing)
        text += f". Not tried, as it is not installed: {names}"
    return text
