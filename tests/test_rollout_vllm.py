"""A real vLLM engine in this process: samples, log-probs, side effects, and every fault of a weight sync."""

import gc
import math
import os
import random
import weakref

import numpy as np
import pytest
import torch
from engines import (
    EOS,
    PROMPTS,
    SEEDS,
    SETTINGS,
    adapted,
    assert_turns_are_completions,
    converse,
    load,
    perturb,
    sample_request,
)
from torch.nn import functional as F

from lightning_grpo.rollout import (
    HFEngine,
    SampleRequest,
    Sampling,
    SyncedEngine,
    Turn,
    WeightSyncError,
    policy_weights,
)
from lightning_grpo.rollout.vllm import weights as vllm_weights
from lightning_grpo.rollout.vllm.engine import VLLMEngine

pytestmark = pytest.mark.vllm


def process_state():
    return (
        dict(os.environ),
        random.getstate(),
        [part.tolist() if isinstance(part, np.ndarray) else part for part in np.random.get_state()],
        torch.get_rng_state().tolist(),
        torch.get_num_threads(),
        torch.set_num_threads,
        torch.Tensor.pin_memory,
        torch.cuda.Stream,
        torch.accelerator.synchronize,
    )


@pytest.fixture(scope="module")
def engine(tiny_model_path, tmp_path_factory):
    before = process_state()
    log_file = tmp_path_factory.mktemp("log") / "vllm.log"
    engine = VLLMEngine(tiny_model_path, eos_token_ids=[EOS], engine_args=SETTINGS, log_file=log_file)
    assert process_state() == before
    assert "vLLM" in log_file.read_text() or "vllm" in log_file.read_text()
    yield engine
    model = weakref.ref(engine._worker.get_model())
    engine.close()
    engine.close()
    assert not torch.distributed.is_initialized()
    gc.collect()
    assert model() is None, "the engine's memory must come back"


@pytest.fixture
def policy(tiny_model_path):
    return load(tiny_model_path)


@pytest.fixture
def synced(engine, policy):
    """The engine with a policy whose version the test turns by hand; proved once on equal weights."""
    reference = HFEngine(policy, eos_token_ids=[EOS], pad_id=0)
    synced = SyncedEngine(
        engine,
        version=lambda: synced.turn,
        weights=lambda: synced.stream(),
        score=reference.logprobs,
        vocab_size=policy.config.vocab_size,
    )
    synced.turn, synced.stream, synced.reference = 0, lambda: policy_weights(policy), reference
    synced.sync()
    return synced


def test_logprobs_are_those_of_the_sampled_distribution(synced):
    sampling = Sampling(temperature=0.7, top_p=0.9, top_k=20, min_p=0.01, repetition_penalty=1.2)
    groups = synced.generate(sample_request(16, sampling))
    expected = synced.reference.generate(sample_request(16, sampling))
    assert [len(g) for g in groups] == [len(g) for g in expected] == [4, 4, 4]
    # The engines draw different samples; the same first token must have the same log-prob.
    for ours, theirs in zip(groups, expected, strict=True):
        known = {c.token_ids[0]: c.logprobs[0] for c in theirs}
        for c in ours:
            if c.token_ids[0] in known:
                assert c.logprobs[0] == pytest.approx(known[c.token_ids[0]], abs=1e-4)


def test_logprobs_at_temperature_one_are_the_policys(synced):
    groups = synced.generate(sample_request(32))
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for c in group:
            scored = synced.reference.logprobs([prompt + c.token_ids])[0][len(prompt) - 1 :]
            torch.testing.assert_close(torch.tensor(c.logprobs), scored, atol=1e-4, rtol=0)


def test_a_seed_gives_the_same_sample_in_another_batch(synced):
    together = synced.generate(sample_request(32))
    alone = synced.generate(SampleRequest(prompts=PROMPTS[1:2], seeds=[SEEDS[1][::-1]], max_tokens=32))
    assert [c.token_ids for c in alone[0][::-1]] == [c.token_ids for c in together[1]]


def test_finish_reasons_and_streaming(synced):
    heard = {}
    groups = synced.generate(sample_request(32), heard.__setitem__)
    assert [heard[i] for i in range(3)] == groups
    for c in (c for group in groups for c in group):
        assert (c.finish_reason == "stop") == (c.token_ids[-1] == EOS)
        assert c.finish_reason == "stop" or len(c.token_ids) == 32
        assert EOS not in c.token_ids[:-1] and len(c.logprobs) == len(c.token_ids)


