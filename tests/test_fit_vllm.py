"""``fit`` with rollouts from a real vLLM engine in the same process."""

import csv
import random
from pathlib import Path

import pytest
import torch
from fitting import AHEAD, data, fit, module
from lightning import Callback
from test_environments_fit import acting, assert_trained_on_what_was_sampled, chat

from lightning_grpo.cli import main
from lightning_grpo.policy.load import LoRA
from lightning_grpo.rollout import VLLMProcessRollout, VLLMRollout, WeightSyncError

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_the_smoke_run_on_vllm(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    main([
        "fit", "--config", "configs/smoke.yaml", "--trainer.default_root_dir", str(tmp_path),
        "--trainer.max_steps", "4", "--rollout", "VLLMRollout", "--rollout.dtype", "float32",
    ])  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "logs" / "version_0" / "metrics.csv").open()))
    assert len(rows) == 4
    assert len({row["reward"] for row in rows}) == 4
    for step, row in enumerate(rows):
        # the engine's log-probs are the trainer's: the weights arrive, at the right temperature, every step
        assert float(row["sampling/sampling_logp_difference/max"]) < 1e-3
        assert float(row["staleness"]) == 0
        assert float(row["time/rollout"]) > 0 and float(row["completions/max_length"]) == 6, step


def test_a_stale_engine_stops_the_run_before_a_sample_is_used(tmp_path, tiny_model_path):
    class Unplug(Callback):
        """From the second step on, the engine drops the weights it is given."""

        def on_train_batch_end(self, trainer, pl_module, *args):
            engine = pl_module.engine.engine
            engine.update_weights = lambda weights, version, in_flight: [None for _ in weights] and None

    policy = module(tiny_model_path, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    with pytest.raises(WeightSyncError):
        fit(tmp_path, policy, data(), steps=3, callbacks=[Unplug()], rollout=VLLMRollout(dtype="float32"))
    assert policy.trainer.global_step == 1


def test_the_same_seed_gives_the_same_run_whatever_the_global_generator_did(tmp_path, tiny_model_path):
    runs = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        random.seed(noise)
        rollout = VLLMRollout(dtype="float32")
        runs.append(fit(tmp_path, module(tiny_model_path), data(), steps=2, rollout=rollout)["reward"])
    assert runs[0] == runs[1]


def test_the_adapter_that_trains_is_the_one_that_samples(tmp_path, tiny_model_path):
    policy = module(tiny_model_path, lora=LoRA(rank=4), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    record = fit(tmp_path, policy, data(), steps=3, rollout=VLLMRollout(lora="adapter", dtype="float32"))
    assert max(record["sampling/sampling_logp_difference/max"]) < 1e-3
    assert record["staleness"] == [0, 0, 0]
    assert all(p.abs().max() > 1e-2 for name, p in policy.policy.named_parameters() if "lora_B" in name)


@pytest.mark.parametrize("ahead", [False, True], ids=["in process", "a server, ahead"])
def test_an_environment_on_vllm(tmp_path, tiny_model_path, tokenizer, ahead):
    """The steps are so small that the older weights, from which a rollout ahead is sampled, have the same log-probs."""
    kind, options = (VLLMProcessRollout, {"environment": {"OMP_NUM_THREADS": "1"}}) if ahead else (VLLMRollout, {})
    changes = AHEAD | {"rewards": []} if ahead else {}
    policy = acting(tiny_model_path, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-7), **changes)
    record = fit(tmp_path, policy, chat(), steps=3, accumulate=2, rollout=kind(dtype="float32", **options))
    assert record["staleness"][0] == 0
    assert (record["staleness"][2] > 0) == ahead
    assert max(record["sampling/sampling_logp_difference/max"]) < 1e-3
    experience = policy.progress.experience
    assert_trained_on_what_was_sampled(experience, tokenizer)
    assert not experience.rollout_logprobs[~experience.completion_mask].any()
