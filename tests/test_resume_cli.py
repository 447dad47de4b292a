"""The README's way of going on: the same command with more steps and ``--ckpt_path last``."""

import csv
from pathlib import Path

import pytest
import torch

from lightning_grpo.cli import main

SMOKE = Path(__file__).parent.parent / "configs" / "smoke.yaml"


@pytest.mark.parametrize(
    ("stop", "options"),
    [
        # micro-batches of an optimizer step: 2, 4 and 1; epochs of one rollout and of two; at their end and in between
        (2, []),
        (2, ["--data.prompts_per_rollout", "13", "--model.micro_batch_size", "13", "--trainer.limit_val_batches", "1.0",
             "--data.validation_size", "2", "--data.size", "28"]),
        (3, ["--data.prompts_per_rollout", "13", "--model.micro_batch_size", "13"]),
        (3, ["--model.micro_batch_size", "26", "--trainer.accumulate_grad_batches", "1"]),
        (2, ["--model.micro_batch_size", "13", "--trainer.accumulate_grad_batches", "4"]),
    ],
)  # fmt: skip
def test_a_finished_run_goes_on_with_more_steps(tmp_path, monkeypatch, stop, options):
    monkeypatch.chdir(SMOKE.parent.parent)

    def fit(name, steps, *more):
        root = tmp_path / name
        main([
            "fit", "--config", str(SMOKE), "--trainer.default_root_dir", str(root), "--trainer.max_steps", str(steps),
            "--model.num_generations", "2", "--model.micro_batch_size", "26", *options, *more,
        ])  # fmt: skip
        logs = max((root / "logs").glob("version_*"), key=lambda folder: int(folder.name.split("_")[1]))
        rows = [row for row in csv.DictReader((logs / "metrics.csv").open()) if row["loss"]]
        return rows, torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)

    whole, ended = fit("whole", 5)
    fit("parts", stop)
    rows, state = fit("parts", 5, "--ckpt_path", "last")
    for name in ("step", "epoch", "loss", "reward", "grad_norm", "num_tokens", "learning_rate"):
        assert [row[name] for row in rows] == [row[name] for row in whole][stop:], name
    assert all(torch.equal(p, state["state_dict"][name]) for name, p in ended["state_dict"].items())
