"""Checkpoints that can't be trained: each is refused before the first step, by the name of what is wrong with it."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import char_tokenizer, tiny_llama
from fitting import data, fit, module
from huggingface_hub.errors import RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from transformers import BartConfig, BertConfig, T5Config

from lightning_grpo.configure.shape import find_model
from lightning_grpo.errors import UserError
from lightning_grpo.policy import files as model_files
from lightning_grpo.policy.load import LoRA, load_config, load_policy, load_tokenizer
from lightning_grpo.rollout import HFRollout

WEIGHTS = "model.safetensors"
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def broken(tiny_model_path, tmp_path):
    """A copy of the tiny model to break, and the means to."""
    return Broken(Path(shutil.copytree(tiny_model_path, tmp_path / "model")))


class Broken:
    def __init__(self, path: Path) -> None:
        self.path = path

    def tensors(self, change) -> str:
        tensors = load_file(self.path / WEIGHTS)
        save_file(change(tensors), self.path / WEIGHTS, metadata={"format": "pt"})
        return str(self.path)

    def json(self, name: str, **values) -> str:
        held = json.loads((self.path / name).read_text()) | values
        (self.path / name).write_text(json.dumps({k: v for k, v in held.items() if v is not ...}))
        return str(self.path)

    def bytes(self, name: str, content: bytes) -> str:
        (self.path / name).write_bytes(content)
        return str(self.path)


def put(value: float):
    def change(tensors):
        tensors[UP][3, 5] = value
        return tensors

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: {name: x for name, x in t.items() if "layers.1" not in name},
            r"lack 9 tensors of the model: model\.layers\.1\.input_layernorm\.weight, .* and 6 more; .*from_scratch",
        ),
        (
            lambda t: {f"module.{name}": x for name, x in t.items()},
            r"lack 21 tensors .* \(it has module\.model\.embed_tokens\.weight",
        ),
        (put(float("nan")), rf"1 of its tensors have NaN or infinite values: {UP}"),
        (put(float("-inf")), rf"1 of its tensors have NaN or infinite values: {UP}"),
        (lambda t: t | {UP: torch.zeros(8, 64)}, rf"{UP} is \(8, 64\), not \(128, 64\)"),
    ],
)
def test_weights_that_are_not_the_models(broken, change, message):
    path = broken.tensors(change)
    with pytest.raises(UserError, match=message):
        load_policy(path)
    load_policy(path, from_scratch=True)


def test_tensors_without_a_use_are_named_and_a_tied_head_may_be_absent(broken, caplog):
    path = broken.tensors(lambda t: t | {"score.weight": torch.zeros(2, 64)})
    assert "lm_head.weight" not in load_file(broken.path / WEIGHTS)
    load_policy(path)
    assert "has 1 tensors that the model doesn't use: score.weight" in caplog.text


def test_float16_overflow_is_named(broken):
    path = broken.tensors(put(1e5))
    load_policy(path)
    with pytest.raises(UserError, match=rf"infinite values: {UP}; .*if dtype is float16"):
        load_policy(path, dtype="float16")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda held: held[:-1000], r"its model\.safetensors can't be read \(.*not fully covered"),
        (lambda held: b"garbage " * 100, r"its model\.safetensors can't be read \("),
        (lambda held: b"", r"its model\.safetensors can't be read \("),
        (lambda held: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
    ],
)
def test_broken_safetensors(broken, content, message):
    path = broken.bytes(WEIGHTS, content((broken.path / WEIGHTS).read_bytes()))
    with pytest.raises(UserError, match=message):
        load_policy(path)


def test_a_shard_that_is_not_there(broken):
    os.remove(broken.path / WEIGHTS)
    tiny_llama(char_tokenizer()).save_pretrained(broken.path, max_shard_size="100KB")
    os.remove(sorted(broken.path.glob("model-*"))[1])
    with pytest.raises(UserError, match="model-00002-of-0000"):
        load_policy(str(broken.path))


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def test_code_in_pickled_weights_is_not_run(broken, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    os.remove(broken.path / WEIGHTS)
    torch.save({"lm_head.weight": Malicious()}, broken.path / "pytorch_model.bin")
    with pytest.raises(UserError, match="no readable weights"):
        load_policy(str(broken.path))
    assert not Path("ran").exists()


SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (T5Config(), "t5 is an encoder-decoder"),
        (BartConfig(), "bart is an encoder-decoder"),
        (BertConfig(**SMALL), "bert with is_decoder false attends to the tokens that it has to predict"),
    ],
)
def test_models_that_are_not_causal(config, message, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=message):
        load_config(str(tmp_path))
    BertConfig(**SMALL, is_decoder=True).save_pretrained(tmp_path)
    load_config(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("config.json", load_config),
        ("tokenizer.json", load_tokenizer),
        ("tokenizer_config.json", load_tokenizer),
        ("generation_config.json", load_policy),
    ],
)
@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b'{"a": ', "is not JSON"),
        (b"[]", "contains a list, not an object"),
        ('{"a": "ü"}'.encode("latin-1"), "is not UTF-8"),
    ],
)
def test_broken_json_is_named_as_the_file_it_is(broken, name, load, content, why):
    with pytest.raises(UserError, match=f"its {name} {why}"):
        load(broken.bytes(name, content))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "no_such_type"}, "no_such_type"),
        ({"num_attention_heads": 3, "head_dim": ...}, "not a multiple of the number of attention heads"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"hidden_act": "no_such_activation"}, "'no_such_activation' is unknown to transformers"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "(?i)gptq"),
    ],
)
def test_configurations_that_transformers_cannot_use(broken, changes, message):
    with pytest.raises(UserError, match=message):
        load_policy(broken.json("config.json", **changes))


@pytest.mark.parametrize("from_scratch", [False, True])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_implementation": "nothing"}, "attn_implementation is 'nothing': .*; set it to sdpa"),
        ({"lora": LoRA(target_modules="nothing")}, "lora.target_modules is 'nothing': .*names among down_proj, gate_"),
        ({"lora": LoRA(target_modules="(")}, r"lora.target_modules is '\(': missing \)"),
    ],
)
def test_options_that_this_model_cannot_have(tiny_model_path, options, message, from_scratch):
    with pytest.raises(UserError, match=message):
        load_policy(tiny_model_path, from_scratch=from_scratch, **options)


@pytest.mark.parametrize(("model", "message"), [("", "model is empty"), (__file__, "which is a file")])
def test_names_that_are_no_folder(model, message):
    with pytest.raises(UserError, match=message):
        load_config(model)


def test_an_adapter_is_no_model(broken):
    os.remove(broken.path / "config.json")
    broken.bytes("adapter_config.json", b'{"base_model_name_or_path": "owner/base"}')
    with pytest.raises(UserError, match=r"LoRA adapter without its base model; set lora\.adapter to it, .* owner/base"):
        load_policy(str(broken.path))


def never(prompt: str = "") -> str:
    raise AssertionError("asked at the terminal")


CODE = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.Tokenizer", None]}


@pytest.mark.parametrize("load", [load_config, find_model])
def test_code_of_a_checkpoint_is_neither_run_nor_asked_about(broken, load, monkeypatch):
    monkeypatch.setattr("builtins.input", never)
    (broken.path / "own.py").write_text("raise AssertionError('was run')")
    with pytest.raises(UserError, match="run only if you allow it"):
        load(broken.json("config.json", model_type="unheard_of", auto_map=CODE))


def test_code_of_a_tokenizer_is_neither_run_nor_asked_about(broken, monkeypatch):
    monkeypatch.setattr("builtins.input", never)
    with pytest.raises(UserError, match="its tokenizer needs Python code"):
        load_tokenizer(broken.json("tokenizer_config.json", tokenizer_class=..., auto_map=CODE))
    broken.json("tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", auto_map=...)
    load_policy(broken.json("config.json", auto_map=CODE))  # an architecture that transformers has needs no code


def test_an_end_token_in_the_generation_config_alone_will_do(broken, tmp_path):
    end = char_tokenizer().eos_token_id
    broken.json("tokenizer_config.json", eos_token=..., pad_token=...)
    broken.json("config.json", eos_token_id=..., pad_token_id=...)
    path = broken.json("generation_config.json", eos_token_id=[end], pad_token_id=...)
    for from_scratch in (False, True):
        policy = module(path, from_scratch=from_scratch)
        fit(tmp_path / "run", policy, steps=1, rollout=HFRollout())
        assert policy.tokenizer.eos_token_id is None and policy.policy.generation_config.eos_token_id == [end]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ({"max_prompt_length": 500}, r"supports 256; set max_prompt_length to 250 or less$"),
        ({"max_completion_length": 300}, r"supports 256; set max_completion_length to 248 or less$"),
        (
            {"max_completion_length": 250},
            r"set max_completion_length to 248 or less or max_prompt_length to 6 or",
        ),
        ({"max_prompt_length": 500, "max_completion_length": 300}, r"supports 256; set each to 128 or less$"),
    ],
)
def test_lengths_beyond_the_model(tiny_model_path, tmp_path, lengths, message):
    with pytest.raises(UserError, match=message):
        fit(tmp_path, module(tiny_model_path, **lengths), data())


@pytest.mark.parametrize(
    ("special", "generation", "message"),
    [
        (
            {"eos_token": ...},
            {"eos_token_id": ...},
            "neither its tokenizer nor its generation_config.json has an end-of-",
        ),
        ({}, {"eos_token_id": "</s>"}, "eos_token_id in its generation_config.json is '</s>'"),
        ({}, {"eos_token_id": [1, 500]}, r"has the id 500, but the model's embedding has 106 rows: .*resize"),
        ({"eos_token": "<new>"}, {}, r"'<new>' has the id 106, but the model's embedding has 106 rows"),
        ({"pad_token": "<new>"}, {}, r"'<new>' has the id 106, but the model's embedding has 106 rows"),
    ],
)
def test_special_tokens_that_the_model_cannot_use(broken, tmp_path, special, generation, message):
    broken.json("tokenizer_config.json", **special)
    broken.json("config.json", eos_token_id=...)
    path = broken.json("generation_config.json", **generation)
    with pytest.raises(UserError, match=message):
        fit(tmp_path / "run", module(path), data())


class Hub:
    """Answers as the hub does, and counts how often it is asked."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error
        self.asked = 0

    def repo_info(self, name, **options):
        self.asked += 1
        assert options["timeout"] <= 10
        if self.error:
            raise self.error


