"""The policy's attention in transformers' models: as exact as eager attention for packed rows, and SDPA for others."""

import pytest
import torch
import transformers
from torch import nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lightning_grpo.errors import RunError
from lightning_grpo.policy import attention
from lightning_grpo.policy.attention import NAME, train_attention
from lightning_grpo.policy.load import LoRA, frozen_copy, load_policy
from lightning_grpo.policy.logprobs import completion_logprobs
from lightning_grpo.policy.packing import Layout
from lightning_grpo.rollout.hf.decoding import decoding_mode

SMALL = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
MODELS = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "sliding_window": 6, "attn_logit_softcapping": None, "query_pre_attn_scalar": 8},
    "Mistral": {"sliding_window": 5},
}


def make(name: str, **changes) -> nn.Module:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL | MODELS[name] | changes)
    return getattr(transformers, f"{name}ForCausalLM")(config).train()


def batch(padded: bool = True) -> dict[str, torch.Tensor]:
    """Two groups of three; left-padded prompts, completions of 2 to 7 tokens."""
    g = torch.Generator().manual_seed(1)
    prompt_ids = torch.randint(2, 97, (2, 9), generator=g).repeat_interleave(3, 0)
    completion_ids = torch.randint(2, 97, (6, 7), generator=g)
    left, right = torch.tensor([0, 0, 0, 3, 3, 3])[:, None], torch.tensor([7, 2, 5, 3, 7, 4])[:, None]
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.arange(9) >= left * padded,
        "completion_ids": completion_ids,
        "completion_mask": torch.arange(7) < right.masked_fill(torch.tensor(not padded), 7),
    }


def results(model: nn.Module, attention: str, low: bool = True, padded: bool = True, share_prompt: bool = True):
    """Log-probs, and the gradient of all weights as one vector."""
    model.set_attn_implementation(attention)
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=low):
        logprobs, _ = completion_logprobs(model, **batch(padded), share_prompt=share_prompt)
    logprobs.sum().backward()
    return logprobs.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("share_prompt", [True, False])
@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_models_are_as_near_the_truth_as_with_eager_attention(name, padded, share_prompt):
    model = make(name)
    exact = results(model, "eager", low=False, padded=padded)
    both = [results(model, kind, padded=padded, share_prompt=share_prompt) for kind in (NAME, "eager")]
    ours, eager = ([((x - y).norm() / y.norm()).item() for x, y in zip(found, exact, strict=True)] for found in both)
    assert not torch.equal(both[0][1], results(model, "sdpa", padded=padded, share_prompt=share_prompt)[1])
    assert all(x < 1.3 * y + 1e-3 for x, y in zip(ours, eager, strict=True))
    assert max(ours) < 0.1


def test_in_float32_a_model_is_as_exact_as_with_sdpa():
    model = make("Llama")
    ours, theirs = results(model, NAME, low=False), results(model, "sdpa", low=False)
    for x, y in zip(ours, theirs, strict=True):
        assert (x - y).norm() <= 2e-6 * y.norm()


@pytest.mark.parametrize("share_prompt", [True, False])
def test_recomputed_layers_give_the_same_gradients(share_prompt):
    model = make("Llama")
    plain = results(model, NAME, share_prompt=share_prompt)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(torch.equal(x, y) for x, y in zip(plain, results(model, NAME, share_prompt=share_prompt), strict=True))


def test_scoring_and_training_give_the_same_logprobs():
    model = make("Llama")
    trained, _ = results(model, NAME)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scored, _ = completion_logprobs(model, **batch())
    assert torch.equal(trained, scored)


# --- one layer --------------------------------------------------------------------------------------------------------

# A prompt with two completions, and a prompt with one.
LAYOUT, SEQUENCES = Layout([2, 1], [[3, 1], [2]]), [[0, 1, 2, 3, 4], [0, 1, 5], [6, 7, 8]]


def layer(dtype: torch.dtype = torch.bfloat16, **options):
    """The attention of a row of nine tokens with `LAYOUT`, and SDPA's."""
    torch.manual_seed(0)
    module = nn.Module()
    module.num_key_value_groups = 2
    query = torch.randn(1, 4, 9, 8, dtype=dtype, requires_grad=True)
    key, value = (torch.randn(1, 2, 9, 8, dtype=dtype) for _ in range(2))
    sees = torch.zeros(9, 9, dtype=torch.bool)
    for sequence in SEQUENCES:
        causal = torch.ones(len(sequence), len(sequence), dtype=torch.bool).tril()
        if "sliding_window" in options:
            causal = causal.triu(1 - options["sliding_window"])
        sees[torch.tensor(sequence)[:, None], torch.tensor(sequence)] = causal
    ours, _ = train_attention(module, query, key, value, None, layout=LAYOUT, **options)
    return ours, sdpa_attention_forward(module, query, key, value, sees[None, None], **options)[0]


