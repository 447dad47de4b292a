"""Rows to prompts: rename columns, apply the chat template to messages, and encode the text once."""

import multiprocessing
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Literal, NamedTuple

from pyarrow import RecordBatch

from lightning_grpo.data.prompts import Prompt
from lightning_grpo.data.rows import Message, Row, as_messages, as_template_args, as_tools, name_columns
from lightning_grpo.data.store import as_batch
from lightning_grpo.data.template import ChatTemplate
from lightning_grpo.errors import UserError
from lightning_grpo.processor import cores

CHUNK = 1000
"""Rows to encode per call; a fast tokenizer distributes them over the CPU cores."""
SMALL_CHUNK = 64
"""Rows to encode per call if rows are read while prompts are served."""
PARALLEL_FROM = 20_000
"""Number of rows above which several processes encode them."""


class Rendered(NamedTuple):
    """A row whose prompt has been rendered as text."""

    index: int  # type: ignore[assignment]  # not tuple.index
    where: str
    messages: str | list[Message]
    text: str
    add_special_tokens: bool
    columns: dict[str, Any]


@dataclass
class Remarks:
    """What is probably a mistake in a data set, but not an error: counts, and the first example of each."""

    answered: int = 0
    first_answered: tuple[str, str] = ("", "")
    """The location of the first prompt that ends with an assistant message, and the end of that message."""
    toolless: str = ""
    """The location of the first plain text with tools."""
    template: dict[str, str] = field(default_factory=dict)
    """What the chat template omits: subject → message."""

    def add(self, later: "Remarks") -> None:
        """Add the remarks on later rows."""
        self.first_answered = self.first_answered if self.answered else later.first_answered
        self.answered += later.answered
        self.toolless = self.toolless or later.toolless
        self.template = later.template | self.template

    def sentences(self) -> list[str]:
        """A sentence about each."""
        sentences = list(self.template.values())
        if self.answered:
            where, end = self.first_answered
            sentences.append(
                f"{self.answered} prompts end with an assistant message, which the completion will continue ({where}: "
                f"{end!r}). If it is the answer, as in data for supervised fine-tuning, move it from the prompt to a "
                "column for the rewards"
            )
        if self.toolless:
            sentences.append(
                f"{self.toolless}: the prompt is plain text, so its tools and chat_template_kwargs are ignored; set "
                "data.chat to true to turn the text into a user message"
            )
        return sentences


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Encodes rows; it can be sent to another process. The arguments are those of `PromptDataModule`.

    Text is used unchanged, after the beginning-of-sequence token that the tokenizer adds. Messages are rendered by the
    chat template, with the row's ``tools`` and ``chat_template_kwargs``.

    Args:
        tools: JSON schemas of tools that the template renders into every prompt, before the row's own ``tools``.
        vocab_size: number of rows of the model's embedding. A prompt with a token id beyond it raises an error.
    """

    tokenizer: Any
    columns: dict[str, str] = field(default_factory=dict)
    chat: bool = False
    system_prompt: str | None = None
    chat_template: str | None = None
    chat_template_args: dict[str, Any] = field(default_factory=dict)
    max_prompt_length: int | None = None
    overlong: Literal["drop", "error"] = "drop"
    tools: Sequence[dict[str, Any]] = ()
    vocab_size: int | None = None
    source: str = ""
    """Value of the column ``source`` of every prompt. Empty: as in the row."""
    rewards: list[str] | None = None
    """`Prompt.rewards` of every prompt."""

    def encode(
        self, rows: Iterable[tuple[str, Row]], remarks: Remarks | None = None, *, first: int = 0, stored: bool = False
    ) -> Iterator[list[Prompt] | RecordBatch]:
        """Yield the prompts of each `CHUNK` rows, without those that are too long if ``overlong`` is drop.

        Rows are encoded by as many processes as there are cores if there are more than `PARALLEL_FROM`.

        Args:
            rows: each with its location, for messages ("train.jsonl, line 7").
            remarks: to which remarks on the rows are added.
            first: index of the first row.
            stored: prompts are to be stored, so that other processes may return them as batches of `as_batch`.

        Raises:
            UserError: a row is invalid, or its columns are not those of the first row.
        """
        chunks = self._chunks(rows, first, CHUNK)
        start = list(islice(chunks, PARALLEL_FROM // CHUNK))
        rest = next(chunks, None)
        encoded: Iterator[tuple[list[Prompt] | RecordBatch, Remarks]] = map(self.encode_chunk, start)
        if rest is not None:
            encoded = self._encode_in_parallel(chain(start, [rest], chunks), stored)
        for prompts, found in encoded:
            if remarks is not None:
                remarks.add(found)
            yield prompts

    def encode_in_order(
        self, rows: Iterable[tuple[str, Row]], remarks: Remarks, *, first: int = 0
    ) -> Iterator[list[Prompt]]:
        """As `encode`, but read few rows before the prompts that are taken."""
        for prompts, found in map(self.encode_chunk, self._chunks(rows, first, SMALL_CHUNK)):
            remarks.add(found)
            yield prompts

    def _encode_in_parallel(
        self, chunks: Iterator["Chunk"], stored: bool
    ) -> Iterator[tuple[list[Prompt] | RecordBatch, Remarks]]:
        # forked, as a new interpreter would import the user's script again
        fork, processes = multiprocessing.get_context("fork"), cores()
        with _serial_tokenizers(), ProcessPoolExecutor(processes, fork, _set_encoder, (self,)) as pool:
            waiting = deque(pool.submit(_encode_chunk, chunk, stored) for chunk in islice(chunks, 4 * processes))
            while waiting:
                yield waiting.popleft().result()
                waiting.extend(pool.submit(_encode_chunk, chunk, stored) for chunk in islice(chunks, 1))

    def _chunks(self, rows: Iterable[tuple[str, Row]], first: int, size: int) -> Iterator["Chunk"]:
        iterator, names = iter(rows), None
        while chunk := list(islice(iterator, size)):
            names = names or set(name_columns(*chunk[0], self.columns))
            yield Chunk(first, chunk, names)
            first += len(chunk)

    def encode_chunk(self, chunk: "Chunk") -> tuple[list[Prompt], Remarks]:
        """The prompts of a chunk, and remarks on its rows."""
        remarks = Remarks()
        rendered = list(self._rendered(chunk, remarks))
        prompts: list[Prompt] = []
        for row, ids in zip(rendered, encode(rendered, self.tokenizer), strict=True):
            _check_tokens(row, ids, self.tokenizer, self.vocab_size)
            if self.max_prompt_length is None or len(ids) <= self.max_prompt_length:
                columns = row.columns | {"source": self.source} if self.source else row.columns
                prompts.append(
                    Prompt(
                        index=row.index,
                        place=row.where,
                        ids=ids,
                        messages=row.messages,
                        columns=columns,
                        rewards=self.rewards,
                    )
                )
            elif self.overlong == "error":
                raise UserError(
                    f"{row.where}: the prompt has {len(ids)} tokens, above max_prompt_length = "
                    f"{self.max_prompt_length}; raise max_prompt_length, or set data.overlong to drop"
                )
        return prompts, remarks

    def _rendered(self, chunk: "Chunk", remarks: Remarks) -> Iterator[Rendered]:
        template = ChatTemplate(self.tokenizer, self.chat_template, self.chat_template_args)
        for index, (where, row) in enumerate(chunk.rows, chunk.first):
            named = name_columns(where, row, self.columns)
            if set(named) != chunk.names:
                odd = ", ".join(sorted(chunk.names.symmetric_difference(named)))
                raise UserError(
                    f"{where}: the row differs from the first row in the columns {odd}; give every row the same "
                    "columns (null if it has no value)"
                )
            messages = as_messages(where, named.pop("prompt"), chat=self.chat, system_prompt=self.system_prompt)
            if isinstance(messages, str):
                if named.get("tools") or named.get("chat_template_kwargs"):
                    remarks.toolless = remarks.toolless or where
                text, special = _plain(messages, self.tokenizer.bos_token)
            else:
                tools = [*self.tools, *(as_tools(where, named.get("tools")) or ())] or None
                args = as_template_args(where, named.get("chat_template_kwargs"))
                text, special = template.render(where, messages, tools=tools, args=args), False
                if messages[-1]["role"] == "assistant":
                    remarks.add(Remarks(answered=1, first_answered=(where, messages[-1]["content"][-60:])))
            yield Rendered(index, where, messages, text, special, named)
        remarks.template = template.omissions


@contextmanager
def _serial_tokenizers() -> Iterator[None]:
    """Let tokenizers of processes that are forked use one thread, without a warning about the fork."""
    before = os.environ.get(PARALLELISM)
    os.environ[PARALLELISM] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[PARALLELISM]
        else:
            os.environ[PARALLELISM] = before


PARALLELISM = "TOKENIZERS_PARALLELISM"
_encoder: Encoder
"""The encoder of a process that `Encoder.encode` started."""


def _set_encoder(encoder: Encoder) -> None:
    global _encoder
    _encoder = encoder


def _encode_chunk(chunk: "Chunk", stored: bool) -> tuple[list[Prompt] | RecordBatch, Remarks]:
    prompts, remarks = _encoder.encode_chunk(chunk)
    batch = as_batch(prompts) if stored else None
    return prompts if batch is None else batch, remarks


class Chunk(NamedTuple):
    """Consecutive rows of a data set."""

    first: int
    rows: list[tuple[str, Row]]
    names: set[str]
    """Columns of the data set's first row, after renaming."""


