"""LoRA adapters put into a live vLLM engine without their base model: samples, log-probs, and every fault of a sync."""

import pytest
import torch
from engines import PROMPTS, SEEDS, SETTINGS, adapted, load, move
from transformers import AutoModelForCausalLM

from lightning_grpo.policy.load import LoRA
from lightning_grpo.rollout import (
    HFEngine,
    SampleRequest,
    SyncedEngine,
    VLLMEngine,
    WeightSyncError,
    adapter_weights,
    policy_weights,
)
from lightning_grpo.rollout.vllm import engine as vllm_engine
from lightning_grpo.rollout.vllm.adapter import adapter_settings
from lightning_grpo.rollout.vllm.callback import adapter_engine_args

LAYERS = [f"layers.0.{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]


@pytest.fixture(scope="module")
def engine(tiny_model_path, tmp_path_factory):
    log_file = tmp_path_factory.mktemp("log") / "vllm.log"
    engine = VLLMEngine(
        tiny_model_path, eos_token_ids=[1], engine_args=SETTINGS | adapter_settings(4, LAYERS), log_file=log_file
    )
    yield engine
    engine.close()


def synced_with(engine, policy):
    reference = HFEngine(policy, eos_token_ids=[1], pad_id=0)
    synced = SyncedEngine(
        engine,
        version=lambda: synced.turn,
        weights=lambda: synced.stream(),
        score=reference.logprobs,
        vocab_size=policy.config.vocab_size,
    )
    synced.turn, synced.stream, synced.reference = 0, lambda: adapter_weights(policy), reference
    return synced


@pytest.fixture
def policy(tiny_model_path):
    return adapted(tiny_model_path)


@pytest.fixture
def synced(engine, policy):
    synced = synced_with(engine, policy)
    synced.sync()
    return synced


@pytest.mark.vllm
@pytest.mark.parametrize("target_modules", ["all-linear", ["q_proj", "v_proj", "down_proj"]], ids=["all", "some"])
def test_samples_follow_the_adapter(engine, tiny_model_path, target_modules):
    policy = adapted(tiny_model_path, target_modules=target_modules)
    synced = synced_with(engine, policy)
    before = {name: p.clone() for name, p in policy.named_parameters()}
    for turn in range(3):
        synced.turn = turn
        groups = synced.generate(SampleRequest(prompts=PROMPTS, seeds=SEEDS, max_tokens=16))
        assert synced.last_sync.compared == synced.last_sync.tensors == len(list(adapter_weights(policy)))
        for prompt, group in zip(PROMPTS, groups, strict=True):
            for c in group:
                assert set(c.versions) == {turn}
                scored = synced.reference.logprobs([prompt + c.token_ids])[0][len(prompt) - 1 :]
                torch.testing.assert_close(torch.tensor(c.logprobs), scored, atol=1e-4, rtol=0)
        if turn == 0:
            for name, parameter in policy.named_parameters():
                torch.testing.assert_close(parameter, before[name], rtol=0, atol=0)
        move(policy, seed=turn + 1)


@pytest.mark.vllm
@pytest.mark.parametrize("factor", [0, 1 / 3, 2, 3], ids=["never", "unscaled", "twice", "scaled twice"])
def test_an_adapter_sent_wrong_stops_the_run(synced, policy, factor):
    move(policy, seed=1)
    synced.turn, synced.stream = 1, lambda: ((n, w * factor if "_B" in n else w) for n, w in adapter_weights(policy))
    for _ in range(2):
        with pytest.raises(WeightSyncError, match="differ from the policy"):
            synced.generate(SampleRequest(prompts=PROMPTS, seeds=SEEDS, max_tokens=4))


@pytest.mark.vllm
def test_requests_without_the_adapter_stop_the_run(synced, policy, monkeypatch):
    monkeypatch.setattr(vllm_engine, "adapter_request", lambda: None)
    move(policy, seed=1)
    synced.turn = 1
    with pytest.raises(WeightSyncError, match="differ from the policy"):
        synced.generate(SampleRequest(prompts=PROMPTS, seeds=SEEDS, max_tokens=4))


@pytest.mark.vllm
def test_scaling_in_the_engine_is_named(synced, policy, monkeypatch):
    """vLLM scales an adapter in place when it takes one; here it does so once too often."""
    from vllm.lora.lora_weights import LoRALayerWeights

    def scale(layer):
        layer.lora_b = layer.lora_b * 2
        return layer

    monkeypatch.setattr(LoRALayerWeights, "optimize", scale)
    move(policy, seed=1)
    synced.turn = 1
    with pytest.raises(WeightSyncError, match=r"lora_B.weight \(altered in model.layers.\d.*proj\)"):
        synced.generate(SampleRequest(prompts=PROMPTS, seeds=SEEDS, max_tokens=4))


@pytest.mark.vllm
def test_an_adapter_that_stays_stale_is_named(synced, policy, engine, monkeypatch):
    manager = engine._worker.model_runner.lora_manager._adapter_manager
    monkeypatch.setattr(type(manager), "activate_adapter", lambda self, number: False)
    monkeypatch.setattr(type(manager), "remove_adapter", lambda self, number: False)
    move(policy, seed=1)
    synced.turn = 1
    with pytest.raises(WeightSyncError, match=r"lora_A.weight \(altered in model.layers.0"):
        synced.generate(SampleRequest(prompts=PROMPTS, seeds=SEEDS, max_tokens=4))


@pytest.mark.vllm
def test_a_layer_that_takes_no_adapter_is_refused(engine, policy):
    def stream():
        yield from adapter_weights(policy)
        yield "base_model.model.model.nowhere.lora_A.weight", torch.zeros(4, 8)
        yield "base_model.model.model.nowhere.lora_B.weight", torch.zeros(8, 4)

    synced = synced_with(engine, policy)
    synced.stream = stream
    with pytest.raises(WeightSyncError, match=r"no place for 2 tensors of the adapter: base_model.+nowhere"):
        synced.sync()


def test_base_and_streamed_adapter_make_the_policy(tiny_model_path):
    policy = adapted(tiny_model_path, use_rslora=True)
    base = dict(policy_weights(load(tiny_model_path)))
    merged, adapter = dict(policy_weights(policy)), dict(adapter_weights(policy))
    for name in (n for n in adapter if "lora_A" in n):
        A, B = adapter[name], adapter[name.replace("lora_A", "lora_B")]
        weight = name.removeprefix("base_model.model.").replace(".lora_A", "")
        torch.testing.assert_close(base[weight] + B @ A, merged[weight])
    assert len(adapter) == 2 * 7 * 2


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"modules_to_save": ["norm"]}, {"target_modules": ["embed_tokens"]}]
)
def test_more_than_a_plain_adapter_is_refused(untied_model_path, settings):
    with pytest.raises(ValueError, match=r"plain LoRA|send merged weights"):
        list(adapter_weights(adapted(untied_model_path, **settings)))


def test_a_policy_without_adapter_has_none(tiny_model_path):
    with pytest.raises(ValueError, match="no adapter"):
        list(adapter_weights(AutoModelForCausalLM.from_pretrained(tiny_model_path)))


def test_options_that_exclude_each_other_are_refused():
    class Module:
        lora, from_scratch = None, False

    module = Module()
    with pytest.raises(ValueError, match="trains whole weights"):
        adapter_engine_args(module)
    module.lora, module.from_scratch = LoRA(), True
    with pytest.raises(ValueError, match="from_scratch"):
        adapter_engine_args(module)
    assert [adapter_settings(rank, LAYERS)["max_lora_rank"] for rank in (16, 17)] == [16, 32]
    with pytest.raises(ValueError, match=r"lora.rank is 600"):
        adapter_settings(600, LAYERS)
