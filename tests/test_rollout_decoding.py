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


def test_a_buffered_layer_holds_what_a_dynamic_one_does():
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, hidden_size=8)
    buffered, dynamic = buffered_cache(config, 9), DynamicCache(config=config)
    assert [type(layer) for layer in buffered.layers] == [BufferedLayer]
    for step, tokens in enumerate([4, 1, 1, 3]):
        keys, values = torch.randn(2, 3 if step > 1 else 2, 1, tokens, 4)
        found, expected = (cache.update(keys, values, 0) for cache in (buffered, dynamic))
        assert all(map(torch.equal, found, expected))
        assert buffered.get_seq_length() == dynamic.get_seq_length()
        if step == 1:
            for cache in (buffered, dynamic):
                cache.batch_select_indices(torch.tensor([1, 0, 1]))


def test_under_autocast_the_buffer_is_in_its_precision():
    layer = BufferedLayer(4)
    states = torch.randn(1, 1, 2, 4)
    with torch.autocast("cpu", torch.bfloat16):
        keys, _ = layer.update(states, states)
    assert torch.equal(keys, states.bfloat16())


def test_layers_that_forget_stay_the_models_own():
    config = MistralConfig(num_hidden_layers=1, sliding_window=8)
    assert [type(layer) for layer in buffered_cache(config, 9).layers] == [DynamicSlidingWindowLayer]


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
