"""LoRA: any option of PEFT, and training that continues from an adapter."""

import pytest
import torch
from engines import adapted, load
from fitting import Record, data, fit, largest_difference, module, parameters
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel

from lightning_grpo import GRPOModule
from lightning_grpo.errors import UserError
from lightning_grpo.export import export
from lightning_grpo.monitor.checkpoint import Checkpoint
from lightning_grpo.objective import ObjectiveConfig
from lightning_grpo.policy import LoRA, load_policy
from lightning_grpo.policy.lora import options_of

KL = ObjectiveConfig(beta=0.1)
IDS = torch.arange(6, 38)[None]
OPTIONS = {"rank_pattern": {"q_proj": 2}, "use_rslora": True, "bias": "lora_only"}


@pytest.fixture(scope="module")
def adapter(untied_model_path, tmp_path_factory) -> str:
    """An adapter that changes the untied model, as supervised finetuning leaves it."""
    folder = str(tmp_path_factory.mktemp("adapter"))
    policy = adapted(untied_model_path, lora_dropout=0.1, **OPTIONS)
    for name, parameter in policy.named_parameters():
        if name.endswith("bias") and parameter.requires_grad:
            parameter.data += 0.1
    policy.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits_of(policy):
    return policy.eval()(IDS).logits


def run(root, model: str, adapter: str | None, *, steps: int, **options) -> tuple[Record, GRPOModule]:
    policy = module(model, lora=LoRA(adapter=adapter), objective=KL)
    settings = {"callbacks": [Checkpoint()], "enable_checkpointing": True} | options
    return fit(root, policy, data(), steps=steps, accumulate=2, **settings), policy


# ── Continuing from an adapter ────────────────────────────────────────────────────────────────────────────────────


def test_the_policy_is_the_adapter_as_saved_and_its_options_are_the_folders(untied_model_path, adapter):
    policy = load_policy(untied_model_path, lora=LoRA(adapter=adapter))
    saved = PeftModel.from_pretrained(load(untied_model_path), adapter)
    assert torch.equal(logits_of(policy), logits_of(saved))
    assert (logits_of(policy) - logits_of(load(untied_model_path))).abs().max() > 0.1
    assert {"rank": 4, "alpha": 12, "options": {"bias": "lora_only"}}.items() <= vars(LoRA(adapter=adapter)).items()
    assert LoRA(adapter=adapter).dropout == 0.0  # of that training, not of the adapter


def test_the_reference_is_the_adapter_as_loaded(untied_model_path, adapter, tmp_path):
    record, policy = run(tmp_path, untied_model_path, adapter, steps=4)
    assert record["kl"][0] == 0 and record["kl"][-1] > 0
    assert policy.scorer.initial is not None
    trained = parameters(policy)
    with torch.no_grad():  # as trained again, after the reference was computed with other values
        loaded = load_policy(untied_model_path, lora=LoRA(adapter=adapter))
    assert largest_difference(trained, dict(loaded.named_parameters())) > 1e-3


def test_new_adapters_have_the_base_model_as_reference(untied_model_path, tmp_path):
    record, policy = run(tmp_path, untied_model_path, None, steps=2)
    assert record["kl"][0] == 0 and policy.scorer.initial is None


def test_a_run_from_an_adapter_resumes_with_its_reference(untied_model_path, adapter, tmp_path):
    whole, straight = run(tmp_path / "whole", untied_model_path, adapter, steps=4)
    run(tmp_path / "parts", untied_model_path, adapter, steps=3)
    last = tmp_path / "parts" / "checkpoints" / "last.ckpt"
    rest, resumed = run(tmp_path / "parts", untied_model_path, adapter, steps=4, ckpt_path=last)
    assert rest["kl"] == whole["kl"][3:] and rest["kl"][0] > 0
    assert largest_difference(parameters(straight), parameters(resumed)) == 0
    options = {name: value for name, value in vars(LoRA(adapter=adapter)).items() if name != "adapter"}
    with pytest.raises(UserError, match=rf"lora.adapter is unset, but the run began with the adapter {adapter}"):
        fit(tmp_path / "parts", module(untied_model_path, lora=LoRA(**options)), data(), ckpt_path=last)


def test_an_export_needs_the_base_model_alone(untied_model_path, adapter, tmp_path):
    copy = tmp_path / "copy"
    PeftModel.from_pretrained(load(untied_model_path), adapter).save_pretrained(copy)
    _, policy = run(tmp_path, untied_model_path, str(copy), steps=2)
    copy.rename(tmp_path / "moved")
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    exported = export(checkpoint, tmp_path / "out")
    assert exported.is_adapter and exported.saved.model == untied_model_path
    expected = logits_of(policy.policy)
    assert torch.allclose(logits_of(AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")), expected, atol=1e-5)
    assert torch.equal(logits_of(GRPOModule.load_from_checkpoint(checkpoint).policy), expected)


def test_options_that_differ_from_the_adapters_are_refused(adapter):
    with pytest.raises(UserError, match=r"lora.rank is 8, but the adapter .* has 4; leave it unset"):
        LoRA(adapter=adapter, rank=8)
    assert LoRA(adapter=adapter, rank=4, use_rslora=True) == LoRA(adapter=adapter)


def test_adapters_that_cannot_be_loaded_are_named(tiny_model_path, adapter, tmp_path):
    with pytest.raises(UserError, match=r"lora.adapter is .*, which has no adapter_config.json"):
        LoRA(adapter=str(tmp_path))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "IA3"}')
    with pytest.raises(UserError, match="an adapter of type"):
        LoRA(adapter=str(tmp_path))
    with pytest.raises(UserError, match=r"whose weights are not those of this model's adapters: \d+ differ"):
        load_policy(tiny_model_path, lora=LoRA(adapter=adapter))  # which has no biases


# ── Further options ───────────────────────────────────────────────────────────────────────────────────────────────


def test_any_field_of_peft_reaches_it(untied_model_path):
    further = {"lora_bias": True, "layers_pattern": "layers"}
    lora = LoRA(rank=4, target_modules=["q_proj"], layers_to_transform=[1], options=further)
    policy = load_policy(untied_model_path, lora=lora)
    config = policy.peft_config["default"]
    assert config.lora_bias and config.layers_pattern == "layers" and config.r == 4
    assert options_of(config)["options"] == further
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert len(trained) == 3 and all("layers.1.self_attn.q_proj" in name for name in trained)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"biases": "all"}, r"no field of the installed PEFT's LoraConfig; did you mean bias\?"),
        ({"r": 4}, "lora.options has r; set lora.rank instead"),
        ({"use_dora": True}, "set lora.use_dora instead"),
        ({"layer_replication": [[0, 1]]}, "changes the base model's weights or layers"),
        ({"task_type": "CAUSAL_LM"}, "no field of"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_other_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        LoRA(options=options)


def test_every_field_of_peft_is_known_or_refused():
    assert options_of(LoraConfig()).keys() == vars(LoRA()).keys() - {"adapter"}
    assert options_of(LoRA(rank=3, use_dora=True).config()) == {
        name: value for name, value in vars(LoRA(rank=3, use_dora=True)).items() if name != "adapter"
    }
