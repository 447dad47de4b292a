"""Detection of stop strings at the end of a completion, for any tokenizer."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


class StopStrings:
    """Looks for stop strings at the end of unfinished completions.

    A token is a byte of text or more, so that a stop string of n bytes ends within the last n tokens: one character may
    span several tokens, and one token several characters.

    Args:
        tokenizer: decodes the tokens, special ones included.
        stop: the strings; without any nothing is decoded.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = list(stop)
        self._bytes = max((len(s.encode()) for s in stop), default=0)

    def end(self, prompt: Sequence[int], token_ids: Sequence[int]) -> bool:
        """Whether a stop string ends in the last token of ``token_ids``, if none ended before.

        Args:
            prompt: what precedes the completion; its text does not count.
            token_ids: the completion so far.
        """
        if not self._stop:
            return False
        # One token more than needed: decoders strip the space before the first one.
        ids = [*prompt[-1:], *token_ids][-self._bytes - 1 :]
        text = self._tokenizer.decode(ids).removeprefix(self._tokenizer.decode(ids[:1]))
        return any(s in text for s in self._stop)
