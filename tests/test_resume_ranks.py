"""Two ranks go on where one stopped and the other way round, and sharded weights from either kind of checkpoint."""

from pathlib import Path

import pytest
import torch
from fitting import largest_difference, parameters
from launching import assert_two_ranks_succeed
from peft import AutoPeftModelForCausalLM
from ranks import LOGGED, STEPS, run, saved
from transformers import AutoModelForCausalLM

from lightning_grpo.export import read_checkpoint


@pytest.mark.slow
def test_another_number_of_ranks_and_sharded_weights(tmp_path, tiny_model_path):
    one, policy = run(tmp_path / "one", tiny_model_path, micro_batch_size=8, accumulate=2)
    ended = parameters(policy)
    assert_two_ranks_succeed("tests/ranks.py", str(tmp_path), tiny_model_path)

    def check(step, logged, its_parameters):
        for name in LOGGED:
            assert logged[name] == pytest.approx(one[name][step:], rel=1e-4, abs=1e-6), (step, name)
        assert largest_difference(its_parameters, ended) < 1e-5, step

    for step, result in torch.load(tmp_path / "two-from-one.pt", weights_only=True).items():
        check(step, result["logged"], result["parameters"])
    for step in range(1, STEPS):
        record, other = run(
            tmp_path / f"one-from-{step}", tiny_model_path, micro_batch_size=8, accumulate=2,
            resume=saved(tmp_path / "two", step),
        )  # fmt: skip
        check(step, {name: record[name] for name in LOGGED}, parameters(other))
    check_exports(tmp_path)


def check_exports(root: Path) -> None:
    """What `fit` exported from shards is what it exported from one file, and what that file holds."""
    for kind, load in (("whole", AutoModelForCausalLM), ("adapters", AutoPeftModelForCausalLM)):
        shards, file = (load.from_pretrained(root / f"{kind}-{how}" / "all" / "last") for how in ("shards", "file"))
        assert largest_difference(dict(shards.named_parameters()), dict(file.named_parameters())) == 0
        assert read_checkpoint(saved(root / f"{kind}-shards" / "all", STEPS)).path.is_dir()
        weights = read_checkpoint(saved(root / f"{kind}-file" / "all", STEPS)).weights
        assert weights and all(torch.equal(file.state_dict()[name], tensor) for name, tensor in weights.items())
