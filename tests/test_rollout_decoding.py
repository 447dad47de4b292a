"""What makes decoding quick must not change what is decoded."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicSlidingWindowLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lightning_grpo.policy.attention import DECODING_NAME, decode_attention
from lightning_grpo.policy.load import load_policy
from lightning_grpo.rollout.hf.decoding import BufferedLayer, buffered_cache, decoding_mode
from lightning_grpo.rollout.hf.rows import CPU_ROWS, Row, TokenSampler, unfinished
from lightning_grpo.rollout.hf.stop import StopStrings
from lightning_grpo.rollout.types import Sampling


def test_a_buffered_layer_holds_what_a_dynamic_one_does():
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, hidden_size=8)
    buffered, dynamic = buffered_cache(config, 11), DynamicCache(config=config)
    assert [type(layer) for layer in buffered.layers] == [BufferedLayer]
    for tokens, rows, order in [(4, 2, None), (1, 2, [1, 0, 1]), (1, 3, [2, 1, 0]), (2, 3, [2, 1]), (3, 2, None)]:
        keys, values = torch.randn(2, rows, 1, tokens, 4)
        found, expected = (cache.update(keys, values, 0) for cache in (buffered, dynamic))
        assert all(map(torch.equal, found, expected))
        assert buffered.get_seq_length() == dynamic.get_seq_length()
        for cache in (buffered, dynamic) if order else ():
            cache.batch_select_indices(torch.tensor(order))


@pytest.mark.parametrize(
    ("finished", "expected"),
    [("", [0, 1, 2, 3, 4]), ("1", [0, 4, 2, 3]), ("14", [0, 3, 2]), ("034", [2, 1]), ("0123", [4]), ("01234", [])],
)
def test_few_rows_change_their_place_if_others_finish(finished, expected):
    rows = [
        Row(prompt=[], seed=0, max_tokens=1, finish_reason="stop" if str(r) in finished else None) for r in range(5)
    ]
    assert unfinished(rows) == expected


def test_under_autocast_the_buffer_is_in_its_precision():
    layer = BufferedLayer(4)
    states = torch.randn(1, 1, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        keys, _ = layer.update(states, states)
    assert torch.equal(keys, states.bfloat16())


def test_layers_that_forget_stay_the_models_own():
    config = MistralConfig(num_hidden_layers=1, sliding_window=8)
    assert [type(layer) for layer in buffered_cache(config, 9).layers] == [DynamicSlidingWindowLayer]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.3)])
def test_tokens_do_not_depend_on_the_rows_that_are_drawn_together(sampling):
    R = 2 * CPU_ROWS + 1
    logits, seen = torch.randn(R, 300), torch.rand(R, 300) < 0.1
    together, alone = ([Row(prompt=[], seed=r, max_tokens=2) for r in range(R)] for _ in range(2))
    sampler = TokenSampler(sampling=sampling, stop=StopStrings(None, []), eos_token_ids=frozenset())
    tokens = sampler(together, logits, seen)
    for r, row in enumerate(alone):
        sampler([row], logits[r : r + 1], seen[r : r + 1])
    assert tokens.tolist() == [row.token_ids[0] for row in alone]
    assert [row.logprobs for row in together] == [row.logprobs for row in alone]


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("heads", [2, 6])
def test_attention_is_sdpas(queries, heads):
    module = nn.Module()
    module.num_key_value_groups = heads // 2
    query, (key, value) = torch.randn(3, heads, queries, 8), torch.randn(2, 3, 2, 5, 8)
    mask = (torch.rand(3, 1, queries, 5) < 0.7) | torch.eye(5, dtype=torch.bool)[0]
    for options in ({"scaling": 0.3}, {"scaling": 0.3, "position_bias": torch.randn(1, heads, queries, 5)}):
        found, _ = decode_attention(module, query, key, value, mask, **options)
        expected, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("load", [AutoModelForCausalLM.from_pretrained, load_policy])
def test_the_model_is_left_as_it_was(tiny_model_path, load):
    policy = load(tiny_model_path)
    own = policy.config._attn_implementation
    with pytest.raises(KeyError), torch.autocast("cpu", torch.bfloat16, cache_enabled=False), decoding_mode(policy):
        assert policy.config._attn_implementation == DECODING_NAME
        assert torch.is_autocast_cache_enabled()
        raise KeyError
    assert policy.config._attn_implementation == own != DECODING_NAME
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        with decoding_mode(policy):
            pass
        assert not torch.is_autocast_cache_enabled()


def test_another_attention_than_sdpa_stays(tiny_model_path):
    policy = AutoModelForCausalLM.from_pretrained(tiny_model_path, attn_implementation="eager")
    with decoding_mode(policy):
        assert policy.config._attn_implementation == "eager"
