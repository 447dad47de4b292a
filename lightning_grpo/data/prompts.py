"""From rows to prompts: columns named, messages through the chat template, token ids once and for all."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lightning_grpo.errors import UserError

Message = dict[str, Any]
# what the caller of a reward function passes beside the columns
RESERVED = ("prompts", "completions", "completion_ids", "trainer_state")


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One row of the data set, encoded."""

    index: int
    """Row number in the source, from 0: stays the same whatever is dropped or held out."""
    ids: list[int]
    """Token ids, as the engine gets them."""
    messages: str | list[Message]
    """The prompt as text or as chat messages: what reward functions see as ``prompts``."""
    columns: dict[str, Any]
    """All other columns, for the rewards."""


class PromptBatch:
    """This rank's prompts of one rollout (or of one validation batch). Not a dataclass, so that Lightning's
    conversions of batches don't walk through every token id.

    prompts: token ids of each prompt; messages: the same as text or chat messages; columns: the other columns of each
    row; prompt_indices: row numbers in the source, stable over runs; rollout: number of the rollout, from 0, counted
    over the whole training; step: which repetition of the batch this is, in [0, steps_per_rollout); real: False for a
    row that only fills up a validation shard, to be left out of every figure.
    """

    def __init__(self, rows: Sequence[Prompt], *, rollout: int = 0, step: int = 0, real: Sequence[bool] | None = None):
        self.rows = list(rows)
        self.rollout = rollout
        self.step = step
        self.real = [True] * len(self.rows) if real is None else list(real)

    @property
    def prompts(self) -> list[list[int]]:
        return [row.ids for row in self.rows]

    @property
    def messages(self) -> list[str | list[Message]]:
        return [row.messages for row in self.rows]

    @property
    def columns(self) -> list[dict[str, Any]]:
        return [row.columns for row in self.rows]

    @property
    def prompt_indices(self) -> list[int]:
        return [row.index for row in self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def to(self, device: torch.device) -> "PromptBatch":
        """Itself: it holds no tensors (Lightning moves batches with this)."""
        return self


def take_column(row: dict[str, Any], path: str) -> Any:
    """``row["a"]["b"]`` for the path ``a.b``; a column whose name holds the dot itself comes first."""
    if path in row:
        return row[path]
    value: Any = row
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            raise KeyError(path)
        value = value[key]
    return value


def name_columns(where: str, row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """The row under the names of ``columns`` (new name → column or dotted path), the others kept.

    A row of verl's convention gets ``answer`` from its ``reward_model.ground_truth``.
    """
    taken = set(columns.values())
    named = {name: value for name, value in row.items() if name not in taken}
    for name, path in columns.items():
        try:
            named[name] = take_column(row, path)
        except KeyError:
            raise UserError(
                f"{where}: no column {path!r}, which data.columns.{name} names; the row has {', '.join(row)}"
            ) from None
    reward_model = named.get("reward_model")
    if "answer" not in named and isinstance(reward_model, dict) and "ground_truth" in reward_model:
        named["answer"] = reward_model["ground_truth"]
    if "prompt" not in named:
        raise UserError(f"{where}: no column 'prompt'; set data.columns.prompt to one of {', '.join(row)}")
    if clash := [name for name in RESERVED if name in named]:
        raise UserError(
            f"{where}: the column {clash[0]!r} has the name of an argument that every reward function gets; "
            f"set data.columns.NEW_NAME to {clash[0]}"
        )
    return named


def as_messages(where: str, prompt: Any, *, chat: bool, system_prompt: str | None) -> str | list[Message]:
    """The prompt checked, a string wrapped into a user's message where ``chat``, the system prompt put first."""
    if isinstance(prompt, str):
        if not prompt:
            raise UserError(f"{where}: the prompt is empty")
        if not chat:
            if system_prompt is not None:
                raise UserError(
                    f"{where}: data.system_prompt is set and this prompt is plain text; set data.chat to true to "
                    "make it a user's message, or leave data.system_prompt unset"
                )
            return prompt
        messages: list[Message] = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, list | tuple) and prompt:
        messages = []
        for message in prompt:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise UserError(f"{where}: a message is an object with role and content, not {message!r}")
            if not isinstance(message.get("content"), str):
                raise UserError(f"{where}: a message's content is text, not {message.get('content')!r}")
            # parquet fills the keys that other rows have with None
            messages.append({key: value for key, value in message.items() if value is not None})
    else:
        raise UserError(f"{where}: a prompt is a string or a list of messages, not {prompt!r}")
    if system_prompt is not None:
        if messages[0]["role"] == "system":
            raise UserError(f"{where}: data.system_prompt is set and the row has its own system message; unset it")
        messages = [{"role": "system", "content": system_prompt}, *messages]
    return messages


def encode(
    where: str,
    prompt: str | list[Message],
    tokenizer: Any,
    *,
    chat_template: str | None,
    chat_template_args: dict[str, Any],
) -> list[int]:
    """Token ids. Text is taken as it is, with the beginning-of-sequence token that the tokenizer adds; messages go
    through the chat template, with the opening of the assistant's turn added, or with the assistant's last message
    left open where they end in one.
    """
    if isinstance(prompt, str):
        begun = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
        ids = list(tokenizer(prompt, add_special_tokens=not begun)["input_ids"])
        # some tokenizers close what they encode; a prompt stays open
        if ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
            ids.pop()
    else:
        if chat_template is None and not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"{where}: the prompt is a list of messages, and the tokenizer {tokenizer.name_or_path!r} has no chat "
                "template; set data.chat_template to one (a file or its text), or use a model trained for chat"
            )
        open_ended = prompt[-1]["role"] == "assistant"
        text = tokenizer.apply_chat_template(
            prompt,
            chat_template=chat_template,
            add_generation_prompt=not open_ended,
            continue_final_message=open_ended,
            tokenize=False,
            **chat_template_args,
        )
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    if not ids:
        raise UserError(f"{where}: the prompt {prompt!r} has no tokens")
    return ids


