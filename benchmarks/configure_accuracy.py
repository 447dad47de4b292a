"""Compare the predictions of `lightning-grpo configure` with measurements.

(a) Peak memory and time of the update, predicted from the config alone against measured in a fresh process each, for
shapes of SmolLM2-135M and two smaller models with random weights; time after calibration on SmolLM2-135M at one other
shape for each precision, with whole weights and with adapters.
(b) Published observations of other projects, each with prediction and ratio.
(c) The share of groups whose rewards are all equal, predicted from pass rates against sampled.

    python benchmarks/configure_accuracy.py [--quick] [--check] [--json FILE]
"""

import argparse
import json
import random
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median

from transformers import LlamaConfig, Qwen3Config

from lightning_grpo.configure import (
    Efficiency,
    Hardware,
    ModelShape,
    Workload,
    calibration,
    find_gpu,
    find_model,
    predict_cost,
    predict_memory,
    zero_variance_share,
)
from lightning_grpo.configure.cost import decode_seconds, score_seconds, update_seconds
from lightning_grpo.configure.measure import Measured, environment, measure_update

MODELS = {
    "SmolLM2-135M": lambda: find_model("HuggingFaceTB/SmolLM2-135M-Instruct"),
    "Llama-37M": lambda: ModelShape.from_config(
        LlamaConfig(
            hidden_size=448,
            intermediate_size=1280,
            num_hidden_layers=10,
            num_attention_heads=7,
            num_key_value_heads=7,
            vocab_size=32768,
            tie_word_embeddings=True,
        )
    ),
    "Qwen3-18M": lambda: ModelShape.from_config(
        Qwen3Config(
            hidden_size=320,
            intermediate_size=960,
            num_hidden_layers=8,
            num_attention_heads=5,
            num_key_value_heads=5,
            head_dim=64,
            vocab_size=16384,
            tie_word_embeddings=False,
        )
    ),
}

BASE = {
    "num_generations": 8,
    "micro_batch_size": 4,
    "prompt_length": 64,
    "completion_length": 64,
    "precision": "bf16-mixed",
}
# (model, how it differs from BASE)
HELD_OUT = [
    ("SmolLM2-135M", {}),
    ("SmolLM2-135M", {"micro_batch_size": 8, "prompt_length": 128}),
    ("SmolLM2-135M", {"precision": "32-true", "micro_batch_size": 2, "completion_length": 192}),
    ("SmolLM2-135M", {"gradient_checkpointing": True, "micro_batch_size": 8, "completion_length": 96}),
    ("SmolLM2-135M", {"precision": "bf16-true", "micro_batch_size": 8}),
    ("SmolLM2-135M", {"lora_rank": 16, "dtype": "bfloat16", "micro_batch_size": 8, "completion_length": 96}),
    ("SmolLM2-135M", {"lora_rank": 8, "precision": "32-true", "gradient_checkpointing": True}),
    ("SmolLM2-135M", {"beta": 0.05, "completion_length": 128}),
    ("Llama-37M", {"micro_batch_size": 8, "completion_length": 128}),
    ("Llama-37M", {"precision": "32-true", "micro_batch_size": 16, "share_prompt": False}),
    ("Llama-37M", {"gradient_checkpointing": True, "micro_batch_size": 16, "completion_length": 192}),
    ("Llama-37M", {"beta": 0.05, "precision": "bf16-true", "micro_batch_size": 16, "completion_length": 128}),
    ("Qwen3-18M", {"micro_batch_size": 16, "completion_length": 192}),
    ("Qwen3-18M", {"precision": "32-true", "micro_batch_size": 16, "prompt_length": 256}),
    ("Qwen3-18M", {"lora_rank": 16, "dtype": "bfloat16", "micro_batch_size": 16, "completion_length": 256}),
]