@pytest.mark.parametrize("cutoff", [0.01, 0.25, 0.5])
def test_a_cut_off_keeps_whole_groups_of_prefixes(synced, engine, cutoff):
    whole = synced.generate(sample_request(64))
    heard = {}
    cut = [
        synced.generate(
            sample_request(64, Sampling(cutoff=cutoff)),
            heard.__setitem__,
        )
        for _ in range(2)
    ]
    assert cut[0] == cut[1] == [heard[i] for i in range(len(PROMPTS))]
    assert not engine.llm.llm_engine.has_unfinished_requests()
    pairs = [(c, w) for ours, theirs in zip(cut[0], whole, strict=True) for c, w in zip(ours, theirs, strict=True)]
    aborted = [(c, w) for c, w in pairs if c.finish_reason == "abort"]
    longest = max(len(c.token_ids) for c, _ in pairs)
    assert aborted and all(len(c.token_ids) == longest < len(w.token_ids) for c, w in aborted)
    ended = len(pairs) - len(aborted)
    assert ended >= math.ceil(cutoff * len(pairs))
    # One step earlier fewer had ended than were waited for, or one had not begun.
    assert longest == 1 or sum(len(w.token_ids) < longest for _, w in pairs) < math.ceil(cutoff * len(pairs))
    for c, w in pairs:
        n = len(c.token_ids)
        assert n >= 1 and len(c.logprobs) == len(c.versions) == n
        assert c.token_ids == w.token_ids[:n] and c.logprobs == w.logprobs[:n]
        assert c.finish_reason in (w.finish_reason, "abort")


def test_generation_leaves_the_process_alone(synced):
    before, during = process_state(), []
    synced.generate(sample_request(4), lambda i, g: during.append(process_state()))
    synced.turn += 1
    synced.sync()
    assert [process_state(), *during] == [before] * 4


def test_samples_follow_the_policy(synced, policy):
    synced.generate(sample_request(8))
    perturb(policy)
    synced.turn = 1
    groups = synced.generate(sample_request(8))
    assert synced.last_sync.moved == [name for name, _ in policy_weights(policy)]
    assert synced.last_sync.compared == synced.last_sync.tensors
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for c in group:
            assert set(c.versions) == {1}
            scored = synced.reference.logprobs([prompt + c.token_ids])[0][len(prompt) - 1 :]
            torch.testing.assert_close(torch.tensor(c.logprobs), scored, atol=1e-4, rtol=0)


def test_weights_lost_in_sleep_are_sent_again(synced, engine):
    """What a sleep at level 2 leaves: no weights, though the policy's version has not moved."""
    engine.weights_lost = True
    with pytest.raises(WeightSyncError, match="slept at level 2"):
        engine.generate(sample_request(4))
    before = synced.last_sync
    synced.generate(sample_request(4))
    assert synced.last_sync is not before and not engine.weights_lost


def test_an_unmoved_policy_is_not_synced_again(synced):
    assert synced.sync() is None


def faulty_stream(policy, fault):
    """The policy's weights as they were, or as a broken sync would send them."""
    weights = {name: weight.clone() for name, weight in policy_weights(policy)}
    perturb(policy)
    q, k = "model.layers.1.self_attn.k_proj.weight", "model.layers.1.self_attn.v_proj.weight"
    fresh = dict(policy_weights(policy))
    match fault:
        case "no sync":
            fresh = weights
        case "stale layer":
            fresh |= {n: w for n, w in weights.items() if n.startswith("model.layers.1.")}
        case "swapped slices":
            fresh[q], fresh[k] = fresh[k], fresh[q]
        case "transposed":
            fresh["model.layers.0.self_attn.q_proj.weight"] = fresh["model.layers.0.self_attn.q_proj.weight"].T
        case "wrong scaling":
            fresh["model.layers.0.mlp.down_proj.weight"] = fresh["model.layers.0.mlp.down_proj.weight"] * 1.5
        case "truncated":
            fresh["model.layers.0.mlp.down_proj.weight"] = fresh["model.layers.0.mlp.down_proj.weight"][:32]
        case "missing":
            del fresh["model.layers.1.mlp.up_proj.weight"]
        case "nan":
            fresh["model.norm.weight"] = fresh["model.norm.weight"] * torch.nan
    return {name: weight.clone() for name, weight in fresh.items()}


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        ("no sync", "since the previous sync: none"),
        ("stale layer", "since the previous sync: model.embed_tokens.weight, model.layers.0.self_attn.q_proj.weight"),
        ("swapped slices", "differ from the policy"),
        ("transposed", "differ from the policy"),
        ("wrong scaling", "differ from the policy"),
        ("truncated", "model.layers.0.mlp.down_proj.weight"),
        ("missing", "model.layers.1.mlp.up_proj|model.layers.1.mlp.gate_up_proj"),
        ("nan", "differ from the policy"),
    ],
)
def test_a_faulty_stream_stops_the_run(synced, policy, fault, named):
    weights = faulty_stream(policy, fault)
    synced.stream, synced.turn = lambda: iter(weights.items()), 1
    with pytest.raises(WeightSyncError, match=named):
        synced.generate(sample_request(4))
    # It stays stopped: the next try does not take the failed sync for a done one.
    with pytest.raises(WeightSyncError):
        synced.generate(sample_request(4))


