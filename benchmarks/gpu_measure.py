"""One measurement on one device: ``gpu_measure.py NAME DEVICE [--small]``. The last line of the output is JSON.

Times on a GPU are taken from events around several repetitions; host_ms is the time until the last launch returns. If
host_ms is close to ms, launches limit the speed.
"""

import argparse
import importlib.metadata
import json
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Rows = list[dict[str, Any]]


def timed(step: Callable[[], object], device: str, repeats: int = 3) -> dict[str, Any]:
    """Milliseconds and additional gigabytes per step."""
    step()
    if device == "cpu":
        start = time.perf_counter()
        step()
        return {"ms": 1e3 * (time.perf_counter() - start)}
    step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start = time.perf_counter()
    first.record()
    for _ in range(repeats):
        step()
    host = time.perf_counter() - start
    last.record()
    torch.cuda.synchronize()
    return {
        "ms": first.elapsed_time(last) / repeats,
        "host_ms": 1e3 * host / repeats,
        "peak_gb": (torch.cuda.max_memory_allocated() - before) / 1e9,
    }


def head_step(H: int, V: int, N: int, device: str, *, known: bool, frozen: bool = False, dtype=torch.bfloat16):
    """Log-probs of random tokens and the gradients of a loss over them, whose coefficients may be known before."""
    from lightning_grpo.kernels import linear_logprob

    g = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(N, H, generator=g, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(V, H, generator=g, device=device) * 2 / H**0.5).to(dtype).requires_grad_(not frozen)
    targets = torch.randint(V, (N,), generator=g, device=device)
    c = torch.randn(N, generator=g, device=device) / N

    def step() -> None:
        hidden.grad = weight.grad = None
        logprobs, _ = linear_logprob(hidden, weight, targets, coefficient=c if known else None)
        (c * logprobs).sum().backward()

    return step


