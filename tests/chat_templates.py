"""Chat templates in the structure of well-known ones, and a tokenizer with their special tokens."""

from functools import cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "data" / "templates"
SPECIAL = [
    *("<|begin_of_text|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eot_id|>", "<|eom_id|>", "<start_of_turn>", "<end_of_turn>", "<|User|>", "<|Assistant|>"),
]
QUESTION = [{"role": "user", "content": "What is 2 + 2?"}]


@cache
def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges across letters, spaces and line breaks, as those of Llama and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "user\nassistant\n\nsystem tool ipython model What is the answer? It is 4.\n\n\n<tool_response>\n"
    tokenizer.train_from_iterator([path.read_text() for path in sorted(TEMPLATES.iterdir())] + [text] * 9, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|endoftext|>",
        extra_special_tokens=SPECIAL[2:],
        clean_up_tokenization_spaces=False,
        name_or_path="a-model",
    )
