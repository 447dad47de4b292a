"""`VerifiersEnvironment`: runs environments of the package verifiers."""

import asyncio
import copy
import json
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from threading import Thread
from types import SimpleNamespace
from typing import Any

from lightning_grpo.data.rows import Message
from lightning_grpo.data.verifiers import load_verifiers
from lightning_grpo.environments.protocol import Environment, Step
from lightning_grpo.environments.tool_calls import parse_calls
from lightning_grpo.errors import RunError, UserError
from lightning_grpo.rewards import FunctionReward, Reward

FULL = "the maximum context length is reached"
"""An error of a server that verifiers recognizes; it ends an episode as truncated."""


@dataclass(kw_only=True, eq=False)
class VerifiersEnvironment(Environment):
    """Runs an environment of the package verifiers: a ``MultiTurnEnv``, ``SingleTurnEnv``, ``ToolEnv`` or a subclass.

    The environment's own ``rollout`` runs unchanged; its stop conditions, messages and tools decide how an episode goes
    on. Where it would send its messages to a server, the run's engine samples the turn instead. The score of its rubric
    is the reward `rubric`, which an empty list of rewards means. Rubrics and tools run in this process.
    """

    name: str
    """The environment's name on the hub of environments, whose package is installed, or the name of a module with a
    function ``load_environment``."""
    args: dict[str, Any] = field(default_factory=dict)
    """Arguments of ``load_environment``."""
    max_turns: int | None = None
    """The largest number of turns of the policy in an episode. By default that of the environment, or 8 if it has no
    limit."""

    def __post_init__(self) -> None:
        self._environment = load_verifiers(self.name, self.args, f"the environment {self.name!r}")
        if self._environment.message_type != "chat":
            raise UserError(f"the environment {self.name!r} completes plain text; use one with message_type chat")
        if self.max_turns is None:
            limit = getattr(self._environment, "max_turns", -1)
            self.max_turns = limit if limit > 0 else Environment.max_turns
        super().__post_init__()
        self._rollout: Rollout | None = None
        self._response_template: dict[str, Any] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "VerifiersEnvironment":
        return copy.copy(self)  # the state of an episode is that of its rollout

    def prepare(self, tokenizer: Any) -> None:
        self._response_template = getattr(tokenizer, "response_template", None)

    @property
    def tool_schemas(self) -> list[dict[str, Any]]:
        return list(self._environment.oai_tools or [])

    @property
    def default_rewards(self) -> list[Reward]:
        return [FunctionReward(function=rubric)]

    async def reset(self, row: Mapping[str, Any]) -> list[Message]:
        """Begin a rollout, and return the messages with which the environment extends the prompt."""
        tools = [*self.tool_schemas, *(row.get("tools") or [])]
        self._rollout = Rollout(row["prompt"], tools, self._response_template)
        given = {"example_id": 0, "task": self.name, **row}
        observation = await in_loop(self._rollout.begin(self._environment, given))
        if observation is None:
            raise RunError(f"the rollout ended before its first turn ({self._rollout.state.get('error')!r})")
        return observation

    async def step(self, completion: str) -> Step:
        """Continue the rollout with a turn of the policy."""
        observation = await in_loop(self._rollout.answer(completion))
        return Step(observation=observation, done=observation is None)

    async def close(self) -> None:
        if self._rollout is not None:
            await in_loop(self._rollout.close())

    async def score(self, group: Sequence["VerifiersEnvironment"]) -> list[dict[str, Any]]:
        """Return the states of a group's rollouts, with the ``reward`` and ``metrics`` of the rubric."""
        states = [await environment._rollout.finish() for environment in group]
        await self._environment.rubric.score_group(states)
        return states


async def rubric(
    environments: Sequence[VerifiersEnvironment],
    log_metric: Callable[[str, float], None],
    log_extra: Callable[[str, list[Any]], None],
) -> list[float]:
    """A reward function: the score of the environment's rubric for each completion of a group.

    The functions of the rubric, weighted or not, are logged as ``verifiers/NAME`` and with the samples. So is the share
    of rollouts that ended with an error of verifiers.
    """
    states = await in_loop(environments[0].score(environments))
    failed = [float(state["error"] is not None) for state in states]
    values = {name: [state["metrics"][name] for state in states] for name in states[0]["metrics"]} | {"failed": failed}
    for name, column in values.items():
        log_metric(f"verifiers/{name}", sum(column) / len(column))
        log_extra(f"verifiers/{name}", column)
    return [state["reward"] for state in states]


