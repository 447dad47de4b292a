"""The start-up summary of `fit`: the batch, predicted memory and time, and the error for runs that cannot fit."""

import time
from collections.abc import Collection
from importlib.util import find_spec
from typing import Any

from lightning_grpo.configure.cost import Cost, Efficiency, predict_cost
from lightning_grpo.configure.hardware import this_machine
from lightning_grpo.configure.memory import Memory, predict_memory
from lightning_grpo.configure.memory_savers import (
    MEMORY_SAVERS,
    USABLE,
    changes_to_fit,
    describe_change,
    fits,
    lowest_memory,
    usable,
)
from lightning_grpo.configure.workload import Workload
from lightning_grpo.devices import GiB, Hardware
from lightning_grpo.errors import UserError

REFUSE_ABOVE = 1.15
"""A run that needs more than this multiple of the device's memory is refused; above `USABLE` there is a warning."""


def identity_line(w: Workload) -> str:
    """Return prompts × G = micro-batch × accumulation × ranks × steps, with the numbers of one pass over a rollout."""
    steps = w.steps_per_rollout // w.num_iterations // w.accumulate_grad_batches
    line = (
        f"{w.prompts_per_rollout} prompts × {w.num_generations} generations = {w.samples} completions per rollout = "
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
    """Return the start-up summary, several lines.

    Args:
        w: the run. ``prompt_length`` should be that of the longest prompt in the data, not the longest allowed.
        hardware: device of one rank; None takes that of this machine.
        max_steps: optimizer steps of the whole run; −1 if there is no limit.
        efficiency: measured shares of the peak rates; None assumes them.
        refuse: raise if the run cannot fit; otherwise add a warning.

    Raises:
        UserError: the run cannot fit; the message has the three cheapest changes that fit.
    """
    hardware = hardware or this_machine()
    memory = predict_memory(w, hardware)
    if refuse and memory.peak > REFUSE_ABOVE * hardware.memory:
        raise UserError(refusal(w, memory, hardware))
    cost = predict_cost(w, hardware, efficiency)
    trained = f"LoRA rank {w.lora_rank}, {w.trained / 1e6:.1f}M of " if w.lora_rank else ""
    lines = [
        f"model   {w.shape.name}: {trained}{w.shape.params / 1e6:,.0f}M parameters, {w.precision}",
        f"batch   {identity_line(w)}",
        f"tokens  up to {w.samples * w.max_length:,} per rollout "
        f"({w.prompt_length} prompt + {w.completion_length} completion)",
        f"memory  {memory_line(memory, hardware)}",
        f"time    {time_line(w, cost, max_steps)}",
    ]
    if not fits(memory, hardware):
        lines.append(f"warning: this run may not fit\n{remedies(w, hardware)}")
    return "\n".join(lines)


def turns_line(environment: Any) -> str:
    """Name the environment, and the limits on its turns."""
    limit = f" of at most {environment.max_turn_tokens} tokens" if environment.max_turn_tokens else ""
    return f"turns   up to {environment.max_turns} per completion{limit}, in {type(environment).__name__}"


def memory_line(memory: Memory, hardware: Hardware) -> str:
    """Describe the peak by phase, and the memory of the device."""
    phases = ", ".join(f"{phase} {memory.total(phase) / GiB:.2f}" for phase in memory.phases)
    return (
        f"predicted peak {memory.peak / GiB:.2f} GiB in {memory.peak_phase} ({phases}) of "
        f"{hardware.memory / GiB:.1f} GiB, {hardware.name}"
    )


def time_line(w: Workload, cost: Cost, max_steps: int) -> str:
    """Describe the seconds per rollout, and the time when the run ends."""
    phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in cost.seconds.items() if seconds >= 0.05)
    updates = w.updates_per_rollout
    text = (
        f"about {cost.total:.1f} s per rollout of {updates} optimizer step{'s' * (updates > 1)} ({phases}; "
        f"efficiencies {cost.efficiency.source}, within ×{cost.efficiency.spread:g})"
    )
    if max_steps > 0:
        total = cost.total / updates * max_steps
        end = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + total))
        text += f"; {max_steps} steps take {duration(total)}, until about {end}"
    return text


def duration(seconds: float) -> str:
    """Return seconds in words: ``45 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def refusal(w: Workload, memory: Memory, hardware: Hardware, fixed: Collection[str] = ()) -> str:
    """Describe why a run cannot fit: the missing memory, what takes the most, and the cheapest changes that fit."""
    phase = memory.peak_phase
    parts = sorted(memory.phases[phase].items(), key=lambda part: -part[1])[:4]
    largest = ", ".join(f"{part} {size / GiB:.1f}" for part, size in parts)
    excess = memory.peak - USABLE * hardware.memory
    return (
        f"this run cannot fit {hardware.name}: {phase} needs {memory.peak / GiB:.1f} GiB of "
        f"{hardware.memory / GiB:.1f} GiB, {excess / GiB:.1f} GiB too much if {1 - USABLE:.0%} stay free "
        f"(largest: {largest} GiB)\n{remedies(w, hardware, fixed)}"
    )


def remedies(w: Workload, hardware: Hardware, fixed: Collection[str] = ()) -> str:
    """Describe the three cheapest sets of changes that make ``w`` fit, one per line, or the lowest possible peak."""
    changes = [describe_change(run, savers, hardware) for run, savers in changes_to_fit(w, hardware, fixed)]
    if changes:
        return "cheapest changes that fit:\n" + "\n".join(f"  {i}. {change}" for i, change in enumerate(changes, 1))
    lowest = predict_memory(lowest_memory(w, hardware, fixed), hardware)
    tried = ", ".join(saver.name for saver in usable(w, hardware, fixed)) or "none, since every option is fixed"
    text = (
        f"even with all changes that save memory ({tried}), {lowest.peak_phase} needs {lowest.peak / GiB:.1f} GiB of "
        f"{hardware.memory / GiB:.1f} GiB: use a smaller model, devices with more memory, or more devices"
    )
    missing = [saver for saver in MEMORY_SAVERS if saver.package and not find_spec(saver.package)]
    if missing and not (w.lora_rank or hardware.is_cpu):
        names = ", ".join(f"{saver.name} (pip install {saver.package})" for saver in missing)
        text += f". Not considered because it is not installed: {names}"
    return text
