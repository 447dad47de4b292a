"""Two ranks under torchrun end where one process ends, and go on from their own checkpoint."""

import csv
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def smoke(root: Path, *options: str, ranks: int = 1) -> tuple[dict[str, torch.Tensor], list[dict[str, str]]]:
    """The smoke run's first steps by the command line; its weights, and the rows of its last metrics.csv."""
    launcher = []
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", f"--master_port={free_port()}"]
    command = [
        sys.executable, *launcher, "-m", "lightning_grpo", "fit", "--config", "configs/smoke.yaml",
        "--trainer.default_root_dir", str(root), "--trainer.devices", str(ranks), "--trainer.max_steps", "4",
        "--checkpoint.every_n_train_steps", "2", "--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "5.0",
        "--model.optimizer.fused", "false", "--data.prompts_per_rollout", "24",
        "--model.micro_batch_size", "96", "--trainer.strategy", "ddp" if ranks > 1 else "auto", *options,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    state = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    logs = max((root / "logs").glob("version_*"), key=lambda p: int(p.name.split("_")[1]))
    return state["state_dict"], list(csv.DictReader((logs / "metrics.csv").open()))


AHEAD = [
    "--rollout", "engines.CopyRollout", "--model.rollout_ahead", "1",
    "--model.objective.rollout_correction", "{level: token, mode: truncate, upper: 2.0}",
]  # fmt: skip
BATCH = ["--model.advantage.estimator", "reinforce_pp_baseline", "--model.optimizer.lr", "1.0"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], AHEAD, BATCH], ids=["in turn", "ahead", "batch statistics"])
def test_two_ranks_end_where_one_process_ends(tmp_path, options):
    # 24 prompts a rollout, two optimizer steps of it
    one, rows_of_one = smoke(tmp_path / "one", "--trainer.accumulate_grad_batches", "2", *options)
    two, rows_of_two = smoke(tmp_path / "two", "--trainer.accumulate_grad_batches", "1", *options, ranks=2)
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
    assert len(rows_of_one) == len(rows_of_two) == 4
    for mine, theirs in zip(rows_of_one, rows_of_two, strict=True):
        for name in (
            "reward",
            "reward_std",
            "completions/mean_length",
            "num_tokens",
            "loss",
            "grad_norm",
            "entropy",
            "staleness",
        ):
            assert float(mine[name]) == pytest.approx(float(theirs[name]), rel=1e-4, abs=1e-7, nan_ok=True), name
    assert len({row["reward"] for row in rows_of_one}) == 4

    resumed, rows = smoke(
        tmp_path / "two", "--trainer.accumulate_grad_batches", "1",
        "--ckpt_path", str(tmp_path / "two" / "checkpoints" / "step-000002.ckpt"), *options, ranks=2,
    )  # fmt: skip
    assert [row["loss"] for row in rows] == [row["loss"] for row in rows_of_two[2:]]
    assert all(torch.equal(resumed[name], two[name]) for name in two)


@pytest.mark.slow
@pytest.mark.vllm
def test_sharded_weights_train_as_replicated_ones(tmp_path):
    options = [
        "--trainer.accumulate_grad_batches", "1", "--rollout", "VLLMRollout", "--rollout.dtype", "float32",
        "--model.objective.beta", "0.1", "--trainer.max_steps", "2",
    ]  # fmt: skip
    sharded = [
        "--trainer.strategy", "lightning.pytorch.strategies.ModelParallelStrategy",
        "--trainer.strategy.data_parallel_size", "2", "--trainer.strategy.tensor_parallel_size", "1",
        "--trainer.strategy.save_distributed_checkpoint", "false",
    ]  # fmt: skip
    whole, rows_of_whole = smoke(tmp_path / "whole", *options, ranks=2)
    shards, rows_of_shards = smoke(tmp_path / "shards", *options, *sharded, ranks=2)
    for mine, theirs in zip(rows_of_whole, rows_of_shards, strict=True):
        for name in ("reward", "loss", "grad_norm", "kl", "num_tokens"):
            assert float(mine[name]) == pytest.approx(float(theirs[name]), rel=1e-3, abs=1e-6), name
    assert max(float((whole[name] - shards[name]).abs().max()) for name in whole) < 1e-4
