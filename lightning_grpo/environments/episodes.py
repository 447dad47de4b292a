"""Episodes of many samples, which run concurrently against one engine.

The token ids of an episode are those of the prompt, of each turn as the engine sampled it, and of the observations in
between, which the chat template renders. Nothing that was sampled is ever tokenized again.

Shapes: B prompts, G samples of each.
"""

import copy
import json
import math
import traceback
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self, cast, get_args

from transformers import PreTrainedTokenizerBase

from lightning_grpo.data.prompts import Prompt
from lightning_grpo.data.rows import Message, as_template_args, as_tools
from lightning_grpo.environments import calls
from lightning_grpo.environments.calls import Calls, TimeLimitError
from lightning_grpo.environments.protocol import Environment, Step
from lightning_grpo.environments.template import TurnTemplate, followed_by
from lightning_grpo.errors import RunError, UserError
from lightning_grpo.rewards import decode_completions
from lightning_grpo.rewards.logs import plain
from lightning_grpo.rollout import Completion, Engine, FinishReason, OnGroup, Sampling, SyncedEngine, Turn
from lightning_grpo.rollout.seeds import turn_seed

POLL = 0.01
"""Seconds to wait for turns of an engine before looking for steps that have ended."""
EndReason = Literal["done", "turn_limit", "token_limit"]
"""What ended an episode: the environment, max_turns, or a limit on tokens."""


@dataclass(kw_only=True, eq=False)
class Episode(Completion):
    """A completion of several turns in an environment."""

    key: int
    """Number of the episode among those that run together."""
    environment: Environment
    prompt: Prompt
    """The row. What `Environment.reset` returned is appended to its prompt."""
    index: int
    """Index of the prompt among those of the rollout."""
    seed: int
    appended: str | list[Message] = field(default_factory=list)
    """What `Environment.reset` returned."""
    turns: int = 0
    """Number of turns that were begun."""
    end_reason: EndReason | None = None
    metric_sums: dict[str, float] = field(default_factory=dict)
    metric_values: dict[str, list[float]] = field(default_factory=dict)
    extras: dict[str, Any] = field(default_factory=dict)

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish_reason: FinishReason = "stop"
    """Of the last turn."""
    mask: list[bool] = field(default_factory=list)  # type: ignore[assignment]  # here they are never None
    turn_rewards: list[tuple[int, float]] = field(default_factory=list)  # type: ignore[assignment]
    messages: list[Message] = field(default_factory=list)  # type: ignore[assignment]

    @property
    def row(self) -> dict[str, Any]:
        """A copy of all columns."""
        return copy.deepcopy(self.prompt.columns | {"prompt": self.prompt.messages})

    @property
    def template_args(self) -> dict[str, Any]:
        """The row's variables for the chat template."""
        return as_template_args(self.prompt.place, self.prompt.columns.get("chat_template_kwargs"))

    def where(self, method: str) -> str:
        """The subject of messages about a method of the environment."""
        return f"{self.prompt.place}: {type(self.environment).__name__}.{method}"

    def extend(self, token_ids: list[int], logprobs: list[float], versions: list[int], *, sampled: bool) -> None:
        """Append tokens."""
        self.token_ids += token_ids
        self.logprobs += logprobs
        self.versions += versions
        self.mask += [sampled] * len(token_ids)

    def log(self, step: Step) -> None:
        """Add the reward and the logs of a step."""
        if not math.isfinite(step.reward):
            raise RunError(f"{self.where('step')} returned the reward {step.reward}; return a finite number")
        self.turn_rewards.append((len(self.token_ids) - 1, float(step.reward)))
        self.extras |= {str(name): plain(value) for name, value in step.extras.items()}
        for name, value in step.metrics.items():
            if isinstance(value, Sequence):
                self.metric_values.setdefault(name, []).extend(map(float, value))
            else:
                self.metric_sums[name] = self.metric_sums.get(name, 0.0) + float(value)


def metrics(episodes: Sequence[Episode]) -> dict[str, list[float]]:
    """Values by the name of the metric; the mean over the values of all rollouts in an optimizer step is logged."""
    values: dict[str, list[float]] = {
        "environment/turns": [float(episode.turns) for episode in episodes],
        "environment/reward": [sum(reward for _, reward in episode.turn_rewards) for episode in episodes],
    }
    for reason in get_args(EndReason):
        values[f"environment/{reason}"] = [float(episode.end_reason == reason) for episode in episodes]
    for name in dict.fromkeys(name for episode in episodes for name in episode.metric_sums):
        values[name] = [episode.metric_sums.get(name, 0.0) for episode in episodes]
    for name in dict.fromkeys(name for episode in episodes for name in episode.metric_values):
        values[name] = [value for episode in episodes for value in episode.metric_values.get(name, ())]
    return values


