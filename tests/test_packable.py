"""Which models compute packed rows, and that all others are found out before a row is wrong."""

import logging

import pytest
import torch
import transformers
from test_logprobs import assert_same, batch, make, naive, ours, solve
from torch import nn

from lightning_grpo.policy.attention import NAME
from lightning_grpo.policy.packable import packs

SMALL = {"vocab_size": 211, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0}


def drops_arguments(model: nn.Module) -> None:
    """One layer does not pass the model's arguments on to its attention."""
    layer = model.model.layers[1]
    forward = layer.self_attn.forward
    layer.self_attn.forward = lambda *args, layout=None, **kwargs: forward(*args, **kwargs)


def mixes_positions(model: nn.Module) -> None:
    """A layer that adds the token before, as convolutions and recurrent layers do."""
    mlp = model.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x + nn.functional.pad(x, (0, 0, 1, -1)))


def ignores_positions(model: nn.Module) -> None:
    """Positions counted from the start of the row."""
    rotary = model.model.rotary_emb
    forward = rotary.forward
    rotary.forward = lambda x, position_ids: forward(x, torch.arange(x.shape[1])[None].expand(position_ids.shape))


def refuses_arguments(model: nn.Module) -> None:
    """A forward without further arguments."""
    forward = model.forward
    model.forward = lambda input_ids, attention_mask=None, position_ids=None, use_cache=None: forward(
        input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=use_cache
    )


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (drops_arguments, "1 of 2 layers use the layout"),
        (mixes_positions, "its logits are others"),
        (ignores_positions, "its logits are others"),
        (refuses_arguments, "unexpected keyword argument 'layout'"),
    ],
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_that_would_be_wrong_is_padded(change, reason, checkpointing, caplog):
    model, rows = make("Llama", NAME), batch()
    change(model)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    with caplog.at_level(logging.WARNING, logger="lightning_grpo"):
        found = solve(ours, model, rows, share_prompt=False)
        ours(model, rows, share_prompt=False)
    messages = [record.message for record in caplog.records if record.name.startswith("lightning_grpo")]
    assert len(messages) == 1 and "completions are padded instead of packed: " in messages[0] and reason in messages[0]
    if change in (drops_arguments, refuses_arguments):
        assert_same(found, solve(naive, model, rows))


@pytest.mark.parametrize(
    ("config", "model"),
    [("BloomConfig", "BloomForCausalLM"), ("FalconConfig", "FalconForCausalLM"), ("MambaConfig", "MambaForCausalLM")],
)
def test_other_attention_is_padded(config, model):
    torch.manual_seed(0)
    config = getattr(transformers, config)(**SMALL)
    model = getattr(transformers, model)(config)
    assert not packs(model)


@pytest.mark.parametrize(
    ("option", "value"), [("layer_types", ["full_attention", "linear_attention"]), ("attention_chunk_size", 8192)]
)
def test_layers_that_are_not_plain_attention_are_padded(option, value):
    model = make("Llama", NAME)
    setattr(model.config, option, value)
    assert not packs(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Llama", "Gemma3", "GPT2", "Qwen3Moe"])
def test_packed_in_any_precision(name, dtype):
    assert packs(make(name, NAME).to(dtype))


def test_verification_leaves_dropout_and_random_numbers_alone():
    model = make("GPT2", NAME, resid_pdrop=0.1)
    model.transformer.h[0].eval()
    training = [module.training for module in model.modules()]
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    assert packs(model)
    assert torch.equal(torch.rand(1), expected)
    assert [module.training for module in model.modules()] == training


def test_an_empty_prompt_takes_no_token_of_another_row():
    model, rows = make("Llama", NAME), batch()
    expected = ours(model, rows)[0]
    rows["prompt_mask"][5] = False
    rows["completion_mask"][5, :3] = True
    torch.testing.assert_close(ours(model, rows)[0][:5], expected[:5], rtol=0, atol=1e-5)
    before = ours(model, rows, share_prompt=False)[0][5]
    rows["prompt_ids"][:5] = 7
    torch.testing.assert_close(ours(model, rows, share_prompt=False)[0][5], before, rtol=0, atol=1e-5)


def test_one_forward_pass_has_no_padding_and_each_prompt_once():
    model, rows = make("Llama", NAME), batch()
    ours(model, rows)
    tokens = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    ours(model, rows)
    ours(model, rows, share_prompt=False)
    hook.remove()
    # prompts of 5 and 7 tokens; completions of 5, 3, 1, 5, 4 and 0, whose last tokens predict nothing
    assert tokens == [(1, 12 + 13), (1, 3 * 12 + 13)]
