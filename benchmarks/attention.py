"""Time of a policy's attention on CPUs in bfloat16: torch's SDPA against matrix products and softmaxes of blocks.

Claim: up to 2,048 keys the products are faster for every shape, keep no more memory between forward and backward, and
speed up the update of a small model at short lengths by at least 8 %. The script measures forward and backward of one
layer's attention, as transformers calls both, and then of whole micro-batches of a random SmolLM2-135M, alternating.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lightning_grpo.configure.activations import saved_bytes
from lightning_grpo.policy.attention import NAME, train_attention
from lightning_grpo.policy.logprobs import completion_logprobs

SHAPE = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
# Rows, queries, keys.
LAYERS = [
    (32, 20, 60),
    (8, 64, 64),
    (8, 48, 160),
    (8, 128, 128),
    (8, 128, 256),
    (8, 256, 256),
    (4, 512, 512),
    (2, 1024, 1024),
    (1, 2048, 2048),
]
# Prompts, completions of each, tokens of both: the quickstart's, and those of step.py with its own and longer ones.
UPDATES = [(4, 8, 40, 20), (1, 8, 110, 48), (1, 8, 110, 128)]
GOAL = 1.08


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"fail if a layer is slower, or the speedup of the first update is below {GOAL}",
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def in_turn(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each after one warm-up round; the order rotates between rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in list(runs)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def layer(rows: int, queries: int, keys: int, padded: bool, rounds: int) -> dict:
    """One attention of 9 heads on 3 key heads of size 64, both passes; ``padded`` gives a mask for each row."""
    g = torch.Generator().manual_seed(0)
    module = nn.Module()
    module.num_key_value_groups = 3
    query, key, value = (
        torch.randn(rows, t, h, 64, generator=g).bfloat16().transpose(1, 2).requires_grad_()
        for t, h in ((queries, 9), (keys, 3), (keys, 3))
    )
    start = torch.randint(0, keys // 4, (rows, 1, 1, 1), generator=g)
    mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries) & (torch.arange(keys) >= start)
    mask = mask if padded else None
    grad = torch.randn(rows, queries, 9, 64, generator=g).bfloat16()
    functions = {"sdpa": sdpa_attention_forward, "products": train_attention}

    def both_passes(function: Callable) -> None:
        out, _ = function(module, query, key, value, mask, scaling=0.125)
        torch.autograd.grad(out, (query, key, value), grad)

    found = in_turn({name: lambda f=f: both_passes(f) for name, f in functions.items()}, rounds)
    for name, function in functions.items():
        with saved_bytes({mask.untyped_storage()._cdata} if padded else set()) as saved:
            function(module, query, key, value, mask, scaling=0.125)
        found[f"{name} kept"] = sum(saved.values())
    return found


def update(model: nn.Module, prompts: int, of: int, P: int, T: int, rounds: int) -> dict[str, float]:
    """Forward and backward of one micro-batch with padding on both sides, under autocast."""
    g = torch.Generator().manual_seed(0)
    N = prompts * of
    start = torch.randint(0, P // 4, (prompts, 1), generator=g).repeat_interleave(of, 0)
    stop = torch.randint(T // 2, T + 1, (N, 1), generator=g)
    batch = {
        "prompt_ids": torch.randint(SHAPE["vocab_size"], (prompts, P), generator=g).repeat_interleave(of, 0),
        "prompt_mask": torch.arange(P) >= start,
        "completion_ids": torch.randint(SHAPE["vocab_size"], (N, T), generator=g),
        "completion_mask": torch.arange(T) < stop,
    }

    def both_passes(attention: str) -> None:
        model.set_attn_implementation(attention)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            logprobs, _ = completion_logprobs(model, **batch)
        logprobs.mean().backward()

    return in_turn({"sdpa": lambda: both_passes("sdpa"), "products": lambda: both_passes(NAME)}, rounds)


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    rows, bad = [], []
    print(f"one layer, bfloat16, {args.threads} threads     ms: sdpa  products   ratio     MB kept: sdpa  products")
    for sizes in LAYERS:
        for padded in (True, False) if sizes[1] == sizes[2] else (True,):
            row = layer(*sizes, padded, 5 if args.quick else 15)
            ratio = row["sdpa"] / row["products"]
            label = f"{sizes[0]} rows, {sizes[1]} of {sizes[2]} keys, {'padded' if padded else 'causal'}"
            kept = [row[f"{name} kept"] / 1e6 for name in ("sdpa", "products")]
            times = f"{1e3 * row['sdpa']:8.2f}  {1e3 * row['products']:8.2f}  {ratio:6.2f}"
            print(f"{label:40}{times}  {kept[0]:18.2f}  {kept[1]:8.2f}", flush=True)
            rows.append({"layer": sizes, "padded": padded, "ratio": ratio, **row})
            bad += [label] if ratio < 1 or kept[1] > kept[0] else []
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).train()
    print("micro-batch, forward and backward         s: sdpa  products   ratio")
    for sizes in UPDATES:
        row = update(model, *sizes, 3 if args.quick else 9)
        ratio = row["sdpa"] / row["products"]
        label = f"{sizes[0]} x {sizes[1]} rows of {sizes[2]} + {sizes[3]} tokens"
        print(f"{label:40}{row['sdpa']:8.2f}  {row['products']:8.2f}  {ratio:6.2f}", flush=True)
        rows.append({"update": sizes, "ratio": ratio, **row})
    bad += ["update"] if next(row["ratio"] for row in rows if "update" in row) < GOAL else []
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    layers, updates = ([row["ratio"] for row in rows if kind in row] for kind in ("layer", "update"))
    print(
        f"attention: SDPA takes {min(layers):.2f} to {max(layers):.2f} times the products' time, an update with it "
        f"{min(updates):.2f} to {max(updates):.2f} times; goals missed: {', '.join(bad) or 'none'}"
    )
    if args.check and bad:
        sys.exit(1)


if __name__ == "__main__":
    main()