@pytest.mark.parametrize("fault", ["none", "adapter not applied", "adapter applied twice"])
def test_lora_reaches_the_engine_merged_once(synced, engine, tiny_model_path, fault):
    from peft import LoraConfig, get_peft_model

    policy = get_peft_model(load(tiny_model_path), LoraConfig(r=4, target_modules="all-linear"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    merged = dict(policy_weights(policy))
    plain = dict(policy_weights(load(tiny_model_path)))
    factor = {"none": 1, "adapter not applied": 0, "adapter applied twice": 2}[fault]
    stream = {name: plain[name] + factor * (merged[name] - plain[name]) for name in merged}
    reference = HFEngine(policy, eos_token_ids=[EOS], pad_id=0)
    merging = SyncedEngine(
        engine, version=lambda: 0, weights=lambda: iter(stream.items()), score=reference.logprobs, vocab_size=106
    )
    if fault == "none":
        merging.sync()
        return
    with pytest.raises(WeightSyncError, match="differ from the policy"):
        merging.generate(sample_request(4))


@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"o_proj": 3}}],
    ids=["dora", "rslora and patterns"],
)
def test_other_adapters_reach_the_engine_merged(engine, tiny_model_path, settings):
    policy = adapted(tiny_model_path, **settings)
    reference = HFEngine(policy, eos_token_ids=[EOS], pad_id=0)
    synced = SyncedEngine(
        engine, version=lambda: 0, weights=lambda: policy_weights(policy), score=reference.logprobs, vocab_size=106
    )
    report = synced.sync()
    assert report.compared == report.tensors and report.mismatch.max < 1e-4


@pytest.mark.parametrize("change", [0.02, 1e-5])
def test_a_forgotten_tied_head_is_named(synced, policy, engine, change, monkeypatch):
    """The head computes with a packed copy of the embedding, as vLLM leaves it."""
    head = engine._worker.get_model().lm_head
    copy = head.weight.clone()
    monkeypatch.setattr(head, "cpu_linear", lambda x, weight, bias: F.linear(x, copy, bias))
    monkeypatch.setattr(vllm_weights, "_compute_from_parameters", lambda model: None)
    perturb(policy, change)
    synced.turn = 1
    with pytest.raises(WeightSyncError, match=r"model.embed_tokens.weight \(stale in lm_head\)"):
        synced.generate(sample_request(4))


def test_only_matrices_that_moved_are_packed(synced, policy, monkeypatch):
    from vllm.model_executor.layers import utils

    packed = []
    pack = utils.dispatch_cpu_unquantized_gemm
    monkeypatch.setattr(
        utils, "dispatch_cpu_unquantized_gemm", lambda layer, remove_weight: packed.append(pack(layer, remove_weight))
    )
    synced.turn += 1
    synced.sync()
    assert packed == []
    with torch.no_grad():
        policy.model.layers[1].mlp.up_proj.weight[0, 0] += 1
    synced.turn += 1
    assert synced.sync().moved == ["model.layers.1.mlp.up_proj.weight"]
    assert len(packed) == 1


@pytest.mark.parametrize("change", [0.0, 0.02])
def test_models_of_unknown_layout_go_through_vllms_own_loaders(synced, policy, change, monkeypatch):
    """What its kernels pack can't be compared there; the rest is, and the check sequences show the weights arrive."""
    monkeypatch.setattr(vllm_weights, "_are_complete", lambda places, model: False)
    perturb(policy, change)
    synced.turn = 1
    groups = synced.generate(sample_request(8))
    assert 0 < synced.last_sync.compared < synced.last_sync.tensors
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for c in group:
            scored = synced.reference.logprobs([prompt + c.token_ids])[0][len(prompt) - 1 :]
            torch.testing.assert_close(torch.tensor(c.logprobs), scored, atol=1e-4, rtol=0)
    monkeypatch.undo()
    perturb(policy)
    synced.turn += 1
    assert synced.sync().compared == synced.last_sync.tensors