@pytest.fixture
def hub(monkeypatch):
    def answering(error):
        hub = Hub(error)
        model_files.hub_reachable.cache_clear()
        monkeypatch.setattr(model_files, "HfApi", lambda: hub)
        monkeypatch.setattr(model_files, "is_offline_mode", lambda: False)
        return hub

    yield answering
    model_files.hub_reachable.cache_clear()


class NotFound(RepositoryNotFoundError):
    def __init__(self) -> None:
        Exception.__init__(self, "404")


def test_a_name_that_the_hub_does_not_have(hub):
    asked = hub(NotFound())
    for load in (load_tokenizer, load_config, load_policy):
        with pytest.raises(
            UserError, match="'nobody/nothing': no such folder, and the hub has no repository with that"
        ):
            load("nobody/nothing")
    assert asked.asked == 3


def test_without_the_hub_its_cache_is_asked_and_nothing_else(hub):
    asked = hub(ConnectionError("no route"))
    for load in (load_tokenizer, load_config, load_policy):
        with pytest.raises(UserError, match="could be loaded from the hub or its cache"):
            load("nobody/nothing")
    assert asked.asked == 1


@pytest.mark.parametrize("name", ["./nowhere", "a/b/c", "no such", "-a-/b"])
def test_a_folder_that_is_not_there_is_not_looked_for_on_the_hub(hub, name):
    asked = hub(None)
    with pytest.raises(UserError, match=r"no such folder, and not a name on the hub"):
        load_config(name)
    assert asked.asked == 0
