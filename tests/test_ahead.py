"""Sampling one rollout ahead: what is overlapped, how old samples get, and that a resumed run goes on exactly."""

import threading
import time

import pytest
import torch
from engines import CopyRollout
from fitting import AHEAD, data, fit, largest_difference, module, parameters

from lightning_grpo.data import DifficultySampler
from lightning_grpo.monitor.checkpoint import Checkpoint
from lightning_grpo.objective import ObjectiveConfig
from lightning_grpo.rollout import HFRollout


def run(root, model, *, steps=6, resume=None, prompts=None, rollout=None, accumulate=2, changes=None, callbacks=()):
    """Two updates a rollout."""
    policy = module(model, **AHEAD | (changes or {}))
    rollout = rollout or CopyRollout()
    record = fit(
        root, policy, prompts or data(), steps=steps, accumulate=accumulate, ckpt_path=resume, rollout=rollout,
        callbacks=list(callbacks), enable_checkpointing=True,
    )  # fmt: skip
    return record, policy, rollout.engine


def test_the_next_rollout_is_sampled_in_the_background_with_weights_one_rollout_old(tmp_path, tiny_model_path):
    record, policy, engine = run(tmp_path, tiny_model_path)
    sampled = [call[1:] for call in engine.calls if call[0] == "generate"][1:]  # the first is the warm-up
    # rollouts 0 and 1 from the weights at the start, then each from those at the start of the one before
    assert sampled == [(0, "MainThread"), (0, "rollout-ahead"), (2, "rollout-ahead")]
    assert record["staleness_max"] == [0, 1, 2, 3, 2, 3]
    assert policy.collector.pending is None, "nothing is sampled for after the end"


def test_nothing_is_sampled_beyond_the_last_epoch(tmp_path, tiny_model_path):
    policy = module(tiny_model_path, **AHEAD)
    rollout = CopyRollout()
    fit(tmp_path, policy, data(), steps=-1, max_epochs=2, accumulate=4, rollout=rollout)
    assert policy.trainer.global_step == 6  # ⌊26 / 8⌋ rollouts an epoch
    assert sum(call[0] == "generate" for call in rollout.engine.calls) == 1 + 6


def test_stale_samples_are_weighted_by_the_engines_own_probabilities(tmp_path, tiny_model_path):
    record, *_ = run(tmp_path, tiny_model_path, accumulate=4)
    on_policy, later = record["sampling/sampling_logp_difference/mean"][0], record.steps[1:]
    assert on_policy < 1e-5
    for step in later:
        assert step["sampling/sampling_logp_difference/mean"] > 1e-3
        assert step["sampling/importance_sampling_ratio/min"] < 1 < step["sampling/importance_sampling_ratio/max"] <= 2


@pytest.mark.parametrize("sampler", [None, DifficultySampler()], ids=["pass", "difficulty"])
@pytest.mark.parametrize("changes", [{}, {"resampling_rounds": 1}], ids=["plain", "resampled"])
def test_resume_at_every_step_is_exact(tmp_path, tiny_model_path, sampler, changes):
    steps = 6

    def train(root, resume=None):
        checkpoint = Checkpoint(str(root / "checkpoints"), every_n_train_steps=1, save_top_k=-1)
        prompts = data(sampler=sampler)
        return run(root, tiny_model_path, resume=resume, prompts=prompts, callbacks=[checkpoint], changes=changes)

    whole, policy, _ = train(tmp_path / "whole")
    assert len(set(whole["loss"])) == steps
    for step in range(1, steps):
        path = tmp_path / "whole" / "checkpoints" / f"step-{step:06d}.ckpt"
        torch.load(path, weights_only=True)
        resumed, other, _ = train(tmp_path / f"from-{step}", str(path))
        for name in ("loss", "reward", "grad_norm", "num_tokens", "completions/mean_length", "staleness"):
            assert resumed[name] == whole[name][step:], (step, name)
        assert largest_difference(parameters(other), parameters(policy)) == 0


