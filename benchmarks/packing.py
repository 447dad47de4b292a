"""Time and memory of an update on CPUs: a micro-batch as one row without padding, against rows with padding.

Claim: on completions of mixed lengths the packed row is faster than padded rows that share prompts by their key-value
cache, and at least twice as fast as rows that share nothing, with less memory kept between forward and backward. The
script measures forward and backward of micro-batches of a random SmolLM2-135M, alternating. Lengths are those of a
recorded run with ``--run``, or drawn: prompts uniformly, completions exponentially and cut off.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_grpo.configure.activations import saved_bytes
from lightning_grpo.policy.attention import NAME
from lightning_grpo.policy.logprobs import completion_logprobs
from lightning_grpo.policy.packing import packed_length

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
# Groups, completions of each, longest prompt and completion; the first is the quickstart's.
BATCHES = [(4, 8, 60, 20), (1, 8, 110, 128), (2, 8, 256, 256), (2, 4, 512, 256)]
# Attention, and whether prompts are shared.
WAYS = {"packed": (NAME, True), "cached": ("sdpa", True), "padded": ("sdpa", False)}
GOALS = {"cached": 1.0, "padded": 2.0}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, and the first two micro-batches")
    parser.add_argument("--check", action="store_true", help="fail if a goal is missed")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--run", type=Path, help="take the lengths from the samples of this run's folder")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], help="one of both")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def drawn(groups: int, of: int, prompt: int, completion: int) -> tuple[list[int], list[int]]:
    """Lengths of prompts and completions."""
    g = torch.Generator().manual_seed(0)
    prompts = torch.randint(prompt // 2, prompt + 1, (groups,), generator=g)
    completions = torch.empty(groups * of).exponential_(2 / completion, generator=g).long().clamp(1, completion)
    return prompts.tolist(), completions.tolist()


def recorded(run: Path, groups: int = 4) -> tuple[int, list[int], list[int]]:
    """Completions of each prompt, and the lengths in the first groups of a run."""
    import pyarrow.parquet as pq

    files = sorted(run.rglob("samples/*.parquet"))
    table = pq.read_table(files[0], columns=["step", "group", "prompt_ids", "completion_ids"]).to_pylist()
    rows: dict[tuple, list[dict]] = {}
    for row in table:
        rows.setdefault((row["step"], row["group"]), []).append(row)
    found = list(rows.values())[:groups]
    completions = [len(row["completion_ids"]) for group in found for row in group]
    return len(found[0]), [len(group[0]["prompt_ids"]) for group in found], completions


def micro_batch(prompts: list[int], completions: list[int], of: int) -> dict[str, Tensor]:
    """Random tokens of these lengths, with padding to the longest."""
    g = torch.Generator().manual_seed(0)
    P, T, N = max(prompts), max(completions), len(completions)
    begins = (P - torch.tensor(prompts)).repeat_interleave(of)[:, None]
    return {
        "prompt_ids": torch.randint(SHAPE["vocab_size"], (len(prompts), P), generator=g).repeat_interleave(of, 0),
        "prompt_mask": torch.arange(P) >= begins,
        "completion_ids": torch.randint(SHAPE["vocab_size"], (N, T), generator=g),
        "completion_mask": torch.arange(T) < torch.tensor(completions)[:, None],
    }


def in_turn(runs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each after one warm-up round; the order alternates between rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name in list(runs)[:: 1 if number % 2 else -1]:
            start = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def measure(model: LlamaForCausalLM, batch: dict[str, Tensor], low: bool, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of forward and backward, and bytes kept between them, of each way."""

    def forward(way: str) -> Tensor:
        attention, share_prompt = WAYS[way]
        model.set_attn_implementation(attention)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            return completion_logprobs(model, **batch, share_prompt=share_prompt)[0].mean()

    kept = {}
    for way in WAYS:
        with saved_bytes({p.untyped_storage()._cdata for p in model.parameters()}) as saved:
            forward(way)
        kept[way] = sum(saved.values())
    return {"s": in_turn({way: lambda way=way: forward(way).backward() for way in WAYS}, rounds), "kept": kept}


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE)).train()
    if args.run:
        of, *lengths = recorded(args.run)
        batches = [(of, *lengths)]
    else:
        batches = [(sizes[1], *drawn(*sizes)) for sizes in BATCHES[: 2 if args.quick else None]]
    rows = []
    print(f"{args.threads} threads; forward and backward, s, and MB kept between them: packed, cached, padded")
    for precision in [args.precision] if args.precision else ["float32", "bfloat16"]:
        for of, prompts, completions in batches:
            batch = micro_batch(prompts, completions, of)
            found = measure(model, batch, precision == "bfloat16", 2 if args.quick else 5)
            seconds, kept = found["s"], found["kept"]
            ratios = {way: seconds[way] / seconds["packed"] for way in GOALS}
            sizes = f"{len(prompts)} x {of} of {max(prompts)} + {max(completions)}"
            tokens = packed_length(prompts, completions)
            times, memory = (
                " ".join(f"{x[way] / unit:8.2f}" for way in WAYS) for x, unit in ((seconds, 1), (kept, 1e6))
            )
            print(f"{precision} {sizes:24} {tokens:6} tokens {times}  {memory}", flush=True)
            rows.append({"precision": precision, "sizes": sizes, "tokens": tokens, **found, "ratios": ratios})
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))
    missed = [f"{row['precision']} {row['sizes']}" for row in rows for w in GOALS if row["ratios"][w] < GOALS[w]]
    spans = [
        f"{way} {min(r['ratios'][way] for r in rows):.2f} to {max(r['ratios'][way] for r in rows):.2f}" for way in GOALS
    ]
    print(f"packing: times the packed row's seconds: {', '.join(spans)}; goals missed: {', '.join(missed) or 'none'}")
    if args.check and missed:
        sys.exit(1)


if __name__ == "__main__":
    main()
