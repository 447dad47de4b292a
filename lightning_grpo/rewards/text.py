"""The texts that rewards and predictions read: token ids decoded."""

import re
from collections.abc import Collection, Sequence

from transformers import PreTrainedTokenizerBase

_OPENING = re.compile(r"<[A-Za-z_][\w-]*>\s*\Z")


def decode_completions(
    tokenizer: PreTrainedTokenizerBase, completion_ids: Sequence[Sequence[int]], end_ids: Collection[int]
) -> list[str]:
    """The completions' texts, without the tokens that end or pad them. Other special tokens stay: in some vocabularies
    ``<think>`` is one.

    Args:
        tokenizer: of the policy.
        completion_ids: N lists of token ids.
        end_ids: tokens that end a completion.
    """
    ends = {*end_ids, tokenizer.pad_token_id}
    kept = [[token for token in ids if token not in ends] for ids in completion_ids]
    return tokenizer.batch_decode(kept, skip_special_tokens=False)


def template_opening(tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int]) -> str:
    """The tag that a prompt ends in, with the white space after it, such as ``<think>`` and a line break, which chat
    templates of reasoning models open themselves; empty if there is none."""
    found = _OPENING.search(str(tokenizer.decode(list(prompt_ids[-16:]), skip_special_tokens=False)))
    return found.group() if found else ""