def workload(model: str, changes: dict) -> Workload:
    """A run of one rollout in four micro-batches."""
    settings = BASE | changes
    rows = 4 * settings["micro_batch_size"]
    return Workload(
        shape=MODELS[model](),
        prompts_per_rollout=max(1, rows // settings["num_generations"]),
        accumulate_grad_batches=4,
        mean_fill=1.0,
        **settings,
    )


# Shapes that calibrate the time: one, not held out, for each precision with all weights and with adapters.
CALIBRATION = [
    {"micro_batch_size": 8, "prompt_length": 96, "completion_length": 80} | changes
    for changes in (
        {},
        {"precision": "32-true"},
        {"precision": "bf16-true"},
        {"lora_rank": 16, "dtype": "bfloat16"},
        {"lora_rank": 16, "precision": "32-true"},
    )
]


def measured(model: str, changes: dict, what: str) -> Measured:
    """In a fresh process: its ``memory``, with an allocator that returns what is freed at once, or its ``time``."""
    out = subprocess.run(
        [sys.executable, __file__, "--worker", json.dumps([model, changes])],
        env=environment() if what == "memory" else None,
        capture_output=True,
        text=True,
    )
    if out.returncode:
        raise RuntimeError(f"{model} {changes}: {out.stderr[-2000:]}")
    return Measured(**json.loads(out.stdout.splitlines()[-1]))


def worker(model: str, changes: dict) -> None:
    """Measure one shape and print it. Libraries load and compile on first use: that is not the model's memory."""
    warm_up = {"micro_batch_size": 2, "prompt_length": 8, "completion_length": 8}
    measure_update(workload("Qwen3-18M", changes | warm_up), "cpu", steps=1)
    print(json.dumps(asdict(measure_update(workload(model, changes), "cpu"))))


def calibrated(hardware: Hardware) -> dict[tuple, Efficiency]:
    """Efficiencies by kind of run, from the calibration shapes."""
    found = {}
    for changes in CALIBRATION:
        w = workload("SmolLM2-135M", changes)
        seen = measured("SmolLM2-135M", changes, "time")
        found[kind(changes)] = calibration.from_update(w, hardware, seen, Efficiency.assumed(hardware, "hf"))
    return found


def kind(changes: dict) -> tuple:
    return changes.get("precision", BASE["precision"]), "lora_rank" in changes


def held_out(quick: bool) -> list[dict]:
    """Peak memory and seconds of an update's micro-batch and optimizer step, predicted and measured, by shape."""
    hardware = find_gpu("cpu")
    efficiencies = calibrated(hardware)
    rows = []
    for model, changes in HELD_OUT[:: 3 if quick else 1]:
        w = workload(model, changes)
        parts = predict_memory(w, hardware).phases["update"]
        peak = sum(parts.values()) - parts["context"]
        seconds = update_seconds(w, hardware, efficiencies[kind(changes)])
        if w.needs_reference:
            seconds += score_seconds(w, hardware, efficiencies[kind(changes)])
        memory, clock = measured(model, changes, "memory"), measured(model, changes, "time")
        took = 4 * clock.micro_batch_seconds + clock.optimizer_seconds
        rows.append(
            {
                "shape": f"{model} {describe(changes)}",
                "peak_mib": [peak / 2**20, memory.peak_bytes / 2**20],
                "seconds": [seconds, took],
            }
        )
        print(
            f"{rows[-1]['shape']:<72} {peak / 2**20:7.0f} {memory.peak_bytes / 2**20:7.0f} MiB "
            f"{peak / memory.peak_bytes:5.2f}   {seconds:6.2f} {took:6.2f} s {seconds / took:5.2f}",
            flush=True,
        )
    return rows


def describe(changes: dict) -> str:
    short = {"micro_batch_size": "mb", "prompt_length": "P", "completion_length": "T", "gradient_checkpointing": "ckpt"}
    return " ".join(f"{short.get(name, name)}={value}" for name, value in changes.items()) or "as BASE"


def published() -> list[dict]:
    """Other projects' figures beside the formulas' answer, whether they meet or not."""
    rows: list[dict] = []

    def add(what: str, unit: str, predicted: float, observed: float, limit: float) -> None:
        rows.append({"what": what, "unit": unit, "predicted": predicted, "observed": observed, "limit": limit})

    llama, qwen7 = find_model("meta-llama/Llama-3.1-8B-Instruct"), find_model("Qwen/Qwen2.5-7B-Instruct")
    add("KV cache per token, Llama-3.1-8B", "bytes", llama.cache_bytes, 131_072, 1.01)
    add("KV cache per token, Qwen2.5-7B", "bytes", qwen7.cache_bytes, 57_344, 1.01)
    add("KV cache per token, Qwen3-0.6B", "bytes", find_model("Qwen3-0.6B").cache_bytes, 114_688, 1.01)
    add("Unsloth: KV cache of Llama-8B at 20k", "GB", 20_000 * llama.cache_bytes / 1e9, 2.5, 1.1)
    add("TRL + FA2: logits of 8 × 20k tokens, Llama-8B", "GiB", 8 * 20_480 * llama.vocab * 4 / 2**30, 78.3, 1.1)

    a100 = find_gpu("a100-40")
    alone = run_of(llama, engine_sequences=1, prompts_per_rollout=1, prompt_length=512, engine="vllm")
    fast = Efficiency.assumed(a100, "vllm")
    step = decode_seconds(alone, a100, fast, 1, 512) + fast.token_overhead
    add("decoding Llama-8B alone on an A100 40 GB", "tokens/s", 1 / step, 75, 1.5)
    h100 = find_gpu("h100")
    fast = Efficiency.assumed(h100, "vllm")
    many = decode_seconds(alone, h100, fast, 256, 768) + fast.token_overhead
    add("decoding Llama-8B on an H100, 256 at once", "tokens/s", 256 / many, 12_500, 1.5)

    # EasyR1's tables: 512 prompts × 5, Qwen2.5-7B (VL), responses to 2,048 tokens on geometry questions.
    easy = run_of(
        qwen7,
        ranks=8,
        shards=8,
        prompts_per_rollout=512,
        num_generations=5,
        micro_batch_size=4,
        precision="bf16-mixed",
        accumulate_grad_batches=80,
        prompt_length=1024,
        completion_length=2048,
        mean_fill=0.15,
        engine="vllm",
        beta=0.01,
        gradient_checkpointing=True,
    )
    add("EasyR1 7B-VL, 8×H100, 512×5 per step", "s", predict_cost(easy, h100).total, 145, 2.0)
    add("EasyR1 7B, 8×H100, 512×5 per step", "s", predict_cost(easy, h100).total, 120, 2.0)
    add("EasyR1 7B, 8×L20, 512×5 per step", "s", predict_cost(easy, find_gpu("l20")).total, 580, 2.0)
    one_b = run_of(
        find_model("meta-llama/Llama-3.2-1B-Instruct"),
        ranks=8,
        prompts_per_rollout=32,
        num_generations=16,
        micro_batch_size=4,
        accumulate_grad_batches=16,
        prompt_length=256,
        completion_length=512,
        engine="vllm",
    )
    add("NeMo-RL Llama-1B, 32×16, 8×H100: below", "s", predict_cost(one_b, h100).total, 10, 4.0)

    for length, observed in ((4096, 9), (8192, 12), (16384, 19), (32768, 32)):
        w = run_of(
            qwen7,
            prompt_length=16,
            completion_length=length - 16,
            lora_rank=8,
            dtype="bfloat16",
            micro_batch_size=1,
            gradient_checkpointing=True,
            engine="remote",
        )
        parts = predict_memory(w, a100).phases["update"]
        # their frozen weights have four bits, and their logits are whole
        quantised = sum(parts.values()) - 1.5 * qwen7.params
        add(f"LLaMA-Factory 7B QLoRA FA2, {length:,} tokens", "GB", quantised / 1e9, observed, 1.3)
    return rows


def run_of(shape: ModelShape, **changes) -> Workload:
    numbers = {
        "prompts_per_rollout": 16,
        "num_generations": 8,
        "micro_batch_size": 1,
        "prompt_length": 512,
        "completion_length": 1024,
        "engine": "vllm",
        "engine_cache": 8e9,
        "share_prompt": False,
    }
    return Workload(shape=shape, **numbers | changes)


def verdicts() -> list[dict]:
    """Runs reported to fit (or half of what is stated to be needed, which should not), against the model's answer.

    EasyR1 shards over its devices, shares an engine between two, and moves weights and optimizer to the host while it
    generates, so that its peak is the larger of engine and update.
    """
    qwen = {size: find_model(f"Qwen/Qwen2.5-{size}-Instruct") for size in ("1.5B", "3B", "7B")}
    a100, h100, gb = find_gpu("a100"), find_gpu("h100"), lambda size: find_gpu(size)
    half = {"precision": "bf16-true"}
    lora = {"lora_rank": 16}
    cases = [
        # name, model, device, ranks, reported to fit, does it offload while generating, options
        (
            "nano-aha-moment 3B full, 32,768 tokens per device",
            "3B",
            a100,
            4,
            True,
            False,
            half | {"micro_batch_size": 16},
        ),
        (
            "nano-aha-moment 7B full, 16,384 tokens per device",
            "7B",
            a100,
            4,
            True,
            False,
            half | {"micro_batch_size": 8},
        ),
        ("EasyR1 7B full AMP", "7B", gb(40), 8, True, True, {}),
        ("EasyR1 7B full AMP, half the devices", "7B", gb(40), 4, False, True, {}),
        ("EasyR1 7B full bf16", "7B", gb(40), 4, True, True, half),
        ("EasyR1 7B full bf16, half the devices", "7B", gb(40), 2, False, True, half),
        ("EasyR1 1.5B LoRA AMP", "1.5B", gb(12), 1, True, True, lora | {"engine_cache": 1e9}),
        ("EasyR1 3B LoRA AMP", "3B", gb(24), 1, True, True, lora),
        ("EasyR1 7B LoRA AMP", "7B", gb(32), 2, True, True, lora),
        ("EasyR1 7B LoRA AMP, half the devices", "7B", gb(32), 1, False, True, lora),
        ("verl 7B LoRA", "7B", h100, 1, True, False, lora | {"dtype": "bfloat16", "micro_batch_size": 8}),
        ("7B full, fp32 weights and moments (16 bytes per parameter)", "7B", h100, 1, False, False, {}),
    ]
    rows = []
    for what, size, gpu, ranks, observed, offloads, changes in cases:
        settings = {
            "gradient_checkpointing": True,
            "prompt_length": 1024,
            "completion_length": 1024,
            "engine_cache": 2e9,
            "ranks": ranks,
            "shards": ranks,
            "engine_shards": min(2, ranks) if offloads else 1,
        }
        memory = predict_memory(run_of(qwen[size], **settings | changes), gpu)
        peak = memory.peak
        if offloads:
            own = ("weights", "gradients", "optimizer", "LoRA adapters", "reference")
            engine = sum(bytes_ for part, bytes_ in memory.phases["generate"].items() if part not in own)
            peak = max(engine, memory.total("update"))
        rows.append(
            {
                "what": f"{what}, {ranks} × {gpu.name.split(' GPU')[0]}",
                "predicted_gb": peak / 1e9,
                "available_gb": gpu.memory / 1e9,
                "predicted": peak <= gpu.memory,
                "observed": observed,
            }
        )
    return rows


def zero_variance(seed: int = 0) -> list[dict]:
    """Two plans' groups sampled from a population of prompts, against the share predicted from measured pass rates.

    The pass rates are themselves measured, from 64 samples per prompt, as a user would measure them.
    """
    rng = random.Random(seed)
    rows = []
    for mean in (0.1, 0.3, 0.6):
        truth = [rng.betavariate(mean * 0.8, (1 - mean) * 0.8) for _ in range(400)]
        rates = [sum(rng.random() < p for _ in range(64)) / 64 for p in truth]
        for G in (8, 16):
            groups = [sum(rng.random() < p for _ in range(G)) for p in truth for _ in range(20)]
            rows.append(
                {
                    "pass_rate": mean,
                    "num_generations": G,
                    "predicted": zero_variance_share(rates, G),
                    "measured": sum(solved in (0, G) for solved in groups) / len(groups),
                }
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="every third held-out shape")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a goal is not met")
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    arguments = parser.parse_args()

    print("(b) published figures: predicted, observed, ratio")
    points = published()
    for row in points:
        print(
            f"{row['what']:<52} {row['predicted']:11,.2f} {row['observed']:11,.2f} {row['unit']:<9}"
            f"{row['predicted'] / row['observed']:5.2f}{'' if within(row) else '   off'}"
        )
    print("\n(b) does it fit: predicted GB of GB, verdict, reported")
    fit = verdicts()
    for row in fit:
        words = {True: "fits", False: "does not fit"}
        print(
            f"{row['what']:<78} {row['predicted_gb']:6.1f} of {row['available_gb']:5.1f}  {words[row['predicted']]:<13}"
            f" {words[row['observed']]}{'' if row['predicted'] == row['observed'] else '   WRONG'}"
        )
    print("\n(c) share of groups with equal rewards: predicted from pass rates, measured")
    shares = zero_variance()
    for row in shares:
        print(
            f"mean pass rate {row['pass_rate']:.1f}, G {row['num_generations']:>2}: "
            f"{row['predicted']:.3f} {row['measured']:.3f}"
        )
    print("\n(a) update on this machine: peak MiB predicted, measured, ratio; seconds predicted, measured, ratio")
    rows = held_out(arguments.quick)

    memory = sorted(abs(row["peak_mib"][0] / row["peak_mib"][1] - 1) for row in rows)
    clock = sorted(abs(row["seconds"][0] / row["seconds"][1] - 1) for row in rows)
    right = sum(row["predicted"] == row["observed"] for row in fit)
    share = max(abs(row["predicted"] - row["measured"]) for row in shares)
    goals = {
        "peak memory within 10 % (median)": median(memory) <= 0.10,
        "peak memory within 20 % (worst)": memory[-1] <= 0.20,
        "time within 20 % (median)": median(clock) <= 0.20,
        "every fit verdict right": right == len(fit),
        "zero-variance share within 0.03": share <= 0.03,
    }
    if arguments.json:
        figures = {"update": rows, "published": points, "verdicts": fit, "zero_variance": shares, "goals": goals}
        Path(arguments.json).write_text(json.dumps(figures, indent=2))
    for goal, met in goals.items():
        if not met:
            print(f"NOT MET: {goal}")
    print(
        f"configure_accuracy: {len(rows)} shapes, peak memory off by {median(memory):.1%} (median), {memory[-1]:.1%} "
        f"(worst); time by {median(clock):.1%} (median), {clock[-1]:.1%} (worst); {right} of {len(fit)} fit verdicts "
        f"right; {sum(map(within, points))} of {len(points)} published figures within their bounds; zero-variance "
        f"share off by {share:.3f} at most"
    )
    return int(arguments.check and not all(goals.values()))


def within(row: dict) -> bool:
    ratio = row["predicted"] / row["observed"]
    return 1 / row["limit"] <= ratio <= row["limit"]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(*json.loads(sys.argv[2]))
    else:
        sys.exit(main())
