"""Folders of runs, as `fit` leaves them, with made-up figures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml

PREDICTION = {
    "step_seconds": {"rollout": 2.0, "reward": 0.1, "score": 0.0, "update": 4.0, "sync": 0.3},
    "total_seconds": 256.0,
    "memory_gib": {"rollout": 3.1, "score": 3.0, "update": 5.2},
    "peak_gib": 5.2,
    "device": "CPU",
    "device_gib": 15.0,
    "max_steps": 40,
    "updates_per_rollout": 1,
    "mean_completion_length": 12.0,
    "efficiency": "assumed",
    "spread": 1.5,
}
FINDING = {
    "rule": "entropy_collapse",
    "severity": "critical",
    "step": 30,
    "since": 20,
    "message": "the entropy fell from 1.9 to 0.05 nats per token",
    "evidence": {"entropy": [[20, 0.4], [25, 0.1], [30, 0.05]]},
    "samples": [{"step": 30, "rollout": 30, "group": 2, "index": 1}],
    "change": {"model.objective.entropy_coef": 0.01},
    "advice": "add an entropy bonus",
    "source": "Cui et al. 2025, arXiv:2505.22617",
}


def metrics(steps: int, *, seed: int = 0, gain: float = 0.6) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl: a reward that rises by ``gain``, and an evaluation at every tenth step."""
    random = np.random.default_rng([seed, int(1000 * gain)])
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        progress = step / steps
        reward = 0.15 + gain * progress + 0.05 * random.standard_normal()
        lines.append(
            {
                "step": step,
                "time": 1.8e9 + 6.5 * step,
                "reward": reward,
                "entropy": 1.9 * np.exp(-2 * progress),
                "grad_norm": 0.5 + 0.2 * random.random(),
                "completions/mean_length": 16 - 6 * progress,
                "completion_tokens": 1000 * step,
                "step_time": 6.5,
                "time/rollout": 2.2,
                "time/update": 4.1 + 0.2 * random.random(),
                "time/sync": 0.2,
                "memory/update": 4.8,
                "tokens_per_second": 155.0,
                "sampling/kl": 0.002,
            }
        )
        if step % 10 == 0:
            held_out = 0.12 + gain * progress + 0.02 * random.standard_normal()
            lines.append({"step": step, "time": 1.8e9 + 6.5 * step, "val/pass@1": held_out, "val/reward": held_out})
    return lines


def write_run(
    folder: Path, *, seed: int = 0, gain: float = 0.6, lr: float = 1e-5, steps: int = 40, **info: Any
) -> Path:
    """Write the folder of a run; ``info`` changes its run.json."""
    folder.mkdir(parents=True)
    config = {
        "seed_everything": seed,
        "trainer": {"max_steps": steps, "default_root_dir": str(folder)},
        "model": {"class_path": "lightning_grpo.GRPOModule", "init_args": {"optimizer": {"init_args": {"lr": lr}}}},
        "data": {"init_args": {"source": "reasoning_gym:chain_sum"}},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    run = {"format": 1, "started": "2026-11-28T07:00:00", "machine": "AMD EPYC, 2 cores", "max_steps": steps}
    run |= {"model": "models/SmolLM2-135M-Instruct", "seed": seed, "prediction": PREDICTION, "resumed_from": None}
    change(folder, **run | info)
    lines = metrics(steps, seed=seed, gain=gain)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def change(folder: Path, **info: Any) -> None:
    """Change what run.json contains."""
    path = folder / "run.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(before | info))
