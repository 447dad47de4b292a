"""Base weights in 4 bits: the policy trains its adapters, and engines and exports have the same policy."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from engines import move
from fitting import data, fit, largest_difference, module, parameters
from transformers import AutoModelForCausalLM

from lightning_grpo import GRPOModule
from lightning_grpo.configure import ModelShape
from lightning_grpo.errors import UserError
from lightning_grpo.export import export
from lightning_grpo.monitor.checkpoint import Checkpoint
from lightning_grpo.objective import ObjectiveConfig, RolloutCorrection
from lightning_grpo.policy import LoRA, load_policy
from lightning_grpo.policy.quantized import BYTES_PER_WEIGHT, ROUNDING
from lightning_grpo.policy.weights import policy_weights
from lightning_grpo.rollout import HFEngine, VLLMRollout
from lightning_grpo.rollout.hf.engine import eval_mode
from lightning_grpo.rollout.verify import Tolerance
from lightning_grpo.rollout.vllm.callback import require_sendable
from lightning_grpo.training.checks import check_quantization

IDS = torch.randint(6, 80, (2, 24), generator=torch.Generator().manual_seed(0))
NF4 = {"quantization": "nf4", "lora": LoRA(rank=4)}
FEW = {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 32}


@pytest.fixture
def policy(tiny_model_path):
    """A policy whose adapters do something."""
    policy = load_policy(tiny_model_path, **NF4)
    move(policy, seed=0)
    return policy


def logits_of(policy):
    with torch.no_grad():
        return policy.eval()(IDS).logits


def test_linear_layers_have_4_bits_and_the_head_has_not(tiny_model_path, policy):
    layers = [name for name, module in policy.named_modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14 and not any("lm_head" in name for name in layers)
    whole = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    assert (logits_of(load_policy(tiny_model_path, **NF4)) - logits_of(whole)).abs().max() > 0.1


def test_the_memory_is_as_predicted(policy):
    stored = [p for p in policy.parameters() if hasattr(p, "quant_state")]
    scales = [scale for p in stored for scale in (p.quant_state.absmax, p.quant_state.state2.absmax)]
    taken = sum(tensor.numel() * tensor.element_size() for tensor in (*stored, *scales))
    assert taken == pytest.approx(BYTES_PER_WEIGHT * ModelShape.from_config(policy.config).linear, rel=0.01)


def test_gradients_are_those_of_the_dequantized_model_also_after_evaluation(policy):
    """bitsandbytes repacks the weights in evaluation on some processors, and then yields no gradient."""
    with eval_mode(policy), torch.no_grad():
        evaluated = policy(IDS).logits
    trained = policy(IDS).logits
    assert torch.equal(evaluated, trained)
    trained.log_softmax(-1)[..., 7].sum().backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters() if p.requires_grad}

    twin = load_policy(policy.get_base_model().name_or_path, lora=LoRA(rank=4))
    move(twin, seed=0)
    weights = dict(policy_weights(load_policy(policy.get_base_model().name_or_path, **NF4)))
    for name, parameter in twin.named_parameters():
        if not parameter.requires_grad:
            parameter.data.copy_(weights[name.removeprefix("base_model.model.").replace(".base_layer", "")])
    twin(IDS).logits.log_softmax(-1)[..., 7].sum().backward()
    expected = {name: p.grad for name, p in twin.named_parameters() if p.requires_grad}
    assert min(float(gradient.abs().max()) for gradient in expected.values()) > 0
    assert largest_difference(gradients, expected) < 1e-3


def test_an_engine_gets_the_rounded_weights_with_the_adapter(tiny_model_path, policy):
    twin = AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)
    twin.load_state_dict(dict(policy_weights(policy)), strict=False)
    twin.tie_weights()
    torch.testing.assert_close(logits_of(twin), logits_of(policy), atol=1e-4, rtol=1e-4)


def test_a_run_resumes_and_its_exports_are_the_policy(tiny_model_path, tmp_path):
    settings = NF4 | {"objective": ObjectiveConfig(beta=0.1)}
    policy = module(tiny_model_path, **settings)
    record = fit(tmp_path / "run", policy, steps=2, callbacks=[Checkpoint()], enable_checkpointing=True)
    assert record["kl"][0] == 0 < record["grad_norm"][0]
    assert max(record["sampling/kl"]) < 1e-6  # the policy samples itself
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    resumed = module(tiny_model_path, **settings)
    fit(tmp_path / "run", resumed, steps=2, ckpt_path=checkpoint)
    trained = {name: p for name, p in parameters(policy).items() if "lora_" in name}
    assert largest_difference(trained, {name: parameters(resumed)[name] for name in trained}) == 0
    with pytest.raises(UserError, match="quantization is None, but the checkpoint's adapters were trained with nf4"):
        fit(tmp_path / "run", module(tiny_model_path, lora=LoRA(rank=4)), data(), ckpt_path=checkpoint)

    assert export(checkpoint, tmp_path / "adapter").is_adapter
    export(checkpoint, tmp_path / "merged", merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits_of(merged), logits_of(policy.policy), atol=1e-4, rtol=1e-4)
    loaded = GRPOModule.load_from_checkpoint(checkpoint)
    assert torch.equal(logits_of(loaded.policy), logits_of(policy.policy))


def test_mixed_precision_trains(tiny_model_path, tmp_path):
    record = fit(tmp_path, module(tiny_model_path, **NF4), steps=2, precision="bf16-mixed")
    assert min(record["grad_norm"]) > 0 and max(record["sampling/kl"]) < 1e-2


def test_what_4_bits_can_not_do_is_refused(tiny_model_path, tmp_path):
    with pytest.raises(UserError, match=r"quantization is nf4, whose weights can't be trained; set lora"):
        fit(tmp_path, module(tiny_model_path, quantization="nf4"))
    with pytest.raises(UserError, match=r"quantization is nf4, and trainer\.strategy shards the weights"):
        check_quantization("nf4", LoRA(), is_sharded=True)
    with pytest.raises(UserError, match="quantization is nf4, but from_scratch is true"):
        load_policy(tiny_model_path, from_scratch=True, **NF4)
    require_sendable(module(tiny_model_path, **NF4), "merged")
    with pytest.raises(UserError, match="set rollout lora: merged, which sends the rounded weights"):
        require_sendable(module(tiny_model_path, **NF4), "adapter")


def test_without_bitsandbytes_the_package_is_named(tiny_model_path, monkeypatch):
    monkeypatch.setattr("lightning_grpo.policy.quantized.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'lightning-grpo\[bitsandbytes\]'"):
        load_policy(tiny_model_path, **NF4)


def test_the_tolerance_follows_from_the_rounding_to_4_bits():
    exact, rounded = (Tolerance.of([torch.float32], 12.0, rounding) for rounding in (0.0, ROUNDING))
    assert rounded.mean == pytest.approx(4 * ROUNDING * 12) and exact.mean < 1e-3 * rounded.mean


@pytest.mark.vllm
@pytest.mark.parametrize("lora", ["merged", "adapter"])
def test_vllm_samples_the_rounded_weights_or_its_mismatch_is_measured(tiny_model_path, tmp_path, lora, caplog):
    corrected = ObjectiveConfig(rollout_correction=RolloutCorrection())
    policy = module(tiny_model_path, objective=corrected, **NF4)
    record = fit(tmp_path, policy, steps=2, rollout=VLLMRollout(lora=lora, **FEW))
    if lora == "merged":
        assert max(record["sampling/kl"]) < 1e-6
    else:
        assert min(record["sampling/kl"]) > 1e-4
        assert caplog.text.count("The engine has the checkpoint's own weights, and the policy has them in 4 bits") == 1


def test_sampling_with_the_policys_own_modules_is_the_policy(policy):
    sequences = IDS.tolist()
    scored = HFEngine(policy, eos_token_ids=[1], pad_id=0).logprobs(sequences)
    expected = logits_of(policy).log_softmax(-1)[:, :-1].gather(-1, IDS[:, 1:, None])[..., 0]
    torch.testing.assert_close(torch.stack(scored), expected, atol=1e-5, rtol=0)
