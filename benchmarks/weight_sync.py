"""Seconds of a proved weight sync against a plain copy of the same bytes, in one run.

Claim: into an in-process engine the weights go in at most 2 times the seconds of a memcpy of the same bytes, and the
proof (fingerprints of every tensor on both sides, log-probs of the canary on both sides) costs less than 1 % of a step
of 30 s. Without --model a random model of SmolLM2-135M's shape is made. Without --quick a server process is measured
as well.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rollout import random_model
from transformers import AutoModelForCausalLM

from lightning_grpo.rollout import Engine, HFEngine, ServerEngine, SyncedEngine, VLLMEngine, policy_weights
from lightning_grpo.rollout.proof import WeightStream, canary_sequences
from lightning_grpo.rollout.server_process import ServerProcess

GOAL = 2.0
SETTINGS = {
    "enforce_eager": True,
    "block_size": 32,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 1 << 28,
    "dtype": "bfloat16",
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the in-process engine alone")
    parser.add_argument("--check", action="store_true", help=f"fail where a sync takes over {GOAL} × a memcpy")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--model", help="a checkpoint's folder; empty makes a random one")
    return parser.parse_args()


def main() -> None:
    args = parse()
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = args.model or random_model(f"{folder}/model")
        policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        weights = list(policy_weights(policy))
        size = sum(w.numel() * w.element_size() for _, w in weights)
        figures["weights, GB"] = size / 1e9
        targets = [torch.empty_like(w) for _, w in weights]

        def copy() -> None:
            for target, (_, weight) in zip(targets, weights, strict=True):
                target.copy_(weight)

        def fingerprints() -> None:
            for _ in WeightStream(iter(weights)):
                pass

        figures["memcpy, s"] = median_seconds(copy)
        figures["fingerprints of one side, s"] = median_seconds(fingerprints)
        engine = VLLMEngine(path, eos_token_ids=[0], log_file=Path(folder) / "vllm.log", engine_args=SETTINGS)
        figures |= measure("in process", engine, policy, size)
        engine.close()
        if not args.quick:
            server = ServerProcess(path, engine_args=SETTINGS, log_file=Path(folder) / "server.log")
            remote = ServerEngine([server.url], eos_token_ids=[0], api_key=server.api_key)
            figures |= measure("server process", remote, policy, size)
            remote.close()
            server.close()
    ratio = figures["in process: load, s"] / figures["memcpy, s"]
    figures["in process: load / memcpy"] = ratio
    for name, value in figures.items():
        print(f"{name:34} {value:10.4f}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    print(f"weight_sync: {ratio:.2f} × a memcpy of the same bytes (goal ≤ {GOAL})")
    if args.check and ratio > GOAL:
        sys.exit(1)


def measure(name: str, engine: Engine, policy: torch.nn.Module, size: int) -> dict[str, float]:
    reference = HFEngine(policy, eos_token_ids=[0], pad_id=0)
    synced = SyncedEngine(
        engine,
        version=lambda: 0,
        weights=lambda: policy_weights(policy),
        score=reference.logprobs,
        vocab_size=policy.config.vocab_size,
        dtypes=(torch.bfloat16,),
    )
    reports = [synced.sync(force=True) for _ in range(6)][1:]
    assert all(report.compared == report.tensors for report in reports)
    load = statistics.median(report.seconds for report in reports)
    canary = canary_sequences(policy.config.vocab_size, length=16)
    return {
        f"{name}: load, s": load,
        f"{name}: load, GB/s": size / 1e9 / load,
        f"{name}: canary, s": statistics.median(report.proof_seconds for report in reports),
        f"{name}: canary mean |log p|": torch.cat(reference.logprobs(canary)).abs().mean().item(),
        f"{name}: canary mean |Δ|": reports[-1].canary.mean,
        f"{name}: canary max |Δ|": reports[-1].canary.max,
    }


def median_seconds(action: Callable[[], None], repeats: int = 5) -> float:
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
