"""Rows to prompts: rename columns, apply the chat template to messages, and encode the text once."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Literal, NamedTuple

from lightning.pytorch.utilities import rank_zero_only

from lightning_grpo.data.prompts import Prompt
from lightning_grpo.data.rows import Message, Row, as_messages, as_template_args, as_tools, name_columns
from lightning_grpo.data.template import ChatTemplate
from lightning_grpo.errors import UserError

warn = rank_zero_only(logging.getLogger(__name__).warning)

CHUNK = 1000
"""Rows to encode per call; a fast tokenizer distributes them over the CPU cores."""


class Rendered(NamedTuple):
    """A row whose prompt has been rendered as text."""

    index: int  # type: ignore[assignment]  # not tuple.index
    where: str
    messages: str | list[Message]
    text: str
    add_special_tokens: bool
    columns: dict[str, Any]


def encode_rows(
    rows: Sequence[tuple[str, Row]],
    tokenizer: Any,
    *,
    columns: dict[str, str],
    chat: bool,
    system_prompt: str | None,
    chat_template: str | None,
    chat_template_args: dict[str, Any],
    max_prompt_length: int | None,
    overlong: Literal["drop", "error"],
    vocab_size: int | None = None,
) -> list[Prompt]:
    """Return the encoded prompts of rows; drop those that are too long, or raise an error, depending on ``overlong``.

    Text is used unchanged, after the beginning-of-sequence token that the tokenizer adds. Messages are rendered by the
    chat template, with the row's ``tools`` and ``chat_template_kwargs``.

    Args:
        rows: each with its location, for messages ("train.jsonl, line 7").
        vocab_size: number of rows of the model's embedding. A prompt with a token id beyond it raises an error.
    """
    template = ChatTemplate(tokenizer, chat_template, chat_template_args)
    rendered = render_rows(rows, template, columns=columns, chat=chat, system_prompt=system_prompt)
    prompts: list[Prompt] = []
    while chunk := list(islice(rendered, CHUNK)):
        for row, ids in zip(chunk, encode(chunk, tokenizer), strict=True):
            _check_tokens(row, ids, tokenizer, vocab_size)
            if max_prompt_length is None or len(ids) <= max_prompt_length:
                prompt = Prompt(index=row.index, place=row.where, ids=ids, messages=row.messages, columns=row.columns)
                prompts.append(prompt)
            elif overlong == "error":
                raise UserError(
                    f"{row.where}: the prompt has {len(ids)} tokens, above max_prompt_length = {max_prompt_length}; "
                    "raise max_prompt_length, or set data.overlong to drop"
                )
    return prompts


def render_rows(
    rows: Iterable[tuple[str, Row]],
    template: ChatTemplate,
    *,
    columns: dict[str, str],
    chat: bool,
    system_prompt: str | None,
) -> Iterator[Rendered]:
    """Yield each row with its prompt as text; log a warning about rows that are probably mistakes."""
    names: set[str] | None = None
    answered: list[tuple[str, list[Message]]] = []
    toolless = ""
    for index, (where, row) in enumerate(rows):
        named = name_columns(where, row, columns)
        names = names or set(named)
        if set(named) != names:
            odd = ", ".join(sorted(names.symmetric_difference(named)))
            raise UserError(
                f"{where}: the row differs from the first row in the columns {odd}; give every row the same columns "
                "(null if it has no value)"
            )
        messages = as_messages(where, named.pop("prompt"), chat=chat, system_prompt=system_prompt)
        if isinstance(messages, str):
            toolless = toolless or (where if named.get("tools") or named.get("chat_template_kwargs") else "")
            text, special = _plain(messages, template.tokenizer.bos_token)
        else:
            tools = as_tools(where, named.get("tools"))
            args = as_template_args(where, named.get("chat_template_kwargs"))
            text, special = template.render(where, messages, tools=tools, args=args), False
            if messages[-1]["role"] == "assistant":
                answered.append((where, messages))
        yield Rendered(index, where, messages, text, special, named)
    if answered:
        where, messages = answered[0]
        warn(
            f"{len(answered)} prompts end with an assistant message, which the completion will continue ({where}: "
            f"{messages[-1]['content'][-60:]!r}). If it is the answer, as in data for supervised fine-tuning, move it "
            "from the prompt to a column for the rewards"
        )
    if toolless:
        warn(
            f"{toolless}: the prompt is plain text, so its tools and chat_template_kwargs are ignored; set data.chat "
            "to true to turn the text into a user message"
        )


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
