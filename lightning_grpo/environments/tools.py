"""`ToolEnvironment`: the policy calls Python functions and reads their results, until it answers without a call."""

import asyncio
import inspect
import json
import math
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pkgutil import resolve_name
from threading import Thread
from typing import Any

from transformers.utils import get_json_schema

from lightning_grpo.data.rows import Message
from lightning_grpo.environments.protocol import Environment, Step
from lightning_grpo.environments.tool_calls import ToolCall, parse_calls
from lightning_grpo.errors import RunError, UserError
from lightning_grpo.ranges import check_ranges
from lightning_grpo.rewards import Reward

_TYPES: dict[str, type | tuple[type, ...]] = {
    "integer": int,
    "number": (int, float),
    "string": str,
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}


class ToolError(Exception):
    """A call that can't be executed; the policy reads the reason."""


@dataclass(kw_only=True, eq=False)
class ToolEnvironment(Environment):
    """Lets the policy call tools. A completion without a call ends the episode.

    A tool is a function, plain or ``async``, whose arguments have types, and whose Google-style docstring describes it
    and its arguments. The chat template renders its JSON schema into the prompt. The calls of a completion are executed
    in their order, and the policy reads one message with the role ``tool`` for each. If a call fails, that message
    states the reason: the call is not valid JSON, there is no such tool, an argument is missing or has another type, or
    the tool raised an exception or exceeded its time.

    A tool must not evaluate code that the policy wrote in this process: use `lightning_grpo.environments.run_python`,
    or `lightning_grpo.rewards.sandbox`.
    """

    tools: list[str | Callable[..., Any]]
    """The functions, or their import paths (``package.module.function``)."""
    tool_time_limit: float = 30.0
    """Seconds after which the policy no longer waits for a call. A plain function goes on in its thread."""
    max_result_length: int = 1000
    """Characters of a result that the policy reads. The rest is cut off."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges = {"tool_time_limit": "(0, inf)", "max_result_length": "[1, inf)"}
        check_ranges(self, ranges, prefix=f"{type(self).__name__}.")
        if self.step_time_limit is not None and self.tool_time_limit >= self.step_time_limit:
            raise UserError(
                f"{type(self).__name__}.tool_time_limit is {self.tool_time_limit:g}, but all calls of a turn together "
                f"have {self.step_time_limit:g} seconds; raise step_time_limit, or set it to null"
            )
        functions = [resolve(tool, "tool") for tool in self.tools]
        self._functions = {function.__name__: function for function in functions}
        if len(self._functions) < len(functions):
            raise UserError(f"two of the tools {', '.join(f.__name__ for f in functions)} have the same name")
        self._schemas = {name: schema(function) for name, function in self._functions.items()}
        self._response_template: dict[str, Any] | None = None

    def prepare(self, tokenizer: Any) -> None:
        self._response_template = getattr(tokenizer, "response_template", None)

    @property
    def tool_schemas(self) -> list[dict[str, Any]]:
        return list(self._schemas.values())

    @property
    def default_rewards(self) -> list[Reward]:
        """None, since tools give no rewards."""
        return []

    async def step(self, completion: str) -> Step:
        """Execute the calls of a completion in their order."""
        calls = parse_calls(completion, self._response_template)
        # a completion of many slow calls must not end the run
        deadline = time.monotonic() + 0.9 * (self.step_time_limit or math.inf)
        messages: list[Message] = []
        failures: list[float] = []
        for call in calls:
            try:
                text, failed = _as_text(await self._execute(call, deadline)), 0.0
            except RunError:  # for example, no worker process can be started
                raise
            except Exception as error:
                reason = str(error) if isinstance(error, ToolError) else f"{type(error).__name__}: {error}"
                text, failed = f"Error: {reason}", 1.0
            cut = text if len(text) <= self.max_result_length else text[: self.max_result_length] + " …"
            name = {"name": call.name} if call.name in self._functions else {}
            messages.append({"role": "tool"} | name | {"content": cut})
            failures.append(failed)
        return Step(
            observation=messages,
            done=not calls,
            metrics={"tools/call_frequency": float(len(calls)), "tools/failure_frequency": failures},
        )

    async def _execute(self, call: ToolCall, deadline: float) -> Any:
        if call.error:
            raise ToolError(call.error)
        if call.name not in self._functions:
            raise ToolError(f"there is no tool {call.name!r}; the tools are {', '.join(self._functions)}")
        function = self._functions[call.name]
        _check_arguments(call, function, self._schemas[call.name]["function"]["parameters"]["properties"])
        seconds = min(self.tool_time_limit, deadline - time.monotonic())
        if seconds <= 0:
            raise ToolError(f"there was no time left to call {call.name}")
        try:
            async with asyncio.timeout(seconds) as limit:
                return await run_tool(function, call.arguments)
        except TimeoutError:
            if not limit.expired():
                raise
            raise ToolError(f"{call.name} took more than {seconds:.3g} seconds") from None


def resolve(path: str | Callable[..., Any], what: str) -> Callable[..., Any]:
    """Return the function or class at an import path."""
    if not isinstance(path, str):
        return path
    try:
        found = resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"the {what} {path!r} can't be imported: {error}; set package.module.name") from None
    if not callable(found):
        raise UserError(f"the {what} {path!r} can't be called; set the import path of a function or class")
    return found


def schema(function: Callable[..., Any]) -> dict[str, Any]:
    """The JSON schema of a function, for the chat template."""
    try:
        return get_json_schema(function)
    except Exception as error:
        raise UserError(
            f"the tool {function.__name__!r} has no JSON schema ({error}); give every argument a type, and a line "
            "under Args: in the docstring"
        ) from error


def _check_arguments(call: ToolCall, function: Callable[..., Any], schemas: dict[str, Any]) -> None:
    try:
        inspect.signature(function).bind(**call.arguments)
    except TypeError as error:
        raise ToolError(f"{call.name}: {error}; its arguments are {', '.join(schemas) or 'none'}") from None
    for name, value in call.arguments.items():
        allowed = schemas.get(name, {})
        kinds = allowed.get("type", [])
        kinds = [kinds] if isinstance(kinds, str) else [*kinds]
        if value is None and allowed.get("nullable"):
            continue
        if kinds and not any(_has_type(value, kind) for kind in kinds):
            raise ToolError(f"{call.name}: the argument {name} must be of type {' or '.join(kinds)}, not {value!r}")
        if "enum" in allowed and value not in allowed["enum"]:
            raise ToolError(f"{call.name}: the argument {name} must be one of {allowed['enum']}, not {value!r}")


def _has_type(value: Any, kind: str) -> bool:
    is_bool = isinstance(value, bool)
    return is_bool if kind == "boolean" else not is_bool and isinstance(value, _TYPES.get(kind, object))


def _as_text(result: Any) -> str:
    return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)


async def run_tool(function: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Call a function; a plain one in a thread, which does not keep the process from ending."""
    if inspect.iscoroutinefunction(function):
        return await function(**arguments)
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()  # so that it can't be cancelled

    def run() -> None:
        try:
            future.set_result(function(**arguments))
        except Exception as error:
            future.set_exception(error)
        except BaseException as error:  # sys.exit, for example, would end the event loop
            future.set_exception(ToolError(f"{type(error).__name__}: {error}"))

    Thread(target=run, name="tool", daemon=True).start()
    return await asyncio.wrap_future(future)