def encode_rows(
    rows: Sequence[tuple[str, dict[str, Any]]],
    tokenizer: Any,
    *,
    columns: dict[str, str],
    chat: bool,
    system_prompt: str | None,
    chat_template: str | None,
    chat_template_args: dict[str, Any],
    max_prompt_length: int | None,
    overlong: Literal["drop", "error"],
) -> list[Prompt]:
    """Rows, each with its place for error messages, as prompts; without those that are too long, or refusing them."""
    if chat_template is not None and "{" not in chat_template:
        if not Path(chat_template).is_file():
            raise UserError(f"data.chat_template is {chat_template!r}, neither a file nor a Jinja template")
        chat_template = Path(chat_template).read_text(encoding="utf-8")
    prompts: list[Prompt] = []
    names: set[str] | None = None
    for index, (where, row) in enumerate(rows):
        named = name_columns(where, row, columns)
        names = names or set(named)
        if set(named) != names:
            odd = ", ".join(sorted(names.symmetric_difference(named)))
            raise UserError(
                f"{where}: differs from the first row in the columns {odd}; give every row the same columns "
                "(null where it has no value)"
            )
        messages = as_messages(where, named.pop("prompt"), chat=chat, system_prompt=system_prompt)
        ids = encode(where, messages, tokenizer, chat_template=chat_template, chat_template_args=chat_template_args)
        if max_prompt_length is None or len(ids) <= max_prompt_length:
            prompts.append(Prompt(index=index, ids=ids, messages=messages, columns=named))
        elif overlong == "error":
            raise UserError(
                f"{where}: the prompt has {len(ids)} tokens, above max_prompt_length = {max_prompt_length}; raise it, "
                "or set data.overlong to drop"
            )
    return prompts


def fingerprint(prompts: Sequence[Prompt]) -> str:
    """Equal for equal rows and token ids in the same order."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(np.array([prompt.index, len(prompt.ids), *prompt.ids], dtype=np.int64).tobytes())
    return digest.hexdigest()
