"""Exported folders, loaded by transformers and PEFT, compute what the module computes."""

from pathlib import Path

import pytest
import torch
from fitting import data, fit, module
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from lightning_grpo import GRPOModule
from lightning_grpo.export import export
from lightning_grpo.monitor.checkpoint import Checkpoint
from lightning_grpo.policy.load import LoRA


def train(root: Path, model: str, *, prompts=None, **settings) -> tuple[GRPOModule, Path]:
    """One optimizer step that moves every weight far, and its checkpoint."""
    large_steps = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=3e-2)}
    policy = module(model, **large_steps | settings)
    fit(root, policy, prompts or data(), steps=2, callbacks=[Checkpoint()], enable_checkpointing=True)
    return policy, root / "checkpoints" / "last.ckpt"


IDS = torch.randint(6, 80, (3, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logprobs(policy: torch.nn.Module) -> torch.Tensor:
    policy.eval()
    policy.set_attn_implementation("sdpa") if hasattr(policy, "set_attn_implementation") else None
    return policy(input_ids=IDS).logits.float().log_softmax(-1)


@pytest.mark.parametrize("kind", ["tiny_model_path", "untied_model_path"])
def test_whole_weights_in_transformers(kind, tmp_path, request):
    trained, checkpoint = train(tmp_path, request.getfixturevalue(kind))
    out = tmp_path / "out"
    export(checkpoint, out)
    loaded = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.dtype == torch.float32
    assert torch.equal(logprobs(loaded), logprobs(trained.policy))


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "lm_head"], ["embed_tokens", "v_proj"]])
@pytest.mark.parametrize("kind", ["tiny_model_path", "untied_model_path"])
def test_lora_as_adapter_and_merged(kind, targets, tmp_path, request):
    trained, checkpoint = train(tmp_path, request.getfixturevalue(kind), lora=LoRA(rank=4, target_modules=targets))
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    export(checkpoint, adapter)
    export(checkpoint, merged, merge=True)
    loaded = AutoPeftModelForCausalLM.from_pretrained(adapter)
    expected = logprobs(trained.policy)
    assert torch.equal(logprobs(loaded), expected)
    assert torch.allclose(logprobs(AutoModelForCausalLM.from_pretrained(merged)), expected, atol=1e-4)
    base = logprobs(AutoModelForCausalLM.from_pretrained(trained.model_path))
    assert (base - expected).abs().max() > 0.1
