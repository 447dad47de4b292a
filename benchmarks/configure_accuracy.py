"""How far `lightning-grpo configure` is off.

(a) Peak memory and time of the update, predicted from the config alone against measured in a fresh process each, for
shapes of SmolLM2-135M and two smaller models with random weights; time after calibration on three other shapes.
(b) Published observations of other projects, each with prediction and ratio.
(c) The share of groups whose rewards are all equal, predicted from pass rates against sampled.

    python benchmarks/configure_accuracy.py [--quick] [--check] [--json FILE]
"""

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, replace
from statistics import median

from transformers import LlamaConfig, Qwen3Config

from lightning_grpo.configure import ModelShape, Workload, find_gpu, find_model, predict_memory
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


def measured(model: str, changes: dict) -> Measured:
    """In a fresh process."""
    out = subprocess.run(
        [sys.executable, __file__, "--worker", json.dumps([model, changes])],
        env=environment(),
        capture_output=True,
        text=True,
    )
    if out.returncode:
        raise RuntimeError(f"{model} {changes}: {out.stderr[-2000:]}")
    return Measured(**json.loads(out.stdout.splitlines()[-1]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        model, changes = json.loads(sys.argv[2])
        # Libraries load and compile on first use: that is the process's own, and not the model's.
        warm_up = {"micro_batch_size": 2, "prompt_length": 8, "completion_length": 8}
        measure_update(workload("Qwen3-18M", changes | warm_up), "cpu", steps=1)
        print(json.dumps(asdict(measure_update(workload(model, changes), "cpu"))))
        sys.exit()
