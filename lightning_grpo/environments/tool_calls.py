"""The tool calls in a completion, in the formats of common chat templates."""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from transformers.utils.chat_parsing import parse_response

_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_JSON = json.JSONDecoder()


@dataclass(frozen=True)
class ToolCall:
    """A call that the policy wrote."""

    name: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    """Why it can't be executed; empty if its form is right."""


def parse_calls(completion: str, response_template: dict[str, Any] | None = None) -> list[ToolCall]:
    """Return the tool calls of a completion in their order; none in what precedes ``</think>``.

    Args:
        completion: its text.
        response_template: the tokenizer's description of the model's format, which transformers parses.

    Without such a description, two formats are read: ``<tool_call>{"name": …, "arguments": {…}}</tool_call>`` (Hermes,
    Qwen, SmolLM), and a completion that consists of JSON objects with ``name`` and ``parameters``, separated by
    semicolons (Llama 3).
    """
    if response_template is not None:
        return _described_calls(completion, response_template)
    text = completion.rpartition("</think>")[2]
    if tagged := _TAGGED.findall(text):
        return [_tagged_call(part) for part in tagged]
    return _bare_calls(text.strip().removeprefix("<|python_tag|>"))


def _described_calls(completion: str, response_template: dict[str, Any]) -> list[ToolCall]:
    try:
        calls = parse_response(completion, response_template, prefix="").get("tool_calls") or []
    except Exception as error:
        return [ToolCall(error=f"the call can't be read ({error})")]
    wrong = ToolCall(error="a call must have a name and arguments")
    return [as_call(call.get("function", call) if isinstance(call, dict) else call) or wrong for call in calls]


def _tagged_call(text: str) -> ToolCall:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return ToolCall(error=f"the call is not valid JSON ({error})")
    return as_call(value) or ToolCall(error='a call must be a JSON object {"name": …, "arguments": {…}}')


def _bare_calls(text: str) -> list[ToolCall]:
    calls: list[ToolCall] = []
    while text.startswith("{"):
        try:
            value, end = _JSON.raw_decode(text)
        except (ValueError, RecursionError):
            break
        if (call := as_call(value)) is None:
            break
        calls.append(call)
        text = text[end:].lstrip().removeprefix(";").lstrip()
    return calls


def as_call(value: Any) -> ToolCall | None:
    """The call that a JSON value describes, or None if it describes none."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        return None
    arguments = value.get("arguments", value.get("parameters"))
    if isinstance(arguments, str):  # OpenAI's interface gives JSON text
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return None
    return ToolCall(value["name"], arguments) if isinstance(arguments, dict) else None
