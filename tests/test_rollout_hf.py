"""The engine over the policy's own modules."""

import random

import pytest
import torch
from transformers import AutoModelForCausalLM

from lightning_grpo.rollout import HFEngine, Rollout, SampleRequest, Sampling, rollout_seeds

EOS, PAD = 1, 0
PROMPTS = [[4, 60, 16, 5], [4, 60, 16, 5, 8, 9, 10], [7], [30, 31, 32]]
SEEDS = [[rollout_seeds(1, 0, i, g) for g in range(4)] for i in range(len(PROMPTS))]


def sample_request(max_tokens, sampling=Sampling()):
    return SampleRequest(prompts=PROMPTS, seeds=SEEDS, max_tokens=max_tokens, sampling=sampling)


@pytest.fixture(params=["tied", "untied"])
def policy(request, tiny_model_path, untied_model_path):
    path = tiny_model_path if request.param == "tied" else untied_model_path
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def engine_of(policy, **settings):
    return HFEngine(policy, eos_token_ids=[EOS], pad_id=PAD, **settings)


def full_logprobs(policy, prompt, completion, temperature=1.0):
    ids = torch.tensor([prompt + completion])
    with torch.no_grad():
        logits = policy(ids).logits[0, len(prompt) - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_the_policys(policy, temperature):
    groups = engine_of(policy).generate(sample_request(24, Sampling(temperature=temperature)))
    lengths = {len(c.token_ids) for group in groups for c in group}
    assert len(lengths) > 2, "rows must leave the batch at different times for this test to mean anything"
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for c in group:
            expected = full_logprobs(policy, prompt, c.token_ids, temperature)
            torch.testing.assert_close(torch.tensor(c.logprobs), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("max_num_seqs", [1, 3, 16])
def test_a_sample_depends_on_its_seed_alone(policy, max_num_seqs):
    whole = engine_of(policy).generate(sample_request(24))
    order = [2, 0, 3, 1]
    parts = engine_of(policy, max_num_seqs=max_num_seqs).generate(
        SampleRequest(prompts=[PROMPTS[i] for i in order], seeds=[SEEDS[i] for i in order], max_tokens=24)
    )
    for i, group in zip(order, parts, strict=True):
        assert [c.token_ids for c in group] == [c.token_ids for c in whole[i]]


def test_other_seeds_give_other_samples(policy):
    a = engine_of(policy).generate(sample_request(24))
    b = engine_of(policy).generate(
        SampleRequest(prompts=PROMPTS, seeds=[[s + 1 for s in g] for g in SEEDS], max_tokens=24)
    )
    samples = [tuple(c.token_ids) for group in a + b for c in group]
    assert len(set(samples)) == len(samples)


def test_finish_reasons(policy):
    groups = engine_of(policy).generate(sample_request(24))
    reasons = set()
    for c in (c for group in groups for c in group):
        reasons.add(c.finish_reason)
        assert (c.finish_reason == "stop") == (c.token_ids[-1] == EOS)
        assert EOS not in c.token_ids[:-1]
        assert c.finish_reason == "stop" or len(c.token_ids) == 24
    assert reasons == {"stop", "length"}
    rollout = Rollout.collate(PROMPTS, groups, PAD)
    assert rollout.truncated.tolist() == [c.finish_reason == "length" for group in groups for c in group]


def test_greedy_is_the_argmax(policy):
    (group,) = engine_of(policy).generate(
        SampleRequest(prompts=PROMPTS[:1], seeds=[[0]], max_tokens=12, sampling=Sampling(temperature=0))
    )
    ids = list(PROMPTS[0])
    with torch.no_grad():
        for token in group[0].token_ids:
            assert token == policy(torch.tensor([ids])).logits[0, -1].argmax()
            ids.append(token)


def test_repetition_penalty_counts_prompt_and_completion(policy):
    sampling = Sampling(repetition_penalty=1e6)
    groups = engine_of(policy).generate(sample_request(12, sampling))
    for prompt, group in zip(PROMPTS, groups, strict=True):
        for c in group:
            with torch.no_grad():
                logits = policy(torch.tensor([prompt + c.token_ids])).logits[0]
            for t, logprob in enumerate(c.logprobs):
                row = logits[len(prompt) - 1 + t].clone()
                seen = list({*prompt, *c.token_ids[:t]})
                row[seen] = torch.where(row[seen] > 0, row[seen] / 1e6, row[seen] * 1e6)
                assert row.log_softmax(-1)[c.token_ids[t]].item() == pytest.approx(logprob, abs=1e-4)


def test_stop_strings_end_a_completion(policy, tokenizer):
    plain = engine_of(policy).generate(sample_request(24))
    longest = max((c for group in plain for c in group), key=lambda c: len(c.token_ids))
    stop = tokenizer.decode(longest.token_ids[4:6])
    groups = engine_of(policy, tokenizer=tokenizer).generate(sample_request(24, Sampling(stop=[stop])))
    cut = 0
    for before, after in zip((c for g in plain for c in g), (c for g in groups for c in g), strict=True):
        assert after.token_ids == before.token_ids[: len(after.token_ids)]
        text = tokenizer.decode(after.token_ids)
        if len(after.token_ids) < len(before.token_ids):
            cut += 1
            assert text.endswith(stop) and after.finish_reason == "stop"
        else:
            assert stop not in tokenizer.decode(after.token_ids[:-1])
    assert cut >= 1
    with pytest.raises(ValueError, match="stop strings need"):
        engine_of(policy).generate(sample_request(24, Sampling(stop=[stop])))


@pytest.mark.parametrize("max_num_seqs", [3, 16])
def test_a_cutoff_cuts_the_last_ones_and_keeps_every_group_whole(policy, max_num_seqs):
    engine = engine_of(policy, max_num_seqs=max_num_seqs)
    whole = engine.generate(sample_request(64))
    heard = []
    cut = engine.generate(
        sample_request(64, Sampling(cutoff=0.5)),
        lambda i, group: heard.append(i),
    )
    pairs = [pair for groups in zip(whole, cut, strict=True) for pair in zip(*groups, strict=True)]
    short = [(a, b) for a, b in pairs if b.finish_reason == "abort"]
    assert 1 <= len(short) <= min(8, max_num_seqs)  # half of 16 at most, and of the batch sampled last
    for a, b in pairs:
        n = len(b.token_ids)
        assert n >= 1 and b.token_ids == a.token_ids[:n] and b.logprobs == a.logprobs[:n] and len(b.versions) == n
        assert n < len(a.token_ids) if b.finish_reason == "abort" else b == a
    assert sorted(heard) == [0, 1, 2, 3]
    assert Rollout.collate(PROMPTS, cut, PAD).truncated.sum() == sum(b.finish_reason != "stop" for _, b in pairs)


@pytest.mark.parametrize("cutoff", [0.0, 1.5])
def test_a_cutoff_that_is_no_share_is_refused(cutoff):
    with pytest.raises(ValueError, match=r"sampling.cutoff is .*; set a number in \(0, 1\]"):
        Sampling(cutoff=cutoff)


def test_groups_are_heard_of_as_they_finish(policy):
    heard = {}
    groups = engine_of(policy).generate(sample_request(24), lambda i, group: heard.setdefault(i, list(group)))
    assert [heard[i] for i in range(len(PROMPTS))] == groups


def test_generation_leaves_modes_and_generators_alone(policy):
    policy.train()
    policy.model.layers[1].eval()
    modes = [module.training for module in policy.modules()]
    states = torch.get_rng_state().tolist(), random.getstate()
    engine = engine_of(policy)
    engine.generate(sample_request(4))
    engine.logprobs(PROMPTS[:2])
    assert [module.training for module in policy.modules()] == modes
    assert (torch.get_rng_state().tolist(), random.getstate()) == states
    assert all(p.grad is None for p in policy.parameters())


def test_scores_are_at_temperature_one(policy):
    sequences = [[4, 60, 16, 5, 8], [9, 10]]
    for ids, scored in zip(sequences, engine_of(policy).logprobs(sequences), strict=True):
        torch.testing.assert_close(scored, full_logprobs(policy, ids[:1], ids[1:]), atol=1e-5, rtol=0)


def test_versions_mark_the_samples(policy):
    engine = engine_of(policy)
    engine.update_weights(iter(()), 7)
    groups = engine.generate(sample_request(2))
    assert {v for group in groups for c in group for v in c.versions} == {7}


def test_no_room_for_a_row_is_refused(policy):
    with pytest.raises(ValueError, match="max_num_seqs is 0"):
        engine_of(policy, max_num_seqs=0)
