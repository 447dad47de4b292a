"""Time of a verified weight sync relative to a memcpy of the same bytes and to a training step, measured in one run.

Claims: a sync with an in-process engine takes at most 2 times as long as a memcpy of the same bytes, and verification
(fingerprints of every tensor and check sequences, on both sides) takes less than 1 % of a step of the quickstart. All
weights change between two syncs. Also measured: syncs without changed weights; vLLM's own loaders, which are used for
models of unknown layout; and unpacked matrices, which sync faster and sample slower, with a rollout of the quickstart's
size for both. Without --quick, an engine in a server process is measured too.

The default model is models/SmolLM2-135M-Instruct. If it is missing, a random model of the same shape is used, and the
step is not measured.
"""

import argparse
import csv
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rollout import random_model
from torch import nn
from transformers import AutoModelForCausalLM

from lightning_grpo import cli
from lightning_grpo.rollout import (
    Engine,
    HFEngine,
    SampleRequest,
    ServerEngine,
    SyncedEngine,
    SyncReport,
    VLLMEngine,
    policy_weights,
    rollout_seeds,
)
from lightning_grpo.rollout.server.process import ServerProcess
from lightning_grpo.rollout.verify import WeightStream
from lightning_grpo.rollout.vllm import weights as vllm_weights

ROOT = Path(__file__).parent.parent
MODEL = ROOT / "models" / "SmolLM2-135M-Instruct"
MOST_COPIES, MOST_OF_A_STEP = 2.0, 0.01
SETTINGS = {
    "enforce_eager": True,
    "block_size": 32,
    "max_model_len": 256,
    "max_num_seqs": 64,
    "kv_cache_memory_bytes": 1 << 28,
    "dtype": "bfloat16",
}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="measure only the in-process engine")
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"fail if a sync exceeds {MOST_COPIES} × a memcpy, or verification {MOST_OF_A_STEP:.0%} of a step",
    )
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--model", type=Path, help="a checkpoint's folder with its tokenizer")
    return parser.parse_args()