def test_a_change_too_small_for_the_check_sequences_is_still_seen(synced, policy, engine, monkeypatch):
    """The engine keeps one layer's old weights after an update of one ulp."""
    perturb(policy, 1e-6)
    stale = dict(policy_weights(load(policy.config._name_or_path)))
    name = "model.layers.1.self_attn.v_proj.weight"
    update = engine.update_weights

    def faulty(weights, version, in_flight=False):
        update(((n, stale[n] if n == name else w) for n, w in weights), version)

    monkeypatch.setattr(engine, "update_weights", faulty)
    synced.turn = 1
    with pytest.raises(WeightSyncError, match=rf"{name} \(altered in model.layers.1.self_attn.qkv_proj\)"):
        synced.generate(sample_request(4))


def test_a_stale_prefix_cache_would_show(synced, policy, engine, monkeypatch):
    """Without the reset the samples' log-probs are off; with it they are right. Guards against a silent no-op."""
    prompts = [list(range(6, 6 + 70))] * 2

    def error(groups):
        return max(
            (synced.reference.logprobs([prompts[0] + c.token_ids])[0][69:] - torch.tensor(c.logprobs)).abs().max()
            for group in groups
            for c in group
        )

    synced.generate(SampleRequest(prompts=prompts, seeds=SEEDS[:2], max_tokens=4))
    perturb(policy, 0.05)
    reset = engine.llm.llm_engine.reset_prefix_cache
    monkeypatch.setattr(engine.llm.llm_engine, "reset_prefix_cache", lambda: True)
    synced.turn = 1
    assert error(synced.generate(SampleRequest(prompts=prompts, seeds=SEEDS[:2], max_tokens=4))) > 1e-2
    monkeypatch.setattr(engine.llm.llm_engine, "reset_prefix_cache", reset)
    synced.turn = 2
    assert error(synced.generate(SampleRequest(prompts=prompts, seeds=SEEDS[:2], max_tokens=4))) < 1e-4


def test_stop_strings_without_a_tokenizer_are_refused(synced):
    with pytest.raises(ValueError, match=r"sampling.stop"):
        synced.generate(sample_request(4, Sampling(stop=["x"])))


def test_an_interrupted_generation_leaves_no_request_behind(synced, engine):
    def interrupt(index, group):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synced.generate(sample_request(64), interrupt)
    assert not engine.llm.llm_engine.has_unfinished_requests()
    synced.turn += 1
    synced.sync()
    synced.generate(sample_request(4))


# ── Conversations turn by turn ────────────────────────────────────────────────────────────────────────────────────


def test_a_turn_is_the_completion_of_all_tokens_before_it(synced):
    sampled, _ = converse(synced, [prompt for prompt in PROMPTS for _ in range(2)])
    assert len(sampled) == 18 and len({len(completion.token_ids) for _, completion in sampled}) > 2
    assert_turns_are_completions(synced, sampled)


def test_the_prefix_cache_has_all_but_the_last_block_of_a_conversation(synced, engine):
    block = SETTINGS["block_size"]
    history, computed = list(range(6, 76)), []
    engine.llm.llm_engine.reset_prefix_cache()
    with synced.turns(Sampling()) as turns:
        for seed in range(3):
            turns.submit(Turn(key=0, token_ids=history, seed=seed, max_tokens=8))
            before = turns.computed_tokens
            while turns.running:
                for _, completion in turns.step():
                    history = [*history, *completion.token_ids]
            computed.append(turns.computed_tokens - before)
    assert computed[0] == 70 and all(0 < n <= block for n in computed[1:])


def test_a_long_turn_delays_no_other(synced, engine, monkeypatch):
    monkeypatch.setattr(engine, "eos_token_ids", [])
    with synced.turns(Sampling()) as turns:
        turns.submit(Turn(key=0, token_ids=PROMPTS[0], seed=0, max_tokens=60))
        for seed in range(3):
            turns.submit(Turn(key=1, token_ids=PROMPTS[1], seed=seed, max_tokens=4))
            ended = []
            while not ended:
                ended = turns.step(timeout=0)
            assert [key for key, _ in ended] == [1] and turns.running == 1


def test_interrupted_turns_leave_no_request_behind(synced, engine):
    before = process_state()
    with pytest.raises(KeyboardInterrupt), synced.turns(Sampling()) as turns:
        turns.submit(Turn(key=0, token_ids=PROMPTS[0], seed=0, max_tokens=64))
        turns.step(timeout=0)
        assert engine.llm.llm_engine.has_unfinished_requests() and process_state() == before
        raise KeyboardInterrupt
    assert not engine.llm.llm_engine.has_unfinished_requests()
    with pytest.raises(ValueError, match=r"sampling.stop"), synced.turns(Sampling(stop=["x"])):
        pass
    synced.turn += 1
    synced.sync()