def model(device: str, small: bool, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Random weights in the shape of Qwen2.5-0.5B."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    from lightning_grpo.policy.attention import NAME

    sizes = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    if small:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(
        **sizes, num_key_value_heads=2, vocab_size=1000 if small else 151_936, tie_word_embeddings=True
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=NAME)


# ── What is measured ──────────────────────────────────────────────────────────────────────────────────────────────


def versions(device: str, small: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
    found["cores"] = os.cpu_count()
    for package in ("torch", "triton", "transformers", "lightning", "trl", "liger_kernel", "vllm"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    import lightning_grpo  # noqa: F401

    return found


def launches(device: str, small: bool) -> Rows:
    """Driver calls and time of one step of the head."""
    from torch.profiler import ProfilerActivity, profile

    H, V, N = (64, 4096, 300) if small else (1536, 151_936, 4096)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    rows = []
    for name, tokens, options in (
        ("any loss", N, {"known": False}),
        # More than the gradients that are kept, so that the coefficients are used.
        ("coefficients known", 4 * N, {"known": True}),
        ("frozen head", N, {"known": False, "frozen": True}),
    ):
        step = head_step(H, V, tokens, device, **options)
        row = {"head": name, "H": H, "V": V, "N": tokens} | timed(step, device)
        with profile(activities=activities) as profiler:
            step()
            if device == "cuda":
                torch.cuda.synchronize()
        events = profiler.key_averages()
        row["launches"] = sum(e.count for e in events if "LaunchKernel" in e.key)
        # The last one is this function's own.
        row["synchronizations"] = sum(e.count for e in events if "Synchronize" in e.key) - (device == "cuda")
        row["operations"] = sum(e.count for e in events if e.key.startswith("aten::"))
        heaviest = sorted(events, key=lambda e: -(e.self_device_time_total or e.self_cpu_time_total))[:8]
        row["heaviest"] = [[e.key[:60], e.count, e.self_device_time_total / 1e3] for e in heaviest]
        rows.append(row)
    return rows


def micro_batches(device: str, small: bool) -> Rows:
    """Forward and backward of whole micro-batches under autocast: prompts shared or not, checkpointed or not."""
    from lightning_grpo.policy.logprobs import completion_logprobs

    policy = model(device, small).train()
    N, T = (4, 16) if small else (8, 512)
    rows = []
    for P in (8,) if small else (128, 1024):
        batch = random_batch(N, P, T, policy.config.vocab_size, device)
        c = torch.randn(N, T, device=device) / (N * T)
        for share, checkpointing in ((True, False), (False, False), (False, True)):
            policy.gradient_checkpointing_enable({"use_reentrant": False}) if checkpointing else (
                policy.gradient_checkpointing_disable()
            )

            def step(batch=batch, c=c, share=share) -> None:
                policy.zero_grad()
                with torch.autocast(device, torch.bfloat16):
                    logprobs, _ = completion_logprobs(policy, **batch, share_prompt=share, coefficient=c)
                (c * logprobs).sum().backward()

            row = {"rows": N, "prompt": P, "completion": T, "shared": share, "checkpointing": checkpointing}
            try:
                rows.append(row | timed(step, device, repeats=2))
            except torch.OutOfMemoryError as error:
                rows.append(row | {"error": str(error)[:100]})
    return rows


def random_batch(N: int, P: int, T: int, vocabulary: int, device: str) -> dict[str, Tensor]:
    """One prompt for all rows; completions of T/3 to T tokens."""
    g = torch.Generator().manual_seed(0)
    batch = {
        "prompt_ids": torch.randint(5, vocabulary, (1, P), generator=g).expand(N, P),
        "prompt_mask": torch.ones(N, P, dtype=torch.bool),
        "completion_ids": torch.randint(5, vocabulary, (N, T), generator=g),
        "completion_mask": torch.arange(T) < torch.linspace(T // 3, T, N).long()[:, None],
    }
    return {name: tensor.to(device) for name, tensor in batch.items()}


def sampling(device: str, small: bool) -> dict[str, Any]:
    """`HFEngine`: tokens per second, and the difference of its log-probs from those of a forward pass."""
    from lightning_grpo.rollout import HFEngine, SampleRequest

    engine = HFEngine(model(device, small, torch.bfloat16).eval(), eos_token_ids=[1], pad_id=0)
    prompt, seeds = [5, 6, 7] * 30, [[8 * i + j for j in range(8)] for i in range(4)]
    tokens = 8 if small else 64
    engine.generate(SampleRequest(prompts=[prompt] * 4, seeds=seeds, max_tokens=2))
    start = time.perf_counter()
    groups = engine.generate(SampleRequest(prompts=[prompt] * 4, seeds=seeds, max_tokens=tokens))
    seconds = time.perf_counter() - start
    sampled = [c for group in groups for c in group]
    scored = engine.logprobs([prompt + c.token_ids for c in sampled])
    gaps = torch.cat(
        [(s[len(prompt) - 1 :].cpu() - torch.tensor(c.logprobs)).abs() for s, c in zip(scored, sampled, strict=True)]
    )
    count = sum(len(c.token_ids) for c in sampled)
    return {"tokens_per_second": count / seconds, "mean_gap": gaps.mean().item(), "largest_gap": gaps.max().item()}


def memory_check(device: str, small: bool) -> dict[str, Any]:
    """Small problems with odd sizes, for a tool that checks every memory access."""
    from lightning_grpo.kernels import blocks

    problems = 0
    for kept in (0, 1 << 20):
        blocks.budget = lambda kept=kept, **_: blocks.Budget(block=1, kept=kept, chunk=1)
        for V in (1, 77, 2049, 50_257):
            for frozen in (False, True):
                for known in (False, True):
                    head_step(16, V, 9, device, known=known, frozen=frozen)()
                    problems += 1
    return {"problems": problems}


MEASUREMENTS = {f.__name__: f for f in (versions, launches, micro_batches, sampling, memory_check)}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=MEASUREMENTS)
    parser.add_argument("device", choices=["cpu", "cuda"])
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    print(json.dumps(MEASUREMENTS[args.name](args.device, args.small)))
