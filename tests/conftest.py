"""Fixtures shared by all tests: a tiny random model with its tokenizer, saved as a Hugging Face checkpoint."""

import importlib.util
import os
import resource
import signal
import string
from pathlib import Path

import pytest
import torch
from chromium import executable
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# Two threads a process collapse as soon as another process takes a core.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


# A shell that starts the tests in the background ignores Ctrl-C for them, and their children would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine can't run. Nothing is imported to find out: vLLM changes the process that imports it.

    With several workers, one takes all tests with vLLM, whose engines spin on every core, and the tests of another file
    stay together, so that fixtures of a file are built once. The longest groups come first.
    """
    groups = {item: "vllm" if item.get_closest_marker("vllm") else item.path.stem for item in items}
    for item, group in groups.items():
        item.add_marker(pytest.mark.xdist_group(group))
    if "PYTEST_XDIST_WORKER" in os.environ:
        slow = {group for item, group in groups.items() if item.get_closest_marker("slow")}
        items.sort(key=lambda item: (groups[item] != "vllm", groups[item] not in slow))
    absent = {
        "vllm": importlib.util.find_spec("vllm") is None,
        "gpu": not torch.cuda.is_available(),
        "browser": executable() is None,
    }
    for item in items:
        for mark in (mark for mark, is_absent in absent.items() if is_absent and item.get_closest_marker(mark)):
            item.add_marker(pytest.mark.skip(reason=f"no {mark} here"))


@pytest.fixture(autouse=True, scope="session")
def stored_prompts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Stores prompts in a temporary folder."""
    os.environ["LIGHTNING_GRPO_PROMPTS"] = str(tmp_path_factory.mktemp("prompts"))


@pytest.fixture(autouse=True, scope="session")
def no_report() -> None:
    """Turns the report at the end of a run off, 5 MB each, where a command line does not turn it on."""
    os.environ["LIGHTNING_GRPO_FIT__REPORT__ENABLED"] = "false"


SPECIAL = ["<pad>", "<eos>", "<unk>", "<system>", "<user>", "<assistant>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<' + message['role'] + '>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)


def char_tokenizer() -> PreTrainedTokenizerFast:
    """One token a printable character, six special tokens, a chat template; pad and end-of-sequence are distinct."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, *string.printable])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens=SPECIAL[3:],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tiny_llama(tokenizer: PreTrainedTokenizerFast, **overrides) -> LlamaForCausalLM:
    """About 80,000 parameters. The wide initialisation gives a distribution in which a wrong weight shows."""
    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "initializer_range": 0.1,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**settings | overrides)).float()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return char_tokenizer()


@pytest.fixture(scope="session")
def tiny_model_path(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> str:
    """A folder with config, weights (fp32, tied head) and tokenizer. Shared by the session: don't write to it."""
    path: Path = tmp_path_factory.mktemp("tiny_model")
    tiny_llama(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def untied_model_path(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> str:
    """The same with its own output head and biased attention projections."""
    path: Path = tmp_path_factory.mktemp("untied_model")
    tiny_llama(tokenizer, tie_word_embeddings=False, attention_bias=True).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture
def files_of_one_megabyte():
    """The system refuses to let a file grow further, as it does on a full disk."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)