def test_a_checkpoint_resumes_without_sampling_ahead_too(tmp_path, tiny_model_path, caplog):
    checkpoint = Checkpoint(str(tmp_path / "checkpoints"), every_n_train_steps=1, save_top_k=-1)
    run(tmp_path, tiny_model_path, steps=4, callbacks=[checkpoint])
    middle = str(tmp_path / "checkpoints" / "step-000002.ckpt")
    record, *_ = run(tmp_path, tiny_model_path, resume=middle, changes={"rollout_ahead": 0})
    assert record["staleness_max"] == [0, 1, 0, 1]
    assert "is sampled again" in caplog.text


def test_weights_in_flight_reach_the_engine_at_every_step(tmp_path, tiny_model_path):
    """The engine is held up, so that every optimizer step meets it sampling."""

    class Slow(CopyRollout):
        def build_engine(self, trainer, pl_module):
            engine = super().build_engine(trainer, pl_module)
            sample = engine.generate

            def held_up(*args, **settings):
                if threading.current_thread() is not threading.main_thread():
                    while engine.version < 2 and time.monotonic() < end:
                        time.sleep(0.01)
                return sample(*args, **settings)

            engine.generate, end = held_up, time.monotonic() + 30
            return engine

    record, _, engine = run(tmp_path, tiny_model_path, steps=4, rollout=Slow(), changes={"in_flight_updates": True})
    assert [call for call in engine.calls if call[0] == "update"] == [
        ("update", 0, False),
        ("update", 1, True),
        ("update", 2, True),
    ]
    assert record["staleness_max"] == [0, 1, 0, 1]


def test_samples_older_than_allowed_stop_the_run(tmp_path, tiny_model_path):
    class Backdated(CopyRollout):
        def build_engine(self, trainer, pl_module):
            engine = super().build_engine(trainer, pl_module)
            update = engine.update_weights
            engine.update_weights = lambda weights, version, in_flight: update(weights, min(version, 1))
            return engine

    with pytest.raises(
        RuntimeError, match=r"tokens that are 3 optimizer steps old, and rollout_ahead allows at most 2"
    ):
        run(tmp_path, tiny_model_path, rollout=Backdated())


def test_an_error_in_the_background_stops_the_run(tmp_path, tiny_model_path):
    class Broken(CopyRollout):
        def build_engine(self, trainer, pl_module):
            engine = super().build_engine(trainer, pl_module)
            sample = engine.generate

            def fails_later(*args, **settings):
                if threading.current_thread() is not threading.main_thread():
                    raise ConnectionError("the engine is gone")
                return sample(*args, **settings)

            engine.generate = fails_later
            return engine

    with pytest.raises(ConnectionError, match="the engine is gone"):
        run(tmp_path, tiny_model_path, rollout=Broken())


def test_other_prompts_than_announced_stop_the_run(tmp_path, tiny_model_path, monkeypatch):
    prompts = data()
    announce = prompts.next_prompts

    def other():
        batch = announce()
        batch.rows.reverse()
        return batch

    monkeypatch.setattr(prompts, "next_prompts", other)
    with pytest.raises(RuntimeError, match="rollout 1 was sampled ahead for the prompts"):
        run(tmp_path, tiny_model_path, prompts=prompts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout_ahead": 2}, "rollout_ahead is 2; set 0, or 1"),
        ({"objective": ObjectiveConfig()}, "objective.rollout_correction, .* is not set"),
        ({"rollout_ahead": 0, "in_flight_updates": True}, "nothing is in flight"),
    ],
)
def test_what_does_not_fit_together_is_refused(tiny_model_path, changes, message):
    with pytest.raises(ValueError, match=message):
        module(tiny_model_path, **AHEAD | changes)


def test_an_engine_that_shares_the_trainers_process_is_refused_at_start(tmp_path, tiny_model_path):
    with pytest.raises(ValueError, match=r"the engine of HFRollout shares the trainer's process .* VLLMProcessRollout"):
        fit(tmp_path, module(tiny_model_path, **AHEAD), rollout=HFRollout())
