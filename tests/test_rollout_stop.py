"""Stop strings under tokenizers that cut text in different ways."""

import pytest
from conftest import char_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from lightning_grpo.rollout.hf.stop import StopStrings

TEXT = "Say 🧿 and Ω, then stop.\n\nUser: né 🧿🧿 end"


def byte_level():
    """As in GPT-2, Llama 3 and Qwen: a token per byte, and some longer ones."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("s", "t"), ("st", "o"), ("Ċ", "Ċ")]
    vocab = {token: i for i, token in enumerate([*alphabet, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def byte_fallback():
    """As in Llama 2: words with their space, and bytes for characters that the vocabulary lacks."""
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁s", "to", "p", "▁stop"]
    words += [c for c in sorted(set(TEXT + "x")) if c.isascii() and c.isprintable() and c not in words and c != " "]
    merges = [("t", "o"), ("▁", "s"), ("▁s", "to"), ("▁sto", "p")]
    vocab = {word: i for i, word in enumerate([*words, "▁sto"])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


TOKENIZERS = {"byte-level": byte_level(), "byte fallback": byte_fallback()}


def stops_at(tokenizer, stop, prompt, ids):
    """How many tokens a completion has when it ends; None if it doesn't."""
    found = StopStrings(tokenizer, [stop, "never in the text"])
    return next((n for n in range(1, len(ids) + 1) if found.end(prompt, ids[:n])), None)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    "stop", ["🧿", "🧿🧿", "Ω", "né", "stop", " stop", ".\n\nUser:", "\n\n", "e", "end", " ", "🧿 e"]
)
def test_a_completion_ends_with_the_token_that_completes_a_stop_string(kind, stop):
    tokenizer = TOKENIZERS[kind]
    prompt = tokenizer.encode("x", add_special_tokens=False)
    ids = tokenizer.encode("x" + TEXT, add_special_tokens=False)[len(prompt) :]
    n = stops_at(tokenizer, stop, prompt, ids)
    assert stop in tokenizer.decode([*prompt, *ids[:n]])[1:]
    assert stop not in tokenizer.decode([*prompt, *ids[: n - 1]])[1:]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_space_at_the_start_of_a_completion_counts_and_the_prompt_does_not(kind):
    tokenizer = TOKENIZERS[kind]
    prompt = tokenizer.encode("x stop", add_special_tokens=False)
    whole = tokenizer.encode("x stop stop x", add_special_tokens=False)
    ids = whole[len(prompt) :]
    assert tokenizer.decode(whole[: len(prompt)]) == "x stop"
    n = stops_at(tokenizer, " stop", prompt, ids)
    assert tokenizer.decode([*prompt, *ids[:n]]) == "x stop stop"
    assert stops_at(tokenizer, "stop stop", prompt, ids) is None


def test_nothing_is_decoded_without_stop_strings():
    assert not StopStrings(None, []).end([1], [2, 3])
    tokenizer = char_tokenizer()
    assert stops_at(tokenizer, "<eos>", [5], [7, 8, tokenizer.eos_token_id]) == 3
    assert stops_at(tokenizer, "ab", [5], tokenizer.encode("b a ab", add_special_tokens=False)) == 6