class Rollout:
    """A rollout of verifiers, to which this object is the client that samples. Its methods run in one event loop.

    Args:
        messages: the prompt.
        tools: JSON schemas of the tools in the prompt.
        response_template: the tokenizer's description of tool calls.
    """

    def __init__(
        self, messages: list[Message], tools: list[dict[str, Any]], response_template: dict[str, Any] | None
    ) -> None:
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self._create))
        self._messages = with_text(messages)
        self._tools = tools
        self._response_template = response_template
        self._requests: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self._turn: asyncio.Future[Any] | None = None
        self._task: asyncio.Task[dict[str, Any]]

    @property
    def state(self) -> dict[str, Any]:
        """The state of a rollout that has ended."""
        return self._task.result()

    async def begin(self, environment: Any, row: Mapping[str, Any]) -> list[Message] | None:
        """Start the rollout, and return the messages after the prompt; None if it has ended."""
        self._task = asyncio.create_task(environment.rollout(row, self, "policy", {}))
        self._task.add_done_callback(lambda _: self._requests.put_nowait(None))
        return await self._observation()

    async def answer(self, completion: str) -> list[Message] | None:
        """Continue with a turn of the policy, and return the messages that follow it; None if the rollout has ended."""
        self._messages = [*self._messages, {"role": "assistant", "content": completion}]
        self._turn.set_result(self._as_response(completion))
        return await self._observation()

    async def finish(self) -> dict[str, Any]:
        """Return the state. If a limit of the run ended the episode, the rollout still waits for a turn, and ends as
        truncated."""
        if not self._task.done():
            import httpx
            from openai import BadRequestError

            response = httpx.Response(400, text=FULL, request=httpx.Request("POST", "http://localhost"))
            # openai 3 has httpx2, whose responses are the same
            self._turn.set_exception(BadRequestError(FULL, response=response, body=None))  # type: ignore[arg-type]
        return await self._task

    async def close(self) -> None:
        """End the rollout, so that verifiers frees what it holds."""
        if self._turn is None or self._turn.done():
            self._task.cancel()  # unless it has ended, an error of the run interrupts it
            await asyncio.gather(self._task, return_exceptions=True)
        else:
            await self.finish()

    async def _create(self, **request: Any) -> Any:
        """Wait for a turn of the policy. Its arguments and its result are those of OpenAI's client."""
        turn = request["turn"] = asyncio.get_running_loop().create_future()
        self._requests.put_nowait(request)
        return await turn

    async def _observation(self) -> list[Message] | None:
        """The messages that the next request adds to the conversation; None if the rollout has ended."""
        request = await self._requests.get()
        if request is None:
            self._task.result()  # or the exception that ended it
            return None
        self._turn = request["turn"]
        if (request.get("tools") or []) != self._tools:
            raise RunError("the environment offers other tools than the prompt describes; set them in the column tools")
        messages = with_text(request["messages"])
        if (said := _spoken(messages[: len(self._messages)])) != (known := _spoken(self._messages)):
            raise RunError(
                f"the environment changed earlier messages, from {known} to {said}; only one that appends messages can "
                "be trained on the tokens that were sampled"
            )
        added = messages[len(self._messages) :]
        self._messages = messages
        return added

    def _as_response(self, completion: str) -> Any:
        """A turn as the ``ChatCompletion`` of a server."""
        from openai.types.chat import ChatCompletion

        calls = parse_calls(completion, self._response_template) if self._tools else []
        functions = [{"name": call.name, "arguments": call.error or json.dumps(call.arguments)} for call in calls]
        tool_calls = [
            {"id": f"call_{len(self._messages)}_{i}", "type": "function", "function": function}
            for i, function in enumerate(functions)
        ]
        message = {"role": "assistant", "content": completion, "tool_calls": tool_calls or None}
        choice = {"index": 0, "finish_reason": "tool_calls" if calls else "stop", "message": message}
        completed = {"id": "", "created": 0, "model": "policy", "object": "chat.completion", "choices": [choice]}
        return ChatCompletion.model_validate(completed)


def with_text(messages: Sequence[Message]) -> list[Message]:
    """The messages with their text as content, which may be in parts.

    Raises:
        RunError: if a part is not text.
    """
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    if others := [part["type"] for part in parts if part["type"] != "text"]:
        raise RunError(f"a message of the environment contains {others[0]!r}; only text can be trained on")
    return [message | {"content": _text(content)} for message, content in zip(messages, contents, strict=True)]


def _text(content: str | list[dict[str, Any]] | None) -> str:
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def _spoken(messages: Sequence[Message]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in messages]


async def in_loop(call: Coroutine[Any, Any, Any]) -> Any:
    """Await a call in the event loop that all environments of verifiers share. Their clients can't change loops."""
    return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(call, _loop()))


@cache
def _loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, name="verifiers", daemon=True).start()
    return loop
