"""A tokenizer or chat template other than the trainer's is refused at start."""

import json

import pytest
from conftest import char_tokenizer
from engines import Sampler, loader, trainer_with
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from lightning_grpo.rollout import Sampling, VLLMRollout
from lightning_grpo.rollout.vllm.tokenizer import require_same_tokenizer, tokenizer_facts


def other_template(tokenizer):
    tokenizer.chat_template += " "
    return tokenizer


def other_end(tokenizer):
    tokenizer.eos_token = "<unk>"
    return tokenizer


def one_token_more(tokenizer):
    tokenizer.add_tokens(["longer"])
    return tokenizer


def two_tokens_swapped(tokenizer):
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["a"], vocabulary["d"] = vocabulary["d"], vocabulary["a"]
    kept = {name: getattr(tokenizer, name) for name in ("pad_token", "eos_token", "unk_token", "chat_template")}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **kept)


FAULTS = {
    other_template: "chat template",
    other_end: "end-of-sequence token",
    one_token_more: "vocabulary size",
    two_tokens_swapped: "encoding of a probe",
}


@pytest.mark.parametrize(("fault", "named"), FAULTS.items(), ids=lambda x: getattr(x, "__name__", None))
def test_what_differs_is_named(fault, named):
    trainer = tokenizer_facts(char_tokenizer())
    require_same_tokenizer(json.loads(json.dumps(tokenizer_facts(char_tokenizer()))), trainer, at="the engine")
    with pytest.raises(ValueError, match=rf"http://there has another tokenizer.*{named}"):
        require_same_tokenizer(tokenizer_facts(fault(char_tokenizer())), trainer, at="http://there")


@pytest.mark.vllm
def test_an_engine_with_another_chat_template_does_not_start(tiny_model_path, tmp_path):
    other_template(char_tokenizer()).save_pretrained(tmp_path / "other")
    module = Sampler(tiny_model_path)
    module.sampling = Sampling(stop=["x"])
    callback = VLLMRollout(dtype="float32", max_num_seqs=8, engine_args={"tokenizer": str(tmp_path / "other")})
    with pytest.raises(ValueError, match=r"the vLLM engine has another tokenizer.*chat template"):
        trainer_with(callback, tmp_path, steps=1).fit(module, loader())
    assert module.rounds == [] and module.engine is None
