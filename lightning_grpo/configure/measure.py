"""Two real updates at the planned shapes on this machine: what they take in time and memory."""

import contextlib
import os
import time
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from lightning_grpo.configure.cost import Efficiency, decode_seconds
from lightning_grpo.configure.devices import Hardware
from lightning_grpo.configure.workload import Workload
from lightning_grpo.policy.attention import NAME as ATTENTION
from lightning_grpo.policy.attention import attention_for
from lightning_grpo.policy.logprobs import completion_logprobs
from lightning_grpo.rollout import HFEngine, SampleRequest


@dataclass(frozen=True)
class Measured:
    """Of one micro-batch, on one rank."""

    micro_batch_seconds: float
    """Forward and backward."""
    optimizer_seconds: float
    """Clipping and one step."""
    peak_bytes: float
    """Most that the update held: on a GPU as its allocator counts, on a CPU by which the resident memory grew; NaN
    where the system doesn't tell."""


def random_policy(w: Workload, device: torch.device | str) -> nn.Module:
    """The model of ``w`` with random weights, ready to be trained."""
    with torch.device(device):
        config, dtype = w.shape.config, getattr(torch, w.dtype)
        attention = attention_for(config, ATTENTION)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    if w.lora_rank:
        targets = w.lora_targets if isinstance(w.lora_targets, str) else list(w.lora_targets)
        model = get_peft_model(model, LoraConfig(r=w.lora_rank, target_modules=targets, task_type="CAUSAL_LM"))
    model.train()
    if w.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        if w.lora_rank:
            model.enable_input_require_grads()
    return model


def random_batch(w: Workload, device: torch.device | str) -> dict[str, Tensor]:
    """One micro-batch of full length; rows of a group have the same prompt."""
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
    """Whether this system lets a process watch the peak of its own resident memory."""
    return os.access("/proc/self/clear_refs", os.W_OK)


def resident(field: str = "VmRSS") -> float:
    """Bytes of resident memory of this process now, or (VmHWM) at its peak since `reset_peak`."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return float(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}")


def reset_peak() -> None:
    """Let the peak of resident memory start again from here (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def measure_update(w: Workload, device: torch.device | str, steps: int = 2) -> Measured:
    """Forward, backward, clip and step, ``steps`` times after one to warm up.

    Weights and tokens are random: neither time nor memory depends on them. On a CPU the peak is that of the process
    above what it held before; it means most in a fresh process, with MALLOC_MMAP_THRESHOLD_=65536 in the environment,
    where freed memory returns to the system at once.
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
    low = torch.float16 if w.precision.startswith("16") else torch.bfloat16
    mixed = w.precision.endswith("mixed")
    passes, updates = [], []
    for step in range(steps + 1):
        if step == 1 and watched:
            reset_peak()
        wait()
        start = time.perf_counter()
        with torch.autocast(device.type, dtype=low) if mixed else contextlib.nullcontext():
            for frozen in reference:
                with torch.no_grad():
                    completion_logprobs(frozen, **batch, share_prompt=w.shares_prompt)
            logprobs, _ = completion_logprobs(model, **batch, share_prompt=w.shares_prompt)
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
    """Of a fresh process whose resident memory follows what it really holds."""
    return os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def measure_decoding(w: Workload, hardware: Hardware, efficiency: Efficiency, device: str, steps: int = 8) -> float:
    """Seconds of one decoding step beyond what reading weights and cache explains, with the planned number of rows."""
    policy = random_policy(replace(w, gradient_checkpointing=False, lora_rank=0), device)
    low = torch.float16 if w.precision.startswith("16") else torch.bfloat16
    mixed = w.precision.endswith("mixed")
    context = (lambda: torch.autocast(device, dtype=low)) if mixed else contextlib.nullcontext
    engine = HFEngine(policy, eos_token_ids=[], pad_id=0, max_num_seqs=w.engine_sequences, context=context)
    rows = min(w.engine_sequences, w.samples // w.ranks)
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
