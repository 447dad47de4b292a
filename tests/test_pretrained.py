"""Which checkpoint is loaded and how: its revision, its own code, further arguments of from_pretrained."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import yaml
from conftest import tiny_llama
from fitting import data, fit, module
from transformers import AutoModelForCausalLM

from lightning_grpo import GRPOModule
from lightning_grpo.cli import main
from lightning_grpo.configure import find_model
from lightning_grpo.errors import UserError
from lightning_grpo.export import export
from lightning_grpo.monitor.checkpoint import Checkpoint
from lightning_grpo.policy import Pretrained, load_config, load_generation_config, load_policy, load_tokenizer
from lightning_grpo.policy import files as model_files
from lightning_grpo.rollout.vllm.callback import loading_args

ROOT = Path(__file__).parent.parent
CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(tiny_model_path, tmp_path) -> str:
    """The tiny model as an architecture of its own, whose code is in its folder."""
    folder = Path(shutil.copytree(tiny_model_path, tmp_path / "own"))
    (folder / "modeling_own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    config |= {"model_type": "own", "architectures": ["OwnModel"], "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def test_code_of_a_checkpoint_runs_only_if_it_is_allowed(own_code, tmp_path, caplog):
    with pytest.raises(UserError, match=rf"set model to {{name: {own_code}, trust_remote_code: true}}"):
        fit(tmp_path / "run", module(own_code))
    policy = module(Pretrained(name=own_code, trust_remote_code=True))
    with caplog.at_level("INFO"):
        fit(tmp_path / "run", policy, steps=1, callbacks=[Checkpoint()], enable_checkpointing=True)
    assert type(policy.policy).__name__ == "OwnModel"
    assert caplog.text.count("its own Python code is run") == 1
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    with pytest.raises(UserError, match="trust_remote_code: true"):  # a checkpoint can't allow it
        export(checkpoint, tmp_path / "out")
    export(checkpoint, tmp_path / "out", trust_remote_code=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(loaded.lm_head.weight, policy.policy.lm_head.weight)


def test_the_command_line_names_what_is_allowed(own_code, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    options = ["--config", "configs/smoke.yaml", "--trainer.default_root_dir", str(tmp_path), "--data.size", "28"]
    own = ["--model.model", json.dumps({"name": own_code, "trust_remote_code": True}), "--trainer.max_steps", "1"]
    main(["fit", *options, *own, "--model.from_scratch", "false"])
    config = yaml.safe_load((tmp_path / "logs" / "version_0" / "config.yaml").read_text())
    assert config["model"]["init_args"]["model"]["trust_remote_code"] is True
    assert (tmp_path / "checkpoints" / "last" / "modeling_own.py").is_file()


@pytest.fixture
def hub(tmp_path, tokenizer, monkeypatch) -> str:
    """A repository in the hub's cache with two revisions, of which the main one has other weights and another end."""
    for commit, ref, layers in (("a" * 40, "main", 2), ("b" * 40, "v1", 1)):
        repository = tmp_path / "hub" / "models--owner--tiny"
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / ref).write_text(commit)
        folder = repository / "snapshots" / commit
        tiny_llama(tokenizer, num_hidden_layers=layers).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, layers + 5]}))
        (folder / "README.md").write_text(f"---\nlicense: licence-{ref}\n---\n")
    description = json.loads((folder / "tokenizer_config.json").read_text()) | {"pad_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(description))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model_files.hub_reachable.cache_clear()
    yield "owner/tiny"
    model_files.hub_reachable.cache_clear()


def test_everything_comes_from_the_same_revision(hub, tmp_path):
    v1 = Pretrained(name=hub, revision="v1")
    for model, layers, pad in ((hub, 2, "<pad>"), (v1, 1, "<unk>")):
        config = load_config(model)
        assert config.num_hidden_layers == layers == len(load_policy(model).model.layers)
        assert load_tokenizer(model).pad_token == pad
        assert load_generation_config(model, config).eos_token_id == [1, layers + 5]
    assert find_model(hub, "v1").layers == 1

    policy = module(v1)
    prompts = data()
    fit(tmp_path, policy, prompts, steps=1, callbacks=[Checkpoint()], enable_checkpointing=True)
    assert prompts._tokenizer.pad_token == "<unk>"
    engine = loading_args(policy)
    assert {engine[name] for name in ("revision", "tokenizer_revision", "code_revision")} == {"v1"}
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    exported = export(checkpoint, tmp_path / "out")
    assert exported.saved.base.revision == "v1"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "at revision `v1`" in card and "license: licence-v1" in card
    assert len(GRPOModule.load_from_checkpoint(checkpoint).policy.model.layers) == 1


def test_a_revision_that_is_not_there(hub, tiny_model_path):
    with pytest.raises(UserError, match="could be loaded from the hub or its cache"):
        load_config(Pretrained(name=hub, revision="v2"))
    with pytest.raises(UserError, match="is a folder, which has no revisions"):
        load_config(Pretrained(name=tiny_model_path, revision="v1"))


def test_further_arguments_reach_configuration_and_weights(tiny_model_path):
    changed = Pretrained(name=tiny_model_path, kwargs={"rms_norm_eps": 0.5, "use_safetensors": True})
    policy = module(changed)
    policy.configure_model()
    assert load_config(changed).rms_norm_eps == 0.5 == policy.policy.config.rms_norm_eps
    assert policy.policy.model.norm.variance_epsilon == 0.5
    assert loading_args(policy) == {"hf_overrides": {"rms_norm_eps": 0.5}}
    with pytest.raises(UserError, match=r"model\.model\.kwargs has no_such, which neither"):
        load_policy(Pretrained(name=tiny_model_path, kwargs={"no_such": 1}))


@pytest.mark.parametrize(
    ("name", "instead"), [("torch_dtype", "model.dtype"), ("attn_implementation", "model.attn_implementation")]
)
def test_arguments_with_an_option_of_their_own_are_refused(name, instead):
    with pytest.raises(UserError, match=f"kwargs has {name}; set {instead} instead"):
        Pretrained(name="x", kwargs={name: "float32"})
