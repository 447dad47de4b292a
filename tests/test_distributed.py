"""Two ranks under torchrun end where one process ends, and go on from their own checkpoint."""

import csv
import json
from pathlib import Path

import pytest
import torch
from launching import ROOT, assert_two_ranks_succeed

from lightning_grpo.cli import main
from lightning_grpo.record import read_run

AHEAD = [
    "--rollout", "engines.CopyRollout", "--model.rollout_ahead", "1",
    "--model.objective.rollout_correction", "{level: token, mode: truncate, upper: 2.0}",
    "--model.objective.ess_scaled_step", "true",
]  # fmt: skip
BATCH = ["--model.advantage.estimator", "reinforce_pp_baseline", "--model.optimizer.lr", "1.0"]
TEMPLATE = "{% for m in messages %}{{ m.role[0] + m.content }}{% endfor %}{{ 'a' if add_generation_prompt }}"
TURNS = [
    "--model.environment", "{class_path: test_environments_fit.Letters, init_args: {max_turns: 2, max_turn_tokens: 5}}",
    "--model.rewards", "[{class_path: EnvironmentReward}]", "--data.chat", "true",
    "--data.chat_template", TEMPLATE,
    "--model.max_prompt_length", "16", "--model.max_completion_length", "16",
]  # fmt: skip
CASES = {"in turn": [], "ahead": AHEAD, "batch statistics": BATCH, "an environment": TURNS}


def smoke(root: Path, *options: str, ranks: int) -> list[str]:
    """The command line of the smoke run's first steps: 24 prompts per rollout, two optimizer steps of it."""
    return [
        "fit", "--config", "configs/smoke.yaml", "--trainer.default_root_dir", str(root),
        "--trainer.max_steps", "4", "--checkpoint.every_n_train_steps", "2", "--data.prompts_per_rollout", "24",
        "--model.optimizer", "torch.optim.SGD", "--model.optimizer.lr", "5.0", "--model.optimizer.fused", "false",
        "--model.micro_batch_size", "96", "--trainer.accumulate_grad_batches", str(2 // ranks),
        "--trainer.devices", str(ranks), "--trainer.strategy", "ddp" if ranks > 1 else "auto", *options,
    ]  # fmt: skip


def result(root: Path, version: int = 0) -> tuple[dict[str, torch.Tensor], list[dict[str, str]]]:
    """The weights of a run's last checkpoint, and the rows of its metrics.csv."""
    state = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
    return state["state_dict"], list(csv.DictReader((root / f"logs/version_{version}/metrics.csv").open()))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """A folder with each case's run on two ranks, and the same resumed from its middle; one start for all of them."""
    folder, commands = tmp_path_factory.mktemp("two_ranks"), []
    for case, options in CASES.items():
        middle = folder / case / "checkpoints" / "step-000002.ckpt"
        commands.append(smoke(folder / case, *options, ranks=2))
        resumed = ["--checkpoint.dirpath", str(folder / case / "resumed"), "--ckpt_path", str(middle)]
        commands.append(smoke(folder / case, *options, *resumed, ranks=2))
    assert_two_ranks_succeed("tests/commands.py", json.dumps(commands))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_end_where_one_process_ends(tmp_path, monkeypatch, two_ranks, case):
    monkeypatch.chdir(ROOT)
    main(smoke(tmp_path, *CASES[case], ranks=1))
    one, rows_of_one = result(tmp_path)
    two, rows_of_two = result(two_ranks / case)
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
    assert len(rows_of_one) == len(rows_of_two) == 4
    for row_of_one, row_of_two in zip(rows_of_one, rows_of_two, strict=True):
        for name in (
            "reward",
            "reward_std",
            "completions/mean_length",
            "num_tokens",
            "loss",
            "grad_norm",
            "entropy",
            "staleness",
            "completions/p90_length",
            "completions/repetition",
            "grad_norm/attention",
            "groups/mixed",
            "pass@4",
            "reward_length_correlation",
            "sampling/ess",
            "sampling/sequence_ess",
            *(["learning_rate_scale"] if case == "ahead" else []),
            "sampling/k1",
            "sampling/ratio/std",
            "update_ratio",
        ):
            assert float(row_of_one[name]) == pytest.approx(float(row_of_two[name]), rel=1e-4, abs=1e-7, nan_ok=True), (
                name
            )
    assert len({row["reward"] for row in rows_of_one}) == 4

    # each rank has recorded its samples, and the resumed run those of its steps
    what = ["step", "rollout", "group", "index", "prompt", "completion", "reward", "seed"]
    samples_of_one = read_run(tmp_path).samples(what).to_pylist()
    assert len(samples_of_one) == 4 * 192
    for version in (0, 1):
        run = read_run(two_ranks / case / f"logs/version_{version}")
        assert {path.name[:5] for path in run.sample_files()} == {"rank0", "rank1"}
        assert run.samples(what).to_pylist() == samples_of_one

    _, rows = result(two_ranks / case, version=1)
    resumed = torch.load(two_ranks / case / "resumed" / "last.ckpt", weights_only=True)["state_dict"]
    assert [row["loss"] for row in rows] == [row["loss"] for row in rows_of_two[2:]]
    assert all(torch.equal(resumed[name], two[name]) for name in two)


@pytest.mark.slow
@pytest.mark.vllm
def test_sharded_weights_train_as_replicated_ones(tmp_path):
    options = [
        "--rollout", "VLLMRollout", "--rollout.dtype", "float32", "--model.objective.beta", "0.1",
        "--trainer.max_steps", "2",
    ]  # fmt: skip
    sharded = [
        "--trainer.strategy", "lightning.pytorch.strategies.ModelParallelStrategy",
        "--trainer.strategy.data_parallel_size", "2", "--trainer.strategy.tensor_parallel_size", "1",
        "--trainer.strategy.save_distributed_checkpoint", "false",
    ]  # fmt: skip
    commands = [
        smoke(tmp_path / "whole", *options, ranks=2),
        smoke(tmp_path / "shards", *options, *sharded, ranks=2),
    ]
    assert_two_ranks_succeed("tests/commands.py", json.dumps(commands))
    whole, rows_of_whole = result(tmp_path / "whole")
    shards, rows_of_shards = result(tmp_path / "shards")
    for row_of_whole, row_of_shards in zip(rows_of_whole, rows_of_shards, strict=True):
        for name in ("reward", "loss", "grad_norm", "grad_norm/mlp", "kl", "num_tokens"):
            assert float(row_of_whole[name]) == pytest.approx(float(row_of_shards[name]), rel=1e-3, abs=1e-6), name
        # estimated from other weights
        assert float(row_of_whole["update_ratio"]) == pytest.approx(float(row_of_shards["update_ratio"]), rel=0.1)
    assert max(float((whole[name] - shards[name]).abs().max()) for name in whole) < 1e-4