class Episodes:
    """Runs episodes of an environment. As a context manager, it closes their environments at the end.

    Args:
        prototype: the environment, of which every episode gets a copy.
        tokenizer: the policy's tokenizer.
        end_ids: tokens that end a turn.
        template: renders the messages of the environment.
        max_prompt_length: the largest number of tokens in a prompt.
        max_tokens: the largest number of tokens after the prompt.
    """

    def __init__(
        self,
        prototype: Environment,
        *,
        tokenizer: PreTrainedTokenizerBase,
        end_ids: Collection[int],
        template: TurnTemplate,
        max_prompt_length: int,
        max_tokens: int,
    ) -> None:
        prototype.prepare(tokenizer)
        self.prototype = prototype
        self.tokenizer = tokenizer
        self.end_ids = end_ids
        self.template = template
        self.max_prompt_length = max_prompt_length
        self.max_tokens = max_tokens
        self._episodes: list[Episode] = []
        self._calls = Calls(prototype.step_time_limit)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        with self._calls:
            for episode in self._episodes:
                self._calls.submit(episode, episode.environment.close)
            # after an error, a call that is still running may never end
            while kind is None and self._calls.running:
                for episode, future in self._calls.ended(wait=True):
                    _result(future, episode, "close")

    def run(
        self,
        engine: Engine | SyncedEngine,
        prompts: Sequence[Prompt],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
        on_group: OnGroup | None = None,
    ) -> list[list[Episode]]:
        """Run G episodes of each of B prompts.

        Args:
            engine: samples the turns.
            prompts: B rows, whose prompts are messages.
            seeds: for each row the seeds of its G samples.
            sampling: options of sampling.
            on_group: called in this thread with each group as soon as its last episode has ended.

        Raises:
            UserError: a prompt is plain text, or too long with the messages of `Environment.reset`.
            RunError: the environment raised an exception, exceeded its step_time_limit, or returned something that is
                not allowed.
        """
        require_messages(prompts)
        groups: list[list[Episode]] = []
        for index, (prompt, group) in enumerate(zip(prompts, seeds, strict=True)):
            groups.append([self._episode(prompt, index, seed) for seed in group])
        episodes = self._episodes
        running = [len(group) for group in groups]
        with engine.turns(sampling) as turns:
            for episode in episodes:
                self._calls.submit(episode, episode.environment.reset, episode.row)
            while turns.running or self._calls.running:
                if turns.running:
                    for key, turn in turns.step(POLL):
                        text = self._take(episodes[key], turn)
                        self._calls.submit(episodes[key], episodes[key].environment.step, text)
                for episode, future in self._calls.ended(wait=not turns.running):
                    if episode.turns == 0:
                        self._begin(episode, _result(future, episode, "reset"), groups[episode.index])
                    else:
                        self._answer(episode, _result(future, episode, "step"))
                    if episode.end_reason is None:
                        turns.submit(self._next_turn(episode))
                        continue
                    turns.end(episode.key)
                    running[episode.index] -= 1
                    if on_group is not None and not running[episode.index]:
                        on_group(episode.index, [*groups[episode.index]])
        return groups

    def _episode(self, prompt: Prompt, index: int, seed: int) -> Episode:
        """An episode in a copy of the environment."""
        environment = copy.deepcopy(self.prototype)
        environment.seed = turn_seed(seed, -1)
        episode = Episode(key=len(self._episodes), environment=environment, prompt=prompt, index=index, seed=seed)
        self._episodes.append(episode)
        return episode

    def _begin(self, episode: Episode, answer: Any, group: Sequence[Episode]) -> None:
        """Append ``answer``, which `Environment.reset` returned, to the prompt."""
        appended = answer if isinstance(answer, str) else _messages(answer, episode, "reset") if answer else []
        begun = next((other for other in group if other.turns), None)
        if begun is not None:
            if begun.appended != appended:
                raise RunError(
                    f"{episode.where('reset')} returned {appended!r}, but {begun.appended!r} for another sample of the "
                    "row; return the same for all, since their rewards are compared"
                )
            episode.prompt = begun.prompt
        elif appended:
            episode.prompt = self._longer_prompt(episode, appended)
        episode.appended = appended

    def _longer_prompt(self, episode: Episode, appended: str | list[Message]) -> Prompt:
        """The prompt of an episode, followed by what `Environment.reset` returned."""
        prompt = episode.prompt
        messages = cast(list[Message], prompt.messages)
        tools = [*self.prototype.tool_schemas, *(as_tools(prompt.place, prompt.columns.get("tools")) or [])]
        ids = self.template.start(prompt.place, messages, appended, tools=tools or None, args=episode.template_args)
        if len(ids) > self.max_prompt_length:
            raise UserError(
                f"{episode.where('reset')} made the prompt {len(ids)} tokens long, above max_prompt_length = "
                f"{self.max_prompt_length}; raise max_prompt_length"
            )
        return replace(prompt, ids=ids, messages=followed_by(messages, appended))

    def _next_turn(self, episode: Episode) -> Turn:
        left = self.max_tokens - len(episode.token_ids)
        turn = Turn(
            key=episode.key,
            token_ids=[*episode.prompt.ids, *episode.token_ids],
            seed=turn_seed(episode.seed, episode.turns),
            max_tokens=min(left, episode.environment.max_turn_tokens or left),
        )
        episode.turns += 1
        return turn

    def _take(self, episode: Episode, turn: Completion) -> str:
        """Append a turn that the engine sampled, and return its text."""
        episode.extend(turn.token_ids, turn.logprobs, turn.versions, sampled=True)
        episode.finish_reason = turn.finish_reason
        text = decode_completions(self.tokenizer, [turn.token_ids], self.end_ids)[0]
        episode.messages.append({"role": "assistant", "content": text})
        return text

    def _answer(self, episode: Episode, step: Any) -> None:
        """Append what `Environment.step` returned, or end the episode."""
        if not isinstance(step, Step):
            raise RunError(f"{episode.where('step')} returned {step!r}; return a Step")
        episode.log(step)
        if step.done:
            episode.end_reason = "done"
            return
        if episode.turns >= episode.environment.max_turns:
            episode.end_reason = "turn_limit"
            return
        observation = _messages(step.observation, episode, "step")
        last_token = episode.token_ids[-1]
        ids = self.template.after(observation, last_token=last_token, args=episode.template_args)
        # the policy needs room for a token, as a completion ends with one that it sampled
        if len(episode.token_ids) + len(ids) >= self.max_tokens:
            episode.end_reason, episode.finish_reason = "token_limit", "length"
            return
        episode.extend(ids, [0.0] * len(ids), [0] * len(ids), sampled=False)
        episode.messages += observation


