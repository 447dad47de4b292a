"""Models that were built in Python, in place of a checkpoint."""

import gc
from pathlib import Path

import pytest
import torch
from conftest import tiny_llama
from engines import adapted, load
from fitting import fit, largest_difference, module, parameters
from peft import LoraConfig, get_peft_model

from lightning_grpo import GRPOModule
from lightning_grpo.errors import UserError
from lightning_grpo.export import export
from lightning_grpo.monitor.checkpoint import Checkpoint
from lightning_grpo.objective import ObjectiveConfig
from lightning_grpo.policy import LoRA, load_policy
from lightning_grpo.rollout import VLLMRollout
from lightning_grpo.rollout.vllm.callback import adapter_engine_args

KL = ObjectiveConfig(beta=0.1)


def test_a_model_in_memory_trains_as_its_folder_does(tiny_model_path, tmp_path):
    policies = [module(model, objective=KL) for model in (tiny_model_path, load(tiny_model_path))]
    folder, memory = ({"kl": fit(tmp_path, policy, steps=2)["kl"], **parameters(policy)} for policy in policies)
    assert folder.pop("kl") == memory.pop("kl")
    assert largest_difference(folder, memory) == 0


def test_it_is_the_object_that_is_trained_without_dropout(tiny_model_path):
    model = load(tiny_model_path)
    model.config.attention_dropout = model.model.layers[0].self_attn.attention_dropout = 0.5
    policy = module(model, dtype="bfloat16")
    policy.configure_model()
    assert policy.policy is model and model.dtype == torch.bfloat16 and model.training
    assert model.config.attention_dropout == 0 == model.model.layers[0].self_attn.attention_dropout


def test_a_peft_model_continues_from_its_adapter(tiny_model_path, tmp_path):
    policy = module(adapted(tiny_model_path, use_rslora=True), objective=KL)
    assert policy.lora.rank == 4 and policy.lora.use_rslora
    record = fit(tmp_path / "run", policy, steps=3, callbacks=[Checkpoint()], enable_checkpointing=True)
    assert record["kl"][0] == 0 < record["kl"][-1]
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    resumed = module(adapted(tiny_model_path, use_rslora=True), objective=KL)
    fit(tmp_path / "run", resumed, steps=3, ckpt_path=checkpoint)
    assert largest_difference(parameters(policy), parameters(resumed)) == 0

    with pytest.raises(UserError, match="doesn't record its base model: it was an object in Python"):
        export(checkpoint, tmp_path / "out")
    assert export(checkpoint, tmp_path / "out", model=tiny_model_path).is_adapter
    loaded = GRPOModule.load_from_checkpoint(checkpoint, model=tiny_model_path)
    assert largest_difference(parameters(policy), parameters(loaded)) == 0


def test_the_engine_gets_a_folder_without_weights(tiny_model_path):
    policy = module(load(tiny_model_path))
    policy.configure_model()
    folder = Path(policy.model_path)
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= {path.name for path in folder.iterdir()}
    assert not list(folder.glob("*.safetensors"))
    assert VLLMRollout().settings(policy)["load_format"] == "dummy"
    policy.lora = LoRA()
    with pytest.raises(UserError, match="rollout lora is adapter, but model is an object in memory"):
        adapter_engine_args(policy)
    del policy
    gc.collect()
    assert not folder.exists()


def test_what_an_object_can_not_do_is_refused(tiny_model_path, tokenizer):
    with pytest.raises(UserError, match="lora is set, but model is an object that has adapters already"):
        module(adapted(tiny_model_path), lora=LoRA())
    with pytest.raises(UserError, match="give it one unmerged adapter"):
        module(get_peft_model(load(tiny_model_path), LoraConfig(), adapter_name="other"))
    with pytest.raises(UserError, match=r"config\.name_or_path to the folder of the tokenizer"):
        module(tiny_llama(tokenizer))
    with pytest.raises(UserError, match="from_scratch is true, but model is an object"):
        module(load(tiny_model_path), from_scratch=True).configure_model()
    policy = module(load(tiny_model_path))
    policy.configure_model()
    with pytest.raises(UserError, match="call fit before other stages"):
        load_policy(policy.pretrained)


@pytest.mark.vllm
def test_vllm_samples_from_a_model_in_memory(tiny_model_path, tmp_path):
    policy = module(load(tiny_model_path))
    record = fit(tmp_path, policy, steps=2, rollout=VLLMRollout(kv_cache_memory_bytes=64 << 20, max_num_seqs=32))
    assert len(record.steps) == 2 and max(record["sampling/kl"]) < 1e-4
