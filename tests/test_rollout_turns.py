"""Conversations turn by turn with the policy's own modules; vLLM's are in the tests of its engines."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from engines import EOS, PROMPTS, CopyEngine, assert_turns_are_completions, converse, perturb
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
)

from lightning_grpo.rollout import Engine, HFEngine, Sampling, SyncedEngine, Turn, policy_weights

# Groups of equal prompts, as in a rollout.
BEGINNINGS = [prompt for prompt in PROMPTS for _ in range(3)]

SMALL = {"vocab_size": 106, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
ROTARY = SMALL | {"intermediate_size": 128, "num_key_value_heads": 2, "initializer_range": 0.1}
KINDS = {
    "eager": (LlamaConfig(**ROTARY), "SlotTurns"),
    "learned positions": (GPT2Config(vocab_size=106, n_embd=64, n_layer=2, n_head=2), "SlotTurns"),
    "positions from the mask": (OPTConfig(**SMALL, ffn_dim=128, word_embed_proj_dim=64), "SlotTurns"),
    "biases for distances": (BloomConfig(vocab_size=106, hidden_size=64, n_layer=2, n_head=2), "SlotTurns"),
    "no choice of attention": (FalconConfig(**SMALL), "SlotTurns"),
    "sliding windows": (MistralConfig(**ROTARY, sliding_window=8), "BatchTurns"),
    "some sliding windows": (
        Gemma3TextConfig(**ROTARY, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"]),
        "BatchTurns",
    ),
}


@pytest.fixture
def policy(tiny_model_path):
    return AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)


def engine_of(policy, **settings):
    return HFEngine(policy, eos_token_ids=[EOS], pad_id=0, **settings)


@pytest.mark.parametrize("max_num_seqs", [1, 4, 128])
def test_a_turn_is_the_completion_of_all_tokens_before_it(policy, max_num_seqs):
    engine = engine_of(policy, max_num_seqs=max_num_seqs)
    sampled, _ = converse(engine, BEGINNINGS)
    assert len(sampled) == 3 * len(BEGINNINGS)
    assert len({len(completion.token_ids) for _, completion in sampled}) > 2, "turns must end at different times"
    assert_turns_are_completions(engine, sampled)


@pytest.mark.parametrize("kind", KINDS)
def test_turns_of_other_models(kind):
    config, expected = KINDS[kind]
    attention = {"attn_implementation": "eager"} if kind == "eager" else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        engine = engine_of(AutoModelForCausalLM.from_config(config, **attention), max_num_seqs=4)
    with engine.turns(Sampling()) as turns:
        assert type(turns).__name__ == expected
    sampled, _ = converse(engine, BEGINNINGS[:6], num_turns=2)
    assert len(sampled) == 12
    assert_turns_are_completions(engine, sampled)


def test_the_order_of_submission_does_not_matter(policy):
    results = []
    for keys in ([0, 1, 2], [2, 0, 1]):
        with engine_of(policy, max_num_seqs=2).turns(Sampling()) as turns:
            for key in keys:
                turns.submit(Turn(key=key, token_ids=PROMPTS[key], seed=key, max_tokens=12))
            ended = {}
            while turns.running:
                ended |= dict(turns.step())
        results.append({key: completion.token_ids for key, completion in ended.items()})
    assert results[0] == results[1] and results[0].keys() == {0, 1, 2}


@pytest.mark.parametrize("kind", ["all positions", "sliding windows"])
def test_a_long_turn_delays_no_other(policy, kind):
    if kind == "sliding windows":
        policy = AutoModelForCausalLM.from_config(KINDS[kind][0])
    engine = HFEngine(policy, eos_token_ids=[], pad_id=0)
    with engine.turns(Sampling()) as turns:
        turns.submit(Turn(key=0, token_ids=PROMPTS[0], seed=0, max_tokens=40))
        for number in range(5):
            turns.submit(Turn(key=1, token_ids=[*PROMPTS[1], *[9] * number], seed=number, max_tokens=4))
            ended = []
            while not ended:
                ended = turns.step()
            assert [key for key, _ in ended] == [1] and turns.running == 1


def test_only_new_tokens_are_computed(policy):
    sampled, computed = converse(engine_of(policy), BEGINNINGS)
    before = {key: len(prompt) for key, prompt in enumerate(BEGINNINGS)}
    expected = sum(map(len, PROMPTS))  # each prompt once
    for turn, completion in sampled:
        # The last sampled token, which no forward pass has had as its input, and the observation.
        expected += len(turn.token_ids) - before[turn.key]
        before[turn.key] = len(turn.token_ids) + len(completion.token_ids) - 1
    assert computed == expected
    with engine_of(policy).turns(Sampling()) as turns:
        for key in (0, 1):  # the second of them begins while the first is running
            turns.submit(Turn(key=key, token_ids=BEGINNINGS[3], seed=0, max_tokens=9))
            ended = turns.step(timeout=0)
        assert turns.computed_tokens == len(BEGINNINGS[3]) + 1
        while turns.running:
            ended += turns.step()
    assert ended[0][1] == replace(ended[1][1], logprobs=pytest.approx(ended[1][1].logprobs, abs=1e-4))
    # With a single row the conversations alternate, and each begins again.
    sampled, computed = converse(engine_of(policy, max_num_seqs=1), [PROMPTS[0], PROMPTS[1]])
    assert computed > sum(len(PROMPTS[key]) for key in (0, 1))


def test_a_conversation_whose_tokens_change_is_computed_from_the_change_on(policy):
    engine = engine_of(policy)
    history = list(range(10, 40))
    changed = [*history[:20], 99, *history[21:]]
    turns_of = [Turn(key=0, token_ids=ids, seed=1, max_tokens=6) for ids in (history, changed, changed[:12])]
    sampled, computed = [], []
    with engine.turns(Sampling()) as turns:
        for turn in turns_of:
            turns.submit(turn)
            while turns.running:
                sampled += [(turn, completion) for _, completion in turns.step()]
            computed.append(turns.computed_tokens)
    assert computed == [30, 30 + 10, 30 + 10 + 1]
    assert_turns_are_completions(engine, sampled)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=0), Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.3), Sampling(stop=["a", "b"])],
    ids=["greedy", "penalty", "stop"],
)
def test_options_of_sampling(policy, tokenizer, sampling):
    engine = engine_of(policy, tokenizer=tokenizer)
    sampled, _ = converse(engine, PROMPTS, sampling=sampling)
    assert_turns_are_completions(engine, sampled, sampling)
    with pytest.raises(ValueError, match="stop strings need"), engine_of(policy).turns(Sampling(stop=["x"])):
        pass


def test_under_autocast_turns_are_completions_up_to_its_rounding(policy):
    engine = engine_of(policy, context=lambda: torch.autocast("cpu", torch.bfloat16))
    sampled, _ = converse(engine, PROMPTS, sampling=Sampling(temperature=0))
    with torch.no_grad():
        for turn, completion in sampled:
            logits = policy(torch.tensor([[*turn.token_ids, *completion.token_ids]])).logits[0].log_softmax(-1)
            scored = logits[len(turn.token_ids) - 1 : -1].gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
            torch.testing.assert_close(torch.tensor(completion.logprobs), scored, atol=0.3, rtol=0)


def test_the_cache_is_freed_at_the_end_without_a_garbage_collection(policy):
    gc.disable()
    try:
        with engine_of(policy).turns(Sampling()) as turns:
            turns.submit(Turn(key=0, token_ids=PROMPTS[0], seed=0, max_tokens=3))
            while turns.running:
                turns.step()
            buffer = weakref.ref(turns._cache.layers[0].buffers[0])
        assert buffer() is not None
        del turns
        assert buffer() is None
    finally:
        gc.enable()


def test_modes_and_gradients_are_restored(policy):
    policy.train()
    with pytest.raises(KeyError), engine_of(policy).turns(Sampling()) as turns:
        turns.submit(Turn(key=0, token_ids=PROMPTS[0], seed=0, max_tokens=30))
        turns.step(timeout=0)
        raise KeyError
    assert policy.training and torch.is_grad_enabled()
    assert converse(engine_of(policy), PROMPTS, num_turns=1)


def test_engines_for_single_completions_say_so():
    class Single(Engine):
        generate = update_weights = logprobs = None

    with pytest.raises(ValueError, match=r"Single samples single completions .*; use HFRollout, VLLMRollout"):
        Single().turns(Sampling())


def synced_with(engine, policy):
    synced = SyncedEngine(
        engine,
        version=lambda: synced.turn,
        weights=lambda: policy_weights(policy),
        score=engine_of(policy).logprobs,
        vocab_size=policy.config.vocab_size,
    )
    synced.turn = 0
    return synced


def test_turns_are_sampled_with_the_policys_weights(policy):
    engine = CopyEngine(policy, eos_token_ids=[EOS], pad_id=0)
    synced = synced_with(engine, policy)
    first, _ = converse(synced, PROMPTS)
    perturb(policy)
    synced.turn = 1
    second, _ = converse(synced, PROMPTS)
    assert [{v for _, c in sampled for v in c.versions} for sampled in (first, second)] == [{0}, {1}]
    assert_turns_are_completions(engine, second)
    assert {tuple(c.token_ids) for _, c in first} != {tuple(c.token_ids) for _, c in second}


def test_turns_in_the_background_keep_their_version(policy):
    engine = CopyEngine(policy, eos_token_ids=[EOS], pad_id=0)
    synced = synced_with(engine, policy)
    ahead = synced.run_in_background(lambda: converse(synced, BEGINNINGS))
    perturb(policy)
    synced.turn = 1
    synced.sync()
    assert ahead.done(), "the sync must wait for the turns that are sampled with the earlier weights"
    assert {v for _, c in ahead.result()[0] for v in c.versions} == {0}
    assert {v for _, c in converse(synced, PROMPTS)[0] for v in c.versions} == {1}