@pytest.mark.parametrize(
    "options", [{}, {"scaling": 0.2, "dropout": 0.0}, {"sliding_window": 2}, {"sliding_window": 9}]
)
@pytest.mark.parametrize(("dtype", "accuracy"), [(torch.bfloat16, 0.03), (torch.float32, 1e-6)])
def test_a_row_of_several_sequences(dtype, accuracy, options):
    ours, theirs = layer(dtype, **options)
    assert ours.is_contiguous() and ours.requires_grad
    torch.testing.assert_close(ours, theirs, rtol=accuracy, atol=accuracy)


def test_processors_without_bfloat16_compute_in_float32(monkeypatch):
    fast, theirs = layer()
    monkeypatch.setattr(attention, "_multiplies_bfloat16", lambda: False)
    slow, _ = layer()
    assert slow.dtype == torch.bfloat16
    assert (slow - theirs).abs().max() <= max(0.01, (fast - theirs).abs().max())


@pytest.mark.parametrize(
    ("options", "named"),
    [({"dropout": 0.5}, "dropout"), ({"s_aux": torch.zeros(4)}, "s_aux"), ({"cache": object()}, "cache")],
)
def test_what_would_change_the_result_is_refused(options, named):
    with pytest.raises(RunError, match=f"calls its attention with {named}, .* set attn_implementation to sdpa"):
        layer(**options)


def test_a_mask_that_is_not_of_a_window_is_refused():
    states = torch.zeros(1, 1, 9, 8)
    with pytest.raises(RunError, match="with attention_mask,"):
        train_attention(nn.Module(), states, states, states, torch.ones(1, 1, 9, 9).bool(), layout=LAYOUT)


@pytest.mark.parametrize("options", [{}, {"scaling": 0.3, "dropout": 0.5}, {"is_causal": False}])
def test_padded_rows_have_sdpas_attention(options):
    states = torch.randn(2, 1, 6, 8, generator=torch.Generator().manual_seed(0))
    results = []
    for function in (train_attention, sdpa_attention_forward):
        torch.manual_seed(1)
        results.append(function(nn.Module(), states, states, states, None, **options)[0])
    assert torch.equal(*results)


def test_autocast_decides_the_type():
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = layer(torch.float32)
    assert ours.dtype == theirs.dtype == torch.bfloat16


# --- what a policy uses -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
def test_policy_and_reference_have_it_unless_another_is_asked_for(tiny_model_path, lora):
    policy = load_policy(tiny_model_path, lora=lora)
    assert policy.config._attn_implementation == frozen_copy(policy).config._attn_implementation == NAME
    for chosen in ("sdpa", "eager"):
        policy = load_policy(tiny_model_path, lora=lora, attn_implementation=chosen)
        assert policy.config._attn_implementation == chosen


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("Falcon", {"num_hidden_layers": 2}, "sdpa"),
        ("Bloom", {"n_layer": 2}, "eager"),
        ("GptOss", {"head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}, "eager"),
    ],
)
def test_models_that_take_no_attention_by_name_have_their_own(tmp_path, name, settings, expected):
    """Trained and sampled with it, the latter also where quick decoding is asked for."""
    config = getattr(transformers, f"{name}Config")
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config(**{k: SMALL[k] for k in SMALL} | settings))
    model.save_pretrained(tmp_path)
    policy = load_policy(str(tmp_path)).eval()
    assert policy.config._attn_implementation == expected
    ids, mask = torch.arange(8).view(2, 4), torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    with torch.no_grad():
        plain = policy(input_ids=ids, attention_mask=mask).logits
        with decoding_mode(policy):
            quick = policy(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(quick[1], plain[1]) and torch.equal(quick[0, 1:], plain[0, 1:])


def test_its_name_is_not_saved_with_a_checkpoint(tiny_model_path, tmp_path):
    load_policy(tiny_model_path).save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text()
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"
