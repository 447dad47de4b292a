"""Measures time and memory of updates and of decoding with the planned shapes on this machine."""

import contextlib
import os
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lightning_grpo.configure.cost import Efficiency, decode_seconds
from lightning_grpo.configure.workload import Workload
from lightning_grpo.devices import Hardware
from lightning_grpo.policy.attention import NAME as ATTENTION
from lightning_grpo.policy.attention import attention_for
from lightning_grpo.policy.load import DTYPES, Policy, enable_gradient_checkpointing
from lightning_grpo.policy.logprobs import completion_logprobs
from lightning_grpo.policy.lora import with_adapters
from lightning_grpo.rollout import HFEngine, SampleRequest


@dataclass(frozen=True)
class Measured:
    """Measurements of one micro-batch on one rank."""

    micro_batch_seconds: float
    """Seconds of forward and backward."""
    optimizer_seconds: float
    """Seconds of clipping and one optimizer step."""
    peak_bytes: float
    """Peak of the update: of the allocator on a GPU, and the growth of resident memory on a CPU; NaN if the system does
    not report it."""


def random_policy(w: Workload, device: torch.device | str) -> Policy:
    """Return the model of ``w`` with random weights, in training mode."""
    with torch.device(device):
        attention = attention_for(w.shape.config, ATTENTION)
        model = AutoModelForCausalLM.from_config(w.shape.config, dtype=DTYPES[w.dtype], attn_implementation=attention)
    if lora := w.lora:
        model = with_adapters(model, lora)
    if w.gradient_checkpointing:
        enable_gradient_checkpointing(model)
    return model.train()


def autocast(w: Workload, device: str) -> AbstractContextManager:
    """Return a context that computes in the precision of ``w``."""
    return torch.autocast(device, dtype=DTYPES[w.compute_dtype]) if w.is_mixed else contextlib.nullcontext()


def random_batch(w: Workload, device: torch.device | str) -> dict[str, Any]:
    """Return one micro-batch of full length, in which the rows of a group have the same prompt."""
    rows = w.micro_batch_size
    prompts = torch.randint(w.shape.vocab, (ceil(rows / w.num_generations), w.prompt_length))
    prompt_ids = prompts.repeat_interleave(w.num_generations, 0)[:rows]
    completion_ids = torch.randint(w.shape.vocab, (rows, w.completion_length))
    batch = {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.ones_like(prompt_ids, dtype=torch.bool),
        "completion_ids": completion_ids,
        "completion_mask": torch.ones_like(completion_ids, dtype=torch.bool),
    }
    return {name: value.to(device) for name, value in batch.items()}


def sees_peaks() -> bool:
    """Return whether this system reports the peak of a process's resident memory."""
    return os.access("/proc/self/clear_refs", os.W_OK)


def resident(field: str = "VmRSS") -> float:
    """Return the bytes of resident memory of this process now, or (VmHWM) its peak since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return float(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    """Reset the peak of resident memory (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def measure_update(w: Workload, device: torch.device | str, steps: int = 2) -> Measured:
    """Measure forward, backward, clipping and optimizer step, ``steps`` times after one to warm up.

    Weights and tokens are random, since neither time nor memory depends on them. On a CPU the peak is the growth of the
    process; it is most accurate in a fresh process with `environment`, which returns freed memory at once.
    """
    device = torch.device(device)
    cuda = device.type == "cuda"
    wait = torch.cuda.synchronize if cuda else (lambda: None)
    watched = not cuda and sees_peaks()
    before = resident() if watched else 0.0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    model = random_policy(w, device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)
    reference = [random_policy(replace(w, gradient_checkpointing=False), device)] if w.needs_reference else []
    batch = random_batch(w, device)
    passes, updates = [], []
    for step in range(steps + 1):
        if step == 1 and watched:
            reset_peak()
        wait()
        start = time.perf_counter()
        with autocast(w, device.type):
            for frozen in reference:
                with torch.no_grad():
                    completion_logprobs(frozen, **batch, share_prompt=w.share_prompt)
            logprobs, _ = completion_logprobs(model, **batch, share_prompt=w.share_prompt)
            loss = -logprobs.mean()
        if w.accumulate_grad_batches == 1:
            optimizer.zero_grad()
        loss.backward()
        wait()
        passes.append(time.perf_counter() - start)
        start = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        wait()
        updates.append(time.perf_counter() - start)
    peak = resident("VmHWM") - before if watched else torch.cuda.max_memory_allocated() if cuda else float("nan")
    return Measured(min(passes[1:]), min(updates[1:]), peak)


def environment() -> dict[str, str]:
    """Return the environment for a fresh process whose resident memory follows its allocations."""
    return os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def measure_decoding(w: Workload, hardware: Hardware, efficiency: Efficiency, device: str, steps: int = 8) -> float:
    """Return the seconds per decoding step that reading weights and cache does not explain."""
    policy = random_policy(replace(w, gradient_checkpointing=False, lora_rank=0), device)
    context = partial(autocast, w, device)
    engine = HFEngine(policy, eos_token_ids=[], pad_id=0, max_num_seqs=w.engine_sequences, context=context)
    rows = min(w.engine_sequences, w.local_samples)
    groups = ceil(rows / w.num_generations)
    prompts = torch.randint(w.shape.vocab, (groups, w.prompt_length)).tolist()
    seeds = [list(range(w.num_generations)) for _ in prompts]

    def seconds(tokens: int) -> float:
        start = time.perf_counter()
        engine.generate(SampleRequest(prompts=prompts, seeds=seeds, max_tokens=tokens))
        return time.perf_counter() - start

    seconds(1)
    step = (seconds(1 + steps) - seconds(1)) / steps
    return max(0.0, step - decode_seconds(w, hardware, efficiency, rows, w.prompt_length))