def main() -> None:
    args = parse()
    figures: dict[str, float] = {"threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory() as folder:
        named = args.model or (MODEL if MODEL.exists() else None)
        path = str(named or random_model(f"{folder}/model"))
        policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        figures |= measure_floor(policy)
        engine = VLLMEngine(path, eos_token_ids=[], log_file=Path(folder) / "vllm.log", engine_args=SETTINGS)
        figures |= measure_in_process(engine, policy)
        engine.close()
        if not args.quick:
            server = ServerProcess(path, engine_args=SETTINGS, log_file=Path(folder) / "server.log")
            remote = ServerEngine([server.url], eos_token_ids=[], api_key=server.api_key)
            figures |= measure_syncs("server process", remote, policy)
            remote.close()
            server.close()
        if named is not None:
            figures |= measure_step(path, folder, fingerprints=2 * figures["fingerprints of one side, s"])
    copies = figures["in process: sync, s"] / figures["memcpy, s"]
    figures["in process: sync / memcpy"] = copies
    summary = f"weight_sync: {copies:.1f} × a memcpy of the same bytes (goal ≤ {MOST_COPIES:g})"
    share = 0.0
    if named is not None:
        share = figures["quickstart: verification / step"]
        summary += f", verification {share:.2%} of a step (goal < {MOST_OF_A_STEP:.0%})"
    for name, value in figures.items():
        print(f"{name:44} {value:10.4f}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    print(summary)
    if args.check and (copies > MOST_COPIES or share >= MOST_OF_A_STEP):
        sys.exit(1)


def measure_floor(policy: nn.Module) -> dict[str, float]:
    weights = list(policy_weights(policy))
    targets = [torch.empty_like(w) for _, w in weights]

    def copy() -> None:
        for target, (_, weight) in zip(targets, weights, strict=True):
            target.copy_(weight)

    def fingerprints() -> None:
        for _ in WeightStream(iter(weights)):
            pass

    return {
        "weights, GB": sum(w.numel() * w.element_size() for _, w in weights) / 1e9,
        "memcpy, s": median_seconds(copy),
        "fingerprints of one side, s": median_seconds(fingerprints),
    }


def measure_in_process(engine: VLLMEngine, policy: nn.Module) -> dict[str, float]:
    synced = synced_engine(engine, policy)
    figures = measure_syncs("in process", engine, policy)
    figures["in process, nothing moved: sync, s"] = median_of([synced.sync() for _ in range(6)][1:])
    known = vllm_weights._are_complete
    vllm_weights._are_complete = lambda places, model: False
    figures["in process, vLLM's loaders: sync, s"] = median_of(moving_syncs(synced, policy))
    vllm_weights._are_complete = known
    synced.sync()

    layers = [m for m in engine._worker.get_model().modules() if hasattr(m, "cpu_linear") and not m.weight.numel()]
    packed = [(layer.weight, layer.cpu_linear) for layer in layers]
    plain = [
        (nn.Parameter(torch.empty(layer.output_size, layer.input_size, dtype=engine.dtype), requires_grad=False),
         nn.functional.linear)
        for layer in layers
    ]  # fmt: skip
    layouts = {"packed": packed, "unpacked": plain}
    sync: dict[str, list[float]] = {name: [] for name in layouts}
    sample: dict[str, list[float]] = {name: [] for name in layouts}
    generator = torch.Generator().manual_seed(0)
    for number in range(7):
        prompts = torch.randint(policy.config.vocab_size, (8, 45), generator=generator).tolist()
        seeds = [[rollout_seeds(0, number, i, g) for g in range(8)] for i in range(8)]
        for name in list(layouts)[:: 1 if number % 2 else -1]:
            for layer, (weight, multiply) in zip(layers, layouts[name], strict=True):
                layer.weight, layer.cpu_linear = weight, multiply
            move(policy)
            sync[name].append(synced.sync().seconds)
            start = time.perf_counter()
            engine.generate(SampleRequest(prompts=prompts, seeds=seeds, max_tokens=14))
            sample[name].append(time.perf_counter() - start)
            if name == "packed":
                layouts[name] = [(layer.weight, layer.cpu_linear) for layer in layers]
    for name in layouts:
        figures[f"{name}: sync, s"] = statistics.median(sync[name][1:])
        figures[f"{name}: 64 completions of 14 tokens, s"] = statistics.median(sample[name][1:])
    figures["sync and rollout, unpacked / packed"] = statistics.median(
        (sync["unpacked"][i] + sample["unpacked"][i]) / (sync["packed"][i] + sample["packed"][i]) for i in range(1, 7)
    )
    return figures


def measure_syncs(name: str, engine: Engine, policy: nn.Module) -> dict[str, float]:
    synced = synced_engine(engine, policy)
    first = synced.sync()
    reports = moving_syncs(synced, policy)
    assert all(report.compared == report.tensors == len(report.moved) for report in reports)
    seconds = median_of(reports)
    return {
        f"{name}: sync, s": seconds,
        f"{name}: sync, GB/s": first.bytes / 1e9 / seconds,
        f"{name}: first check sequences, s": first.verification_seconds,
        f"{name}: check sequences, s": statistics.median(report.verification_seconds for report in reports),
        f"{name}: check sequences mean |Δ|": first.mismatch.mean,
        f"{name}: check sequences max |Δ|": first.mismatch.max,
    }


def measure_step(path: str, folder: str, *, fingerprints: float) -> dict[str, float]:
    """Steps of the quickstart, without its validation; the first one warms up. `fingerprints` are part of a sync."""
    reports: list[SyncReport] = []
    sync = SyncedEngine.sync

    def recording(self: SyncedEngine, **kwargs: bool) -> SyncReport | None:
        report = sync(self, **kwargs)
        if report is not None:
            reports.append(report)
        return report

    SyncedEngine.sync = recording
    cli.main([
        "fit", "--config", str(ROOT / "configs" / "quickstart.yaml"), "--model.model", path, "--trainer.max_steps", "6",
        "--trainer.num_sanity_val_steps", "0", "--trainer.default_root_dir", folder, "--rollout", "VLLMRollout",
    ])  # fmt: skip
    SyncedEngine.sync = sync
    with (Path(folder) / "logs" / "version_0" / "metrics.csv").open() as file:
        steps = [float(row["step_time"]) for row in csv.DictReader(file) if row["step_time"]]
    step = statistics.median(steps[1:])
    verification = statistics.median(report.verification_seconds for report in reports[1:])
    return {
        "quickstart: step, s": step,
        "quickstart: sync, s": median_of(reports[1:]),
        "quickstart: check sequences, s": verification,
        "quickstart: fingerprints on both sides, s": fingerprints,
        "quickstart: verification / step": (verification + fingerprints) / step,
    }


def synced_engine(engine: Engine, policy: nn.Module) -> SyncedEngine:
    """An engine that receives all weights at every sync, since the policy's version always changes."""
    reference = HFEngine(policy, eos_token_ids=[], pad_id=0)
    versions = itertools.count()
    return SyncedEngine(
        engine,
        version=lambda: next(versions),
        weights=lambda: policy_weights(policy),
        score=reference.logprobs,
        vocab_size=policy.config.vocab_size,
        dtype=torch.bfloat16,
    )


def move(policy: nn.Module) -> None:
    """Flip the last bit of every weight, so that all change and none grows over the rounds."""
    for parameter in policy.parameters():
        parameter.data.view(torch.int16).bitwise_xor_(1)


def moving_syncs(synced: SyncedEngine, policy: nn.Module, count: int = 7) -> list[SyncReport]:
    """Return the reports of all but the first of `count` syncs, with changed weights before each."""
    reports = []
    for _ in range(count):
        move(policy)
        reports.append(synced.sync())
    return reports[1:]


def median_of(reports: list[SyncReport]) -> float:
    return statistics.median(report.seconds for report in reports)


def median_seconds(action: Callable[[], None], repeats: int = 7) -> float:
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


if __name__ == "__main__":
    main()