def _plain(text: str, bos_token: str | None) -> tuple[str, bool]:
    """Return the text to encode, and whether the tokenizer should add special tokens to it."""
    has_bos = bool(bos_token) and text.lstrip().startswith(bos_token)
    return (text.lstrip(), False) if has_bos else (text, True)


def encode(rows: Sequence[Rendered], tokenizer: Any) -> list[list[int]]:
    """Return the token ids of each row. Encoding rows together gives the same ids in a fraction of the time."""
    ids: list[list[int]] = [[] for _ in rows]
    for special in (False, True):
        places = [place for place, row in enumerate(rows) if row.add_special_tokens is special]
        if places:
            texts = [rows[place].text for place in places]
            encoded = tokenizer(texts, add_special_tokens=special, return_attention_mask=False)["input_ids"]
            for place, row_ids in zip(places, encoded, strict=True):
                ids[place] = list(row_ids)
    for row, row_ids in zip(rows, ids, strict=True):
        # Some tokenizers append an end-of-sequence token, after which a completion could not continue.
        ended = row.add_special_tokens and row_ids and row_ids[-1] == tokenizer.eos_token_id
        if ended and not row.text.endswith(tokenizer.eos_token):
            row_ids.pop()
    return ids


def _check_tokens(row: Rendered, ids: list[int], tokenizer: Any, vocab_size: int | None) -> None:
    if not ids:
        raise UserError(f"{row.where}: the prompt {row.messages!r} has no tokens")
    if vocab_size is not None and (highest := max(ids)) >= vocab_size:
        token = tokenizer.convert_ids_to_tokens(highest)
        raise UserError(
            f"{row.where}: the prompt has the token {token!r} with the id {highest}, but the model's embedding has "
            f"{vocab_size} rows: tokens were added to the tokenizer without resizing the embedding; call "
            "model.resize_token_embeddings(len(tokenizer)) and save both again"
        )
