"""A run goes on in other micro-batches than it was saved in, where an optimizer step still takes the same samples."""

import pytest
import torch
from fitting import data, experience, fit, largest_difference, module, parameters
from lightning import Trainer

from lightning_grpo.monitor.checkpoint import Checkpoint
from lightning_grpo.objective import ObjectiveConfig
from lightning_grpo.rollout import HFRollout
from lightning_grpo.training.experience import redistribute

STEPS = 7


def run(root, model, micro_batch_size, accumulate, *, resume=None, steps=STEPS, changes=None, prompts=None):
    """Epochs of three rollouts, each of 32 / (micro_batch_size · accumulate) optimizer steps."""
    policy = module(
        model, **{"micro_batch_size": micro_batch_size, "objective": ObjectiveConfig(beta=0.05)} | (changes or {})
    )
    checkpoint = Checkpoint(str(root), every_n_train_steps=1, save_top_k=-1)
    record = fit(
        root, policy, data(**prompts or {}), steps=steps, accumulate=accumulate, ckpt_path=resume and str(resume),
        callbacks=[checkpoint], enable_checkpointing=True,
    )  # fmt: skip
    return record, policy


@pytest.mark.parametrize("was, now", [((8, 2), (4, 4)), ((2, 8), (8, 2)), ((16, 1), (4, 4))])
def test_other_micro_batches_of_the_same_step(tmp_path, tiny_model_path, was, now):
    """Two steps a rollout and seven in all: between rollouts, inside one, at an epoch's end and in its middle."""
    whole, policy = run(tmp_path / "whole", tiny_model_path, *was)
    for step in range(1, STEPS):
        saved = tmp_path / "whole" / f"step-{step:06d}.ckpt"
        resumed, other = run(tmp_path / str(step), tiny_model_path, *now, resume=saved)
        for name in ("loss", "reward", "grad_norm", "kl", "num_tokens"):
            assert resumed[name] == pytest.approx(whole[name][step:], rel=1e-3, abs=1e-5), (step, name)
        assert largest_difference(parameters(other), parameters(policy)) < 1e-5
        # seven steps are one epoch of six and one more
        assert other.trainer.current_epoch == policy.trainer.current_epoch == 2
        batches = other.trainer.fit_loop.epoch_loop.batch_progress
        assert (batches.current.ready, batches.total.ready) == (now[1], STEPS * now[1])


@pytest.mark.parametrize("was, now", [((8, 4), (8, 2)), ((8, 1), (8, 2))])
def test_steps_of_another_size(tmp_path, tiny_model_path, was, now):
    """Between rollouts always; inside one if the samples left fill whole steps."""
    size_was, size_now = was[0] * was[1], now[0] * now[1]
    run(tmp_path / "whole", tiny_model_path, *was, steps=5)
    for step in range(1, 5):
        saved = tmp_path / "whole" / f"step-{step:06d}.ckpt"
        if step * size_was % 32 % size_now:
            with pytest.raises(
                ValueError, match=r"optimizer steps on \d+ of its completions.*takes as many as before, 8"
            ):
                run(tmp_path / str(step), tiny_model_path, *now, resume=saved, steps=step + 3)
            continue
        resumed, policy = run(tmp_path / str(step), tiny_model_path, *now, resume=saved, steps=step + 3)
        assert len(resumed.steps) == 3 and policy.trainer.global_step == step + 3


def test_what_a_rollout_was_made_of_can_change_between_two_alone(tmp_path, tiny_model_path):
    run(tmp_path / "whole", tiny_model_path, 8, 2, steps=3)
    inside, between = (tmp_path / "whole" / f"step-{step:06d}.ckpt" for step in (1, 2))
    for changes, prompts, named in [
        ({"num_generations": 8}, {}, "num_generations 4 → 8"),
        ({"num_iterations": 2}, {}, "num_iterations 1 → 2"),
        ({}, {"prompts_per_rollout": 4}, "prompts_per_rollout 8 → 4"),
    ]:
        with pytest.raises(ValueError, match=f"in the middle of a rollout and .*{named} since"):
            run(tmp_path / "on", tiny_model_path, 8, 2, resume=inside, changes=changes, prompts=prompts)
        record, _ = run(tmp_path / "on", tiny_model_path, 8, 2, resume=between, changes=changes, prompts=prompts)
        assert len(record.steps) == STEPS - 2, named


def test_a_validation_does_not_take_up_the_rollout(tmp_path, tiny_model_path):
    """Another micro-batch, and a fit with the same module that begins at the beginning."""
    run(tmp_path / "whole", tiny_model_path, 8, 2, steps=1)
    policy = module(tiny_model_path, micro_batch_size=16)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, callbacks=[HFRollout()], default_root_dir=tmp_path
    )
    trainer.validate(policy, data(validation_size=4), ckpt_path=str(tmp_path / "whole" / "step-000001.ckpt"))
    assert policy.progress.experience is None and policy.progress.micro_step == 0


def test_ranks_share_a_rollout_anew():
    whole = experience([1, 2, 3, 4, 5, 1, 2, 3], [float(i) for i in range(8)], G=2)
    shares = redistribute([whole], 2, 2)
    assert [share.advantages.tolist() for share in shares] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    # each rank pads to its own longest
    narrow = [share.rows(range(4)) for share in shares]
    assert narrow[0].completion_ids.shape != narrow[1].completion_ids.shape
    again = redistribute(narrow, 1, 2)[0]
    for name, value in vars(whole).items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(getattr(again, name), value), name
        elif name != "number":
            assert getattr(again, name) == value, name
