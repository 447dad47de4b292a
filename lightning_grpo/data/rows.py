"""The content of a row: rename its columns, and validate its prompt, tools and template variables."""

import json
import re
from collections.abc import Mapping
from typing import Any

from lightning_grpo.errors import UserError

Message = dict[str, Any]
Row = dict[str, Any]
# Arguments of reward functions besides the columns.
RESERVED = ("prompts", "completions", "completion_ids", "trainer_state")
IMAGES = ("images", "image")
"""Columns in which TRL's and verl's data sets have images that belong to the prompt."""
_RENAME = "if it is meant for the rewards, set data.columns.NEW_NAME to {}"
MESSAGES_AS_TEXT = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:""")


def take_column(row: dict[str, Any], path: str) -> Any:
    """Return ``row["a"]["b"]`` for the path ``a.b``, or the column whose name is the path itself if there is one."""
    if path in row:
        return row[path]
    value: Any = row
    for key in path.split("."):
        if not isinstance(value, dict) or key not in value:
            raise KeyError(path)
        value = value[key]
    return value


def name_columns(where: str, row: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """Return the row with columns renamed by ``columns`` (new name → column or dotted path) and the others unchanged.

    In a row that follows verl's convention, a missing or null ``answer`` is set to ``reward_model.ground_truth``.
    """
    taken = set(columns.values())
    named = {name: value for name, value in row.items() if name not in taken}
    for name, path in columns.items():
        try:
            named[name] = take_column(row, path)
        except KeyError:
            raise UserError(
                f"{where}: data.columns.{name} is {path!r}, but the row has no such column; it has {', '.join(row)}"
            ) from None
    reward_model = named.get("reward_model")
    if named.get("answer") is None and isinstance(reward_model, dict) and "ground_truth" in reward_model:
        named["answer"] = reward_model["ground_truth"]
    if "prompt" not in named:
        raise UserError(f"{where}: the row has no column 'prompt'; set data.columns.prompt to one of {', '.join(row)}")
    if images := [name for name in IMAGES if named.get(name)]:
        raise UserError(
            f"{where}: the row has images in its column {images[0]!r}, and only text can be trained on; remove the "
            "column"
        )
    if clash := [name for name in RESERVED if name in named]:
        raise UserError(
            f"{where}: the column {clash[0]!r} has the name of an argument of every reward function; "
            f"set data.columns.NEW_NAME to {clash[0]}"
        )
    return named


def as_messages(where: str, prompt: Any, *, chat: bool, system_prompt: str | None) -> str | list[Message]:
    """Validate the prompt; turn text into a user message if ``chat``, and put the system prompt before messages."""
    if isinstance(prompt, str):
        if not prompt:
            raise UserError(f"{where}: the prompt is empty")
        if MESSAGES_AS_TEXT.match(prompt):
            raise UserError(
                f"{where}: the prompt is text that contains chat messages; write them as a list of objects (CSV files "
                "can't have lists: use .jsonl or .parquet)"
            )
        if not chat:
            if system_prompt is not None:
                raise UserError(
                    f"{where}: data.system_prompt is set, but this prompt is plain text; set data.chat to true to turn "
                    "the text into a user message, or leave data.system_prompt unset"
                )
            return prompt
        messages: list[Message] = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, list | tuple) and prompt:
        messages = [_message(where, message) for message in prompt]
        if not any(str(message.get("content") or "").strip() for message in messages):
            raise UserError(f"{where}: the prompt is empty: none of its messages has text")
        if messages[-1].get("tool_calls"):
            raise UserError(f"{where}: the last message calls tools; add their answers as further messages")
    else:
        raise UserError(f"{where}: a prompt must be a string or a list of messages, not {prompt!r}")
    if system_prompt is not None:
        if messages[0]["role"] == "system":
            raise UserError(
                f"{where}: data.system_prompt is set, but the row has its own system message; unset the option"
            )
        messages = [{"role": "system", "content": system_prompt}, *messages]
    return messages


def _message(where: str, message: Any) -> Message:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise UserError(f"{where}: a message must be an object with role and content, not {message!r}")
    # Parquet adds keys of other rows with the value None.
    message = without_nulls(message)
    if calls := message.get("tool_calls"):
        message["tool_calls"] = [_call(where, call) for call in calls]
        message.setdefault("content", None)
    else:
        message.pop("tool_calls", None)
    content = message.get("content")
    if isinstance(content, list):
        message["content"] = _joined(where, content)
    elif not isinstance(content, str) and not (content is None and calls):
        raise UserError(f"{where}: the content of a message must be text, not {content!r}")
    return message


def _call(where: str, call: Any) -> dict[str, Any]:
    """Return a tool call with arguments as an object, as templates expect; OpenAI's interface gives JSON text."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError(f"{where}: a tool call must be an object with a function that has a name, not {call!r}")
    if isinstance(function.get("arguments"), str):
        try:
            function["arguments"] = json.loads(function["arguments"])
        except ValueError as error:
            raise UserError(f"{where}: the arguments of a call to {function['name']} are not JSON: {error}") from error
    return call


def _joined(where: str, parts: list[Any]) -> str:
    """Return the text of a message that is given in parts, one per line, as vLLM's server joins them."""
    texts = []
    for part in parts:
        if isinstance(part, str):
            part = {"type": "text", "text": part}
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise UserError(f"{where}: a message has a part of type {kind!r}; only parts of type 'text' can be used")
        texts.append(part["text"])
    return "\n".join(texts)


def as_tools(where: str, tools: Any) -> list[dict[str, Any]] | None:
    """Return the ``tools`` of a row, JSON schemas given as a list or JSON text; None if there are none."""
    tools = _from_json(where, "tools", tools)
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(
            f"{where}: the column tools must be a list of JSON schemas, not {tools!r}; {_RENAME.format('tools')}"
        )
    return [without_nulls(tool) for tool in tools]


def as_template_args(where: str, args: Any) -> dict[str, Any]:
    """Return the ``chat_template_kwargs`` of a row, variables for the template given as an object or JSON text."""
    args = _from_json(where, "chat_template_kwargs", args)
    if args is None:
        return {}
    if not isinstance(args, dict):
        raise UserError(
            f"{where}: the column chat_template_kwargs must be an object, not {args!r}; "
            f"{_RENAME.format('chat_template_kwargs')}"
        )
    return without_nulls(args)


def _from_json(where: str, column: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value.strip() else None
    except ValueError as error:
        raise UserError(f"{where}: the text in the column {column} is not JSON: {error}") from error


def without_nulls(value: Any) -> Any:
    """Return a copy without keys whose value is None, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list | tuple) else value
