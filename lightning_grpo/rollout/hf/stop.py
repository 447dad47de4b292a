"""Detection of stop strings at the end of a completion, for any tokenizer."""

from collections.abc import Sequence
from typing import cast

from transformers import PreTrainedTokenizerBase


class StopStrings:
    """Detect stop strings at the end of unfinished completions.

    Each token is at least one byte of text, so a stop string of n bytes lies within the last n tokens. One character
    may span several tokens, and one token several characters.

    Args:
        tokenizer: decodes the tokens, including special ones.
        stop: the stop strings. Without any, nothing is decoded.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = list(stop)
        self._bytes = max((len(s.encode()) for s in stop), default=0)

    def end(self, prompt: Sequence[int], token_ids: Sequence[int]) -> bool:
        """Whether a stop string ends in the last token of ``token_ids``, provided that none ended before.

        Args:
            prompt: the tokens before the completion, whose text is not searched.
            token_ids: the completion so far.
        """
        if not self._stop:
            return False
        # One token more than needed: decoders strip the space before the first one.
        ids = [*prompt[-1:], *token_ids][-self._bytes - 1 :]
        # `decode` returns a list only for a batch
        text, first = (cast(str, self._tokenizer.decode(part)) for part in (ids, ids[:1]))
        return any(s in text.removeprefix(first) for s in self._stop)