def require_messages(prompts: Iterable[Prompt]) -> None:
    """Raise `UserError` if a prompt is plain text, which a conversation cannot continue."""
    for prompt in prompts:
        if isinstance(prompt.messages, str):
            raise UserError(
                f"{prompt.place}: the prompt is plain text, but model.environment continues it as a conversation; set "
                "data.chat to true, which makes it a user message"
            )


def _messages(answer: Any, episode: Episode, method: str) -> list[Message]:
    """The messages in what a method of the environment returned, as plain data that a checkpoint can store."""
    where = episode.where(method)
    if answer is None:
        raise RunError(f"{where} returned neither an observation nor done=True, so the policy has nothing to answer")
    if isinstance(answer, str):
        answer = {"role": "user", "content": answer}
    messages = list(answer) if isinstance(answer, list | tuple) else [answer]
    for message in messages:
        is_message = isinstance(message, Mapping) and {"role", "content"} <= message.keys()
        if not is_message or not isinstance(message["role"], str) or not isinstance(message["content"], str):
            raise RunError(
                f"{where} returned the message {message!r}; return an object with the texts role and content"
            )
    return json.loads(json.dumps(messages, default=str))


def _result(future: Future, episode: Episode, method: str) -> Any:
    """The result of a call of an environment's method."""
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, TimeLimitError):
        raise RunError(
            f"{episode.where(method)} took more than {episode.environment.step_time_limit:g} seconds; set timeouts for "
            "what it waits for, or raise the environment's step_time_limit (null disables it)"
        )
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != calls.__file__]
    stack = "".join(traceback.format_list(frames))
    raise RunError(f"{episode.where(method)} raised {type(error).__name__}: {error}\n{stack.rstrip()}") from error
