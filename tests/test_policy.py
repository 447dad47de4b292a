"""Loading: precision, adapters, random weights, and what is said of a folder that is no model."""

import pytest
import torch
from gguf_to_hf import main as convert
from transformers import AutoConfig, Gemma3Config

from lightning_grpo.policy.load import LoRA, frozen_copy, load_config, load_policy, load_tokenizer


def test_master_weights_are_float32_and_the_policy_trains(tiny_model_path):
    policy = load_policy(tiny_model_path)
    assert policy.training
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert load_policy(tiny_model_path, dtype="bfloat16").dtype == torch.bfloat16


def test_random_weights_follow_the_seed_and_leave_the_global_generator(tiny_model_path):
    before = torch.get_rng_state()
    one, same, other = (load_policy(tiny_model_path, from_scratch=True, seed=seed) for seed in (3, 3, 4))
    weights = [next(p.parameters()) for p in (one, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), before)


def test_lora_trains_its_adapters_alone(tiny_model_path):
    policy = load_policy(tiny_model_path, lora=LoRA(rank=2))
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_the_reference_is_frozen_and_apart(tiny_model_path):
    policy = load_policy(tiny_model_path)
    reference = frozen_copy(policy)
    assert not reference.training and not any(p.requires_grad for p in reference.parameters())
    with torch.no_grad():
        next(policy.parameters()).add_(1)
    assert not torch.equal(next(policy.parameters()), next(reference.parameters()))


def test_dropout_is_off(tiny_model_path, tmp_path):
    config = AutoConfig.from_pretrained(tiny_model_path)
    config.attention_dropout = 0.5
    config.save_pretrained(tmp_path)
    assert load_config(str(tmp_path)).attention_dropout == 0


def test_dropout_is_off_in_nested_configurations_too(tmp_path):
    inner = {"attention_dropout": 0.5, "num_hidden_layers": 1}
    Gemma3Config(text_config=inner, vision_config={"attention_dropout": 0.25}).save_pretrained(tmp_path)
    config = load_config(str(tmp_path))
    assert config.text_config.attention_dropout == 0 == config.vision_config.attention_dropout


@pytest.mark.parametrize("load", [load_tokenizer, load_config, load_policy])
def test_a_folder_that_is_no_model_is_named_with_what_it_holds(tmp_path, load):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match=r"notes\.txt"):
        load(str(tmp_path))


@pytest.mark.parametrize(
    ("options", "named"), [({"rank": 0}, "lora.rank is 0"), ({"dropout": 1.0}, "lora.dropout is 1")]
)
def test_lora_options_are_checked(options, named):
    with pytest.raises(ValueError, match=named):
        LoRA(**options)


def test_convert_refuses_what_is_no_file(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["convert", "missing.gguf", "out"])
    with pytest.raises(SystemExit):
        convert()
    assert "missing.gguf is not a file" in capsys.readouterr().err
