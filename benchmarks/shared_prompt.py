"""Time and memory of an update whose groups share their prompt, against completions with a prompt each.

Claim: sharing gains at least 0.8 × the ratio of floating-point operations, and never costs more than 2 %. The script
measures forward and backward of one group of a random model of SmolLM2-135M's shape, both sides alternating, in CPU
seconds; peaks of memory are those of a process per side. With ``--checkpointing`` activations are recomputed. A last
table divides a group into passes (`micro_batch_tokens`), whose prompt is computed once for all of them.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from packing import SHAPE
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_grpo.configure.measure import reset_peak, resident
from lightning_grpo.policy.attention import NAME
from lightning_grpo.rollout import Completion, Rollout
from lightning_grpo.training.scorer import Scorer
from lightning_grpo.training.work import model_flops, work_of

LENGTHS = [(256, 64), (512, 128), (128, 256), (1024, 128)]
"""Tokens of a prompt and of each completion."""
GROUPS = (4, 8, 16)
GOAL, FLOOR = 0.8, 0.98


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="4 layers instead of 30, and one measured round")
    parser.add_argument("--check", action="store_true", help=f"fail below {GOAL} × the FLOP ratio, or below {FLOOR}")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the products")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    return parser.parse_args()


def policy(layers: int, checkpointing: bool) -> nn.Module:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE | {"num_hidden_layers": layers})).train()
    model.set_attn_implementation(NAME)
    if checkpointing:
        model.gradient_checkpointing_enable()
    return model


def group(P: int, T: int, G: int) -> Rollout:
    """G completions of T random tokens, after one prompt of P."""
    g = torch.Generator().manual_seed(0)
    prompt, *completions = (torch.randint(SHAPE["vocab_size"], (n,), generator=g).tolist() for n in (P, *[T] * G))
    return Rollout.collate(
        [prompt],
        [[Completion(token_ids=ids, logprobs=[-1.0] * T, finish_reason="stop", versions=[0] * T)
          for ids in completions]],
        pad_id=0,
    )  # fmt: skip


def update(model: nn.Module, rows: Rollout, dtype: str, share_prompt: bool, limit: int | None = None) -> None:
    """Forward and backward of all passes."""
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")), global_rank=0)
    scorer = Scorer(temperature=1.0, share_prompt=share_prompt, seed=0, limit=limit)
    model.zero_grad()
    coefficient = torch.full(rows.completion_mask.shape, 1 / rows.completion_mask.sum())
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16", cache_enabled=False):
        sequences = scorer.divide(model, rows, trainer)
        for part, (logprobs, _) in scorer.passes(model, rows, sequences, trainer, 0, 0, coefficient=coefficient):
            loss = (logprobs * coefficient[part]).sum()
            with torch.autocast("cpu", enabled=False):
                loss.backward()


def in_turn(sides: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Least CPU seconds of each after a warm-up; the order alternates."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name in list(sides)[:: 1 if number % 2 else -1]:
            start = time.process_time()
            sides[name]()
            seconds[name].append(time.process_time() - start)
    return {name: min(times[1:]) for name, times in seconds.items()}


def peak(args: argparse.Namespace, **work) -> float:
    """GB that an update takes above the weights and gradients, in a process of its own."""
    command = [sys.executable, __file__, "--worker", json.dumps(work), "--dtype", args.dtype]
    command += ["--threads", str(args.threads)] + ["--checkpointing"] * args.checkpointing
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.splitlines()[-1])


def worker(args: argparse.Namespace) -> None:
    P, T, G = args.worker["sizes"]
    model = policy(args.worker["layers"], args.checkpointing)
    run = lambda rows: update(model, rows, args.dtype, args.worker["share_prompt"], args.worker["limit"])
    run(group(8, 8, 2))  # whatever is allocated once
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    before = resident("VmRSS")
    reset_peak()
    run(group(P, T, G))
    print((resident("VmHWM") - before) / 1e9)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.worker:
        return worker(args)
    layers, rounds = (4, 1) if args.quick else (30, 3)
    model = policy(layers, args.checkpointing)
    print(f"{layers} layers, {args.dtype}, {args.threads} threads, checkpointing: {args.checkpointing}")
    print("prompt completion  G   CPU s: own  shared   ratio  of FLOPs  share     GB: own  shared")
    found, bad = [], []
    for P, T in LENGTHS:
        for G in GROUPS:
            rows = group(P, T, G)
            sides = {
                name: lambda rows=rows, share=share: update(model, rows, args.dtype, share)
                for name, share in (("own", False), ("shared", True))
            }
            row = in_turn(sides, rounds)
            flops = [model_flops(model, work_of(rows, [range(G)], share)) for share in (False, True)]
            row |= {"sizes": (P, T, G), "ratio": row["own"] / row["shared"], "flops": flops[0] / flops[1]}
            for name, share in (("own", False), ("shared", True)):
                row[f"{name} GB"] = peak(args, sizes=(P, T, G), layers=layers, share_prompt=share, limit=None)
            share = row["ratio"] / row["flops"]
            print(
                f"{P:6}{T:11}{G:4}{row['own']:12.2f}{row['shared']:8.2f}{row['ratio']:8.2f}{row['flops']:10.2f}"
                f"{share:7.2f}{row['own GB']:12.2f}{row['shared GB']:8.2f}",
                flush=True,
            )
            found.append(row)
            bad += [f"{P}/{T} × {G}"] if share < GOAL or row["ratio"] < FLOOR else []
    print("one group in passes      limit   CPU s   ratio to undivided      GB")
    P, T, G = 512, 128, 16
    rows = group(P, T, G)
    limits = {"undivided": None, "passes": P + T * G // 4}
    row = in_turn({name: lambda n=n: update(model, rows, args.dtype, True, n) for name, n in limits.items()}, rounds)
    for name, limit in limits.items():
        row[f"{name} GB"] = peak(args, sizes=(P, T, G), layers=layers, share_prompt=True, limit=limit)
        ratio = row[name] / row["undivided"]
        print(f"{P:6}{T:6}{G:4}{limit or '–':>14}{row[name]:8.2f}{ratio:12.2f}{row[f'{name} GB']:20.2f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps([*found, row], indent=1))
    shares = [row["ratio"] / row["flops"] for row in found]
    ratios, memory = [row["ratio"] for row in found], [row["own GB"] / row["shared GB"] for row in found]
    print(
        f"shared prompts: {min(ratios):.2f} to {max(ratios):.2f} times as fast, {min(shares):.2f} to {max(shares):.2f} "
        f"of the FLOP ratio, {min(memory):.2f} to {max(memory):.2f} times less memory; goals missed: "
        f"{', '.join(bad) or 'none'}"
    )
    if args.check and bad:
        sys.exit(1)


if __name__ == "__main__":
    main()
