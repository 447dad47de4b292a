"""A vLLM engine with asynchronous scheduling, which vLLM uses on GPUs: a step is scheduled before the one before it
has ended. vLLM switches it off on CPUs, where its scheduler works all the same."""

import math

import pytest
import torch
from engines import EOS, PROMPTS, SEEDS, SETTINGS, load, perturb, sample_request

from lightning_grpo.rollout import HFEngine, SampleRequest, Sampling, SyncedEngine, policy_weights
from lightning_grpo.rollout.vllm import isolation
from lightning_grpo.rollout.vllm.engine import VLLMEngine
from lightning_grpo.rollout.vllm.isolation import isolate_vllm

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def engine(tiny_model_path, tmp_path_factory):
    log_file = tmp_path_factory.mktemp("log") / "vllm.log"
    with isolate_vllm(), pytest.MonkeyPatch.context() as patch:
        from vllm.platforms.cpu import CpuPlatform

        check = CpuPlatform.check_and_update_config.__func__

        def check_but_schedule_ahead(cls, config):
            check(cls, config)
            config.scheduler_config.async_scheduling = True

        patch.setattr(CpuPlatform, "check_and_update_config", classmethod(check_but_schedule_ahead))
        engine = VLLMEngine(tiny_model_path, eos_token_ids=[EOS], engine_args=SETTINGS, log_file=log_file)
    assert core(engine).batch_queue_size == 2
    yield engine
    slept = []
    core(engine).model_executor.sleep(1)
    shutdown = core(engine).model_executor.shutdown
    core(engine).model_executor.shutdown = lambda: (slept.append(engine.llm.llm_engine.is_sleeping()), shutdown())
    assert engine.llm.llm_engine.is_sleeping()
    engine.close()
    assert slept == [False], "a sleeping engine must be woken up before it ends"


def core(engine):
    return engine.llm.llm_engine.engine_core.engine_core


@pytest.fixture
def policy(tiny_model_path):
    return load(tiny_model_path)


@pytest.fixture
def synced(engine, policy):
    reference = HFEngine(policy, eos_token_ids=[EOS], pad_id=0)
    synced = SyncedEngine(
        engine,
        version=lambda: synced.turn,
        weights=lambda: policy_weights(policy),
        score=reference.logprobs,
        vocab_size=policy.config.vocab_size,
    )
    synced.turn, synced.reference = 0, reference
    synced.sync()
    return synced


def assert_of_policy(synced, prompts, groups):
    for prompt, group in zip(prompts, groups, strict=True):
        for c in group:
            scored = synced.reference.logprobs([prompt + c.token_ids])[0][len(prompt) - 1 :]
            torch.testing.assert_close(torch.tensor(c.logprobs), scored, atol=1e-4, rtol=0)


def test_samples_follow_the_policy(synced, policy, engine):
    """A batch of the earlier weights is still on its way at the sync; nothing of it, nor of its cache, is used."""
    prompts = [list(range(6, 6 + 70))] * 2
    groups = synced.generate(SampleRequest(prompts=prompts, seeds=SEEDS[:2], max_tokens=8))
    assert_of_policy(synced, prompts, groups)
    assert len(core(engine).batch_queue) == 1
    perturb(policy, 0.05)
    synced.turn = 1
    groups = synced.generate(SampleRequest(prompts=prompts, seeds=SEEDS[:2], max_tokens=8))
    assert_of_policy(synced, prompts, groups)
    assert {v for group in groups for c in group for v in c.versions} == {1}


@pytest.mark.parametrize("cutoff", [0.01, 0.5])
def test_a_cut_off_keeps_whole_groups_of_prefixes(synced, engine, cutoff):
    whole = synced.generate(sample_request(64))
    cut = synced.generate(sample_request(64, Sampling(cutoff=cutoff)))
    assert not engine.llm.llm_engine.has_unfinished_requests()
    pairs = [(c, w) for ours, theirs in zip(cut, whole, strict=True) for c, w in zip(ours, theirs, strict=True)]
    aborted = [c for c, _ in pairs if c.finish_reason == "abort"]
    assert aborted and len(pairs) - len(aborted) >= math.ceil(cutoff * len(pairs))
    for c, w in pairs:
        n = len(c.token_ids)
        assert len(c.logprobs) == n >= 1 and c.token_ids == w.token_ids[:n] and c.logprobs == w.logprobs[:n]
    assert engine.llm.llm_engine.reset_prefix_cache()


def test_an_interrupted_generation_leaves_no_request_behind(synced, engine):
    def interrupt(index, group):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synced.generate(sample_request(64), interrupt)
    assert not engine.llm.llm_engine.has_unfinished_requests()
    synced.turn += 1
    synced.sync()
    assert_of_policy(synced, PROMPTS, synced.generate(sample_request(4)))


def test_the_process_changes_hands_once_per_call_and_callback(synced, engine, monkeypatch):
    entered, steps = [], []
    enter, step = isolation.Isolation._enter, engine.llm.llm_engine.step
    monkeypatch.setattr(isolation.Isolation, "_enter", lambda isolated: entered.append(isolated) or enter(isolated))
    monkeypatch.setattr(engine.llm.llm_engine, "step", lambda: steps.append(1) or step())
    engine.generate(sample_request(32))
    assert len(entered) == 1 and len(steps) >= 32
    entered.clear()
    engine.generate(sample_request(32), lambda index, group: None)
    assert len(entered) == 1 + len(PROMPTS)
