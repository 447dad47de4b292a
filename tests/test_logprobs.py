"""completion_logprobs against log_softmax over a model's own logits, for many architectures and wrappers."""

import itertools
import logging
import os

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_grpo.errors import UserError
from lightning_grpo.policy import logprobs
from lightning_grpo.policy.attention import NAME
from lightning_grpo.policy.load import compute_head_in_float32
from lightning_grpo.policy.logprobs import completion_logprobs

V = 211
SMALL = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
# Windows shorter than the sequences, so that a cache which forgets is put to the test.
MODELS = {
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Qwen3": {"head_dim": 8},
    "Gemma2": {"head_dim": 8, "sliding_window": 6, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "Gemma3": {"head_dim": 8, "sliding_window": 6},
    "GPT2": {"hidden_size": 32, "n_positions": 64, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "Mistral": {"sliding_window": 5},
    "Phi": {"num_key_value_heads": 4},
    "Qwen3Moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "Cohere": {"logit_scale": 0.25},
    "Granite": {"logits_scaling": 2.0},
}
# Rows with padding, and one row without.
ATTENTIONS = {"padded": "sdpa", "packed": NAME}


def make(name: str, attention: str = "sdpa", **overrides) -> nn.Module:
    config = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config"))
    model = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    settings = SMALL if name != "GPT2" else {"vocab_size": V, "n_layer": 2, "n_head": 4, "eos_token_id": 1}
    torch.manual_seed(0)
    model = model(config(**settings | MODELS[name] | overrides)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(2)
    model.set_attn_implementation(attention)
    return model


def batch(groups: int = 2, of: int = 3, P: int = 9, T: int = 7) -> dict:
    """Two groups with prompts of 5 and 7 tokens; completions of 1 to 5 tokens and one of none; columns without any."""
    g = torch.Generator().manual_seed(0)
    N = groups * of
    prompt_ids = torch.randint(3, V, (groups, P), generator=g).repeat_interleave(of, 0)
    prompts = torch.tensor([5, 7])[:groups].repeat_interleave(of)
    completions = torch.tensor([5, 3, 1, 5, 4, 0])[:N]
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": torch.arange(P)[None] >= P - prompts[:, None],
        "completion_ids": torch.randint(3, V, (N, T), generator=g),
        "completion_mask": torch.arange(T)[None] < completions[:, None],
    }


def naive(model, rows, temperature=1.0, entropy_grad=False, grad_norm=False):
    """The definition, on the model's own logits."""
    mask = torch.cat([rows["prompt_mask"], rows["completion_mask"]], 1).long()
    ids = torch.cat([rows["prompt_ids"], rows["completion_ids"]], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    P = rows["prompt_ids"].shape[1]
    logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, P - 1 : -1]
    logp = (logits.float() / torch.as_tensor(temperature).reshape(-1, 1, 1)).log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    picked = logp.gather(2, rows["completion_ids"][..., None]).squeeze(2)
    slope = nn.functional.one_hot(rows["completion_ids"], logp.shape[-1]) - logp.exp()
    results = (picked, entropy, slope.square().sum(-1))[: 3 if grad_norm else 2]
    return tuple(torch.where(rows["completion_mask"], x, 0) for x in results)


def solve(function, model, rows, **options):
    """Log-probs, entropy and all parameter gradients of Σ c·logprob (+ Σ c·entropy)."""
    model.zero_grad()
    logprobs, entropy = function(model, rows, **options)
    c = torch.randn(logprobs.shape, generator=torch.Generator().manual_seed(1))
    loss = (c * logprobs).sum() + ((c * entropy).sum() if options.get("entropy_grad") else 0)
    loss.backward()
    gradients = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    return logprobs.detach(), entropy.detach(), gradients


def ours(model, rows, **options):
    return completion_logprobs(model, **rows, **options)


def assert_same(found, expected, atol=1e-5, gradients=1e-5):
    for x, y in zip(found[:2], expected[:2], strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, y, rtol=0, atol=atol)
    assert found[2].keys() == expected[2].keys()
    largest = max(y.norm() for y in expected[2].values())
    for name, y in expected[2].items():
        assert (found[2][name] - y).norm() <= gradients * largest, name


@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
@pytest.mark.parametrize("share_prompt", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_any_architecture(name, share_prompt, attention, caplog):
    model, rows = make(name, attention), batch()
    expected = solve(naive, model, rows, temperature=0.7)
    found = solve(ours, model, rows, temperature=0.7, share_prompt=share_prompt)
    assert expected[0].std() > 0.5, "the models must tell tokens apart, or nothing is tested"
    assert_same(found, expected)
    assert not [r for r in caplog.records if r.name.startswith("lightning_grpo")], "nothing here should fall back"


@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
@pytest.mark.parametrize("share_prompt", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_tokens_that_are_not_scored_are_context(name, share_prompt, attention):
    """A mask with holes, as of completions that hold what others wrote, only selects."""
    model, rows = make(name, attention), batch()
    whole = ours(model, rows, share_prompt=share_prompt)
    own = rows["completion_mask"] & torch.tensor([True, False, False, True, True, True, True])
    assert (rows["completion_mask"] & ~own).sum() == 8
    for found, expected in zip(
        ours(model, rows | {"completion_mask": own}, share_prompt=share_prompt), whole, strict=True
    ):
        torch.testing.assert_close(found, torch.where(own, expected, 0.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("head", ["linear", "a module", "unknown"])
@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
@pytest.mark.parametrize("share_prompt", [False, True])
def test_squared_norms_of_the_gradients(monkeypatch, share_prompt, attention, head):
    model, rows = make("Llama", attention), batch()
    if head == "a module":
        model.lm_head = nn.Sequential(model.lm_head)
    elif head == "unknown":
        monkeypatch.setattr(logprobs, "head_of", lambda *_: None)
    found = ours(model, rows, temperature=0.7, share_prompt=share_prompt, grad_norm=True)
    assert not found[2].requires_grad and found[2].max() > 0.5
    for x, y in zip(found, naive(model, rows, temperature=0.7, grad_norm=True), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)


def test_whole_logits_never_exist(monkeypatch):
    """No linear layer's output is as wide as the vocabulary."""
    model, rows = make("Llama"), batch()
    ours(model, rows)
    widths = []
    linear = nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *args: widths.append(len(args[1])) or linear(*args))
    ours(model, rows, share_prompt=False)
    assert widths and V not in widths


def test_shared_prompts_are_computed_once():
    model, rows = make("Llama"), batch()
    ours(model, rows)
    tokens = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    ours(model, rows, share_prompt=False)
    ours(model, rows)
    hook.remove()
    # Columns without a token are gone: prompts of at most 7, completions of at most 5, the last of which predicts none.
    assert tokens == [6 * (7 + 4), 2 * 7, 6 * 4]


@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
def test_prompts_that_differ_in_their_mask_only_are_different(attention):
    model, rows = make("Llama", attention), batch()
    rows["prompt_mask"][1, 4] = True
    assert_same(solve(ours, model, rows), solve(naive, model, rows))


@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
@pytest.mark.parametrize("share_prompt", [False, True])
def test_entropy_gradient_and_temperature_of_each_row(share_prompt, attention):
    model, rows = make("Gemma2", attention), batch()
    options = {"temperature": torch.linspace(0.5, 1.5, 6), "entropy_grad": True}
    assert_same(solve(ours, model, rows, share_prompt=share_prompt, **options), solve(naive, model, rows, **options))


def test_entropy_has_no_gradient_unless_asked():
    assert not ours(make("Llama"), batch())[1].requires_grad


@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
@pytest.mark.parametrize("share_prompt", [False, True])
def test_coefficient_known_ahead(share_prompt, attention):
    model, rows = make("Llama", attention), batch()
    c = torch.randn(rows["completion_ids"].shape, generator=torch.Generator().manual_seed(1))
    assert_same(solve(ours, model, rows, share_prompt=share_prompt, coefficient=c), solve(naive, model, rows))


@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
def test_no_completion_token_at_all(attention):
    """The outputs still hang on the parameters, or a distributed backward would wait for ever."""
    model, rows = make("Llama", attention), batch()
    rows["completion_mask"][:] = False
    logprobs, entropy, gradients = solve(ours, model, rows)
    assert (logprobs == 0).all() and (entropy == 0).all()
    assert gradients and all((x == 0).all() for x in gradients.values())


@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
@pytest.mark.parametrize("share_prompt", [False, True])
def test_lora_and_its_reference(share_prompt, attention):
    model, rows = make("Llama", attention), batch()
    before = solve(naive, model, rows)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    expected = solve(naive, model, rows)
    assert_same(solve(ours, model, rows, share_prompt=share_prompt), expected)
    assert (expected[0] - before[0]).abs().max() > 1e-2
    with model.disable_adapter(), torch.no_grad():
        reference = ours(model, rows, share_prompt=share_prompt)[0]
    torch.testing.assert_close(reference, before[0], rtol=0, atol=1e-5)


def test_every_parameter_of_a_mixture_of_experts_has_a_gradient():
    """DDP waits for all of them, also from a micro-batch whose tokens reach few of the experts."""
    model = make("Qwen3Moe", num_experts=32, num_experts_per_tok=1)
    ours(model, {name: value[:1] for name, value in batch().items()})[0].sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_lora_on_the_head(caplog):
    """A head that is no plain linear layer computes its own logits, a chunk of tokens at a time."""
    model, rows = make("Gemma2", tie_word_embeddings=False), batch()
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    model = get_peft_model(model, config)
    options = {"entropy_grad": True, "temperature": 0.7}
    expected = solve(naive, model, rows, **options)
    with caplog.at_level(logging.WARNING):
        assert_same(solve(ours, model, rows, **options), expected)
        ours(model, rows)
    assert len(caplog.records) == 1 and "the head is a Linear" in caplog.text
    assert any("lm_head.lora_A" in name for name in expected[2])


def test_padded_vocabulary():
    """A head with more rows than ids: what the model cuts off takes no part in the softmax."""

    class Padded(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits[..., : V - 11]
            return out

    torch.manual_seed(0)
    model, rows = Padded(transformers.LlamaConfig(**SMALL)), batch()
    rows["completion_ids"] %= V - 11
    assert_same(solve(ours, model, rows), solve(naive, model, rows))


def test_unusual_head_falls_back_to_whole_logits(caplog):
    class Unusual(transformers.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * torch.linspace(0.5, 2, V)
            return out

    torch.manual_seed(0)
    model, rows = Unusual(transformers.LlamaConfig(**SMALL)), batch()
    with caplog.at_level(logging.WARNING):
        assert_same(solve(ours, model, rows, temperature=0.7), solve(naive, model, rows, temperature=0.7))
        ours(model, rows)
    assert len(caplog.records) == 1 and "full logits" in caplog.text


def test_gradient_checkpointing_falls_back_to_unshared_prompts(caplog):
    model, rows = make("Llama"), batch()
    expected = solve(naive, model, rows)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with caplog.at_level(logging.WARNING, logger="lightning_grpo"):
        assert_same(solve(ours, model, rows), expected)
        ours(model, rows)
    assert [r.message for r in caplog.records if r.name.startswith("lightning_grpo")] == [
        "LlamaForCausalLM: prompts are computed once per row instead of once per group: "
        "gradient checkpointing drops the key-value cache"
    ]


def test_autocast_matches_the_naive_path():
    model, rows = make("Llama"), batch()
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = solve(naive, model, rows), solve(ours, model, rows)
    assert_same(found, expected, atol=0.05, gradients=0.02)
    assert all(x.dtype == torch.float32 for x in found[2].values())


@pytest.mark.parametrize("parameters", [torch.float32, torch.bfloat16], ids=["autocast", "bfloat16"])
@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Phi"])
def test_a_head_in_float32_rounds_nothing(name, parameters):
    """The logits are those of the hidden states and the weights in float32, with a tied head and a bias too."""
    model, rows = make(name).to(parameters), batch()
    seen, T = [], int(rows["completion_mask"].any(0).sum())
    model.lm_head.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach()))
    with torch.autocast("cpu", torch.bfloat16, enabled=parameters == torch.float32):
        rounded = ours(model, rows, share_prompt=False)[0]
        compute_head_in_float32(name, model)
        found, _, gradients = solve(ours, model, rows, share_prompt=False)
    head, hidden = model.lm_head, seen[-1][:, -T:]
    assert all(gradient.any() for gradient in gradients.values())
    logits = nn.functional.linear(hidden.float(), head.weight.float(), None if head.bias is None else head.bias.float())
    expected = logits.log_softmax(-1).gather(2, rows["completion_ids"][:, :T, None]).squeeze(2)
    mask = rows["completion_mask"]
    torch.testing.assert_close(found[mask], expected[mask[:, :T]], rtol=0, atol=1e-5)
    assert (rounded - found).abs().max() > 1e-4


def test_bfloat16_model():
    model, rows = make("Llama").bfloat16(), batch()
    assert_same(solve(ours, model, rows), solve(naive, model, rows), atol=0.1, gradients=0.05)


def test_a_head_that_is_not_linear_is_not_made_float32():
    model = make("Llama")
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(UserError, match="output head of Llama is a Sequential"):
        compute_head_in_float32("Llama", model)


@pytest.mark.parametrize("attention", ATTENTIONS.values(), ids=ATTENTIONS)
def test_scoring_equals_the_update_to_the_bit(attention):
    model, rows = make("Llama", attention), batch()
    with torch.autocast("cpu", torch.bfloat16):
        updating = ours(model, rows)[0]
        with torch.no_grad():
            scoring = ours(model, rows)[0]
    assert torch.equal(updating, scoring)


def test_random_numbers_are_left_alone():
    """Proving the head on a first call must not shift what dropout draws."""
    model, rows = make("GPT2", resid_pdrop=0.1), batch()
    torch.manual_seed(3)
    first = ours(model, rows)[0]
    torch.manual_seed(3)
    assert torch.equal(ours(model, rows)[0], first)


def test_the_model_is_itself_again_after_an_error():
    model, rows = make("Llama"), batch()
    ours(model, rows)
    with pytest.raises(ValueError, match=r"temperature is 0\.0"):
        ours(model, rows, temperature=0.0)
    assert "forward" not in model.lm_head.__dict__
    assert model(input_ids=rows["prompt_ids"]).logits.shape[-1] == V


def assert_sharded_heads_agree(rank: int, path: str, expected: dict) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    try:
        for name, attention in itertools.product(expected, ATTENTIONS.values()):
            model, rows = make(name, attention), batch()
            layers = model.model.layers
            for layer in layers:
                fully_shard(layer)
            if not model.config.tie_word_embeddings:
                fully_shard(model.lm_head)
            fully_shard(model)
            assert type(model.lm_head.weight).__name__ == "DTensor"
            logprobs, entropy, gradients = solve(ours, model, rows)
            assert_same((logprobs, entropy, {k: x.full_tensor() for k, x in gradients.items()}), expected[name])
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_fsdp2_sharded_head(tmp_path):
    """Two processes: an untied head sharded on its own, and a tied one in the root's group."""
    expected = {name: solve(naive, make(name), batch()) for name in ("Llama", "Gemma2")}
    torch.multiprocessing.spawn(assert_sharded_heads_agree, (str(tmp_path / "store"), expected), nprocs=2)


def test_autocast_casts_a_weight_once_and_never_without_its_gradient():
    class Casts(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._to_copy.default and args[0].shape == weight.shape
            return func(*args, **kwargs or {})

    model = make("Llama")
    weight = model.model.layers[0].mlp.gate_proj.weight
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        with torch.no_grad():
            completion_logprobs(model, **batch())
        with Casts() as casts:
            logprobs, _ = completion_logprobs(model, **batch())
    # two layers, two matrices of this shape in each
    assert casts.count == 4
    logprobs.sum().backward()
    assert float(weight.grad.norm()) > 0


def test_the_content_of_foreign_tokens_acts_through_attention_alone():
    """Tokens before a foreign one get the same gradient whatever it is; those after it see it."""
    model, rows = make("Llama"), batch()
    mask = rows["completion_mask"].clone()
    mask[:, 2:4] = False
    other = rows["completion_ids"].clone()
    other[:, 2:4] = (other[:, 2:4] + 7) % V
    assert mask[:, 4:].any()

    def solved(ids, columns):
        model.zero_grad()
        logprobs, _ = completion_logprobs(model, **rows | {"completion_ids": ids, "completion_mask": mask})
        logprobs[:, columns].sum().backward()
        return logprobs[:, columns].detach(), torch.cat([p.grad.flatten() for p in model.parameters()])

    for before, after in zip(solved(rows["completion_ids"], slice(0, 2)), solved(other, slice(0, 2)), strict=True):
        torch.testing.assert_close(before, after, rtol=0, atol=1e-6)
    for before, after in zip(
        solved(rows["completion_ids"], slice(4, None)), solved(other, slice(4, None)), strict=True
    ):
        assert (before - after).abs().max() > 1e-3
