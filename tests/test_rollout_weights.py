"""The stream of weights from the policy: names, values, ties, adapters, shards."""

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from lightning_grpo.errors import UserError
from lightning_grpo.rollout import HFEngine, policy_weights


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def adapted(path, **settings):
    """A LoRA model whose adapter does something."""
    policy = get_peft_model(load(path), LoraConfig(r=4, lora_alpha=8, **settings))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in policy.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return policy


def logits_of(policy):
    with torch.no_grad():
        return policy(torch.arange(6, 38)[None]).logits


@pytest.mark.parametrize("which", ["tied", "untied"])
def test_names_and_values_are_the_checkpoints(which, tiny_model_path, untied_model_path):
    path = tiny_model_path if which == "tied" else untied_model_path
    saved = load_file(f"{path}/model.safetensors")
    streamed = list(policy_weights(load(path)))
    assert len(streamed) == len({name for name, _ in streamed})
    assert {name for name, _ in streamed} == set(saved)
    for name, weight in streamed:
        assert not weight.requires_grad
        torch.testing.assert_close(weight, saved[name], rtol=0, atol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "v_proj", "down_proj"]},
        {"target_modules": "all-linear", "use_rslora": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["norm"]},
        {"target_modules": ["embed_tokens", "k_proj"]},
        {"target_modules": "all-linear", "use_dora": True},
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 2, "lm_head": 8}, "alpha_pattern": {"o_proj": 3}},
        {"target_modules": ["q_proj", "o_proj"], "bias": "lora_only"},
    ],
    ids=["some", "all-rslora", "modules-to-save", "embedding", "dora", "patterns", "bias"],
)
def test_adapters_are_merged_into_the_stream_only(settings, untied_model_path):
    policy = adapted(untied_model_path, **settings)
    if "modules_to_save" in settings:
        policy.base_model.model.model.norm.modules_to_save["default"].weight.data *= 1.1
    for name, parameter in policy.named_parameters():
        if "magnitude" in name or (name.endswith("bias") and parameter.requires_grad):
            parameter.data *= 1.2
    before = {name: p.clone() for name, p in policy.named_parameters()}
    expected = logits_of(policy)
    plain = load(untied_model_path)
    assert (logits_of(plain) - expected).abs().max() > 1e-2
    plain.load_state_dict(dict(policy_weights(policy)), strict=True)
    torch.testing.assert_close(logits_of(plain), expected, atol=1e-5, rtol=1e-5)
    for name, parameter in policy.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=0)


def test_an_already_merged_adapter_is_not_merged_twice(untied_model_path):
    policy = adapted(untied_model_path, target_modules=["q_proj"])
    expected = dict(policy_weights(policy))
    policy.merge_adapter()
    for name, weight in policy_weights(policy):
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"], "lora_bias": True},
        {"target_modules": ["embed_tokens"], "use_dora": True},
        {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    ],
    ids=["bias", "dora of an embedding", "parameters"],
)
def test_adapters_that_are_no_weight_are_refused(settings, untied_model_path):
    policy = adapted(untied_model_path, **settings)
    with pytest.raises(ValueError, match="no plain LoRA"):
        list(policy_weights(policy))


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=["head", "embedding", "saved-head"],
)
def test_adapters_of_tied_weights_are_refused(settings, tiny_model_path, untied_model_path):
    policy = adapted(tiny_model_path, **settings)
    with pytest.raises(UserError, match="ties the weights of its input embedding and output head"):
        next(policy_weights(policy))
    next(policy_weights(adapted(untied_model_path, **settings)))


def stream_shards(rank, path, saved):
    """One of two ranks: shard a policy with an adapter, then gather its weights one by one."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{saved}/store", rank=rank, world_size=2)
    policy = adapted(path, target_modules=["q_proj", "down_proj"])
    for layer in policy.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(policy)
    assert any(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in policy.parameters())
    with pytest.raises(ValueError, match="use VLLMRollout"):
        HFEngine(policy, eos_token_ids=[1], pad_id=0)
    torch.save({name: weight.clone() for name, weight in policy_weights(policy)}, f"{saved}/{rank}.pt")
    dist.destroy_process_group()


def test_shards_are_gathered_on_every_rank(untied_model_path, tmp_path):
    torch.multiprocessing.spawn(stream_shards, (untied_model_path, str(tmp_path)), nprocs=2)
    expected = dict(policy_weights(adapted(untied_model_path, target_modules=["q_proj", "down_proj"])))
    for rank in range(2):
        gathered = torch.load(tmp_path / f"{rank}.pt")
        assert list(gathered) == list(expected)
        for name, weight in gathered.items():
            assert not isinstance(weight, DTensor)
            torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-6)


def test_the_stream_makes_no_second_copy(tiny_model_path):
    policy = load(tiny_model_path)
    own = {p.data_ptr() for p in policy.parameters()}
    assert all(weight.data_ptr() in own for _, weight in policy_weights(policy))
