"""Calls reward functions, checks the values they return, and collects them in a tensor."""

import asyncio
import copy
import inspect
import math
import numbers
import threading
import traceback
from collections.abc import Awaitable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

# imported so that configuration files can name their classes
import lightning_grpo.rewards.answers
import lightning_grpo.rewards.choice
import lightning_grpo.rewards.code
import lightning_grpo.rewards.constraints
import lightning_grpo.rewards.cosine
import lightning_grpo.rewards.format
import lightning_grpo.rewards.fuzzy
import lightning_grpo.rewards.judge
import lightning_grpo.rewards.mathematics
import lightning_grpo.rewards.reasoning_gym
import lightning_grpo.rewards.reward_model
import lightning_grpo.rewards.schema  # noqa: F401
from lightning_grpo.errors import RunError, UserError
from lightning_grpo.rewards.base import LOGS, Completion, Reward, Scores
from lightning_grpo.rewards.function import call_reward
from lightning_grpo.rewards.logs import RewardLogs
from lightning_grpo.rewards.time_limit import completion_in_frame, time_limit, timeout_error


def compute_rewards(
    rewards: Sequence[Reward],
    prompts: Sequence[str | list[dict[str, Any]]],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    columns: Sequence[Mapping[str, Any]],
    trainer_state: Any = None,
    openings: Sequence[str] | None = None,
    applicable: Sequence[Collection[str] | None] | None = None,
    logs: RewardLogs | None = None,
    conversations: Sequence[list[dict[str, Any]]] | None = None,
    offered: Mapping[str, Sequence[Any]] | None = None,
) -> Tensor:
    """Score N completions with R rewards: [N, R] float32, NaN if a reward does not apply (it returned None).

    Plain rewards run one after another in the calling thread; ``async`` rewards then run concurrently.

    Args:
        rewards: R rewards.
        prompts: N prompts, as text or messages.
        completions: N decoded completions; passed as messages if the prompt is messages.
        completion_ids: N lists of token ids, without padding.
        columns: N rows of further columns. A column that a row lacks is None in this row.
        trainer_state: passed on to rewards that ask for it.
        openings: N tags, such as ``<think>``, that the prompts end with and the completions therefore lack; None if
            there are none.
        applicable: for each completion the names of the rewards that apply, or None if all do. None: all apply to all.
        logs: collects what the rewards log.
        conversations: the messages of each completion over several turns, passed in place of its text, which is that of
            its last message.
        offered: further arguments with N values each, passed to rewards whose signature names them.

    Raises:
        UserError: a reward returned the wrong number of values, or one that is not a finite number.
        RunError: a reward called ``sys.exit``. Other exceptions are passed on with a note that states the reward and
            the completion it was scoring.
        TimeoutError: an ``async`` reward took longer than its `time_limit`. Other rewards end the process then.
    """
    N = len(completions)
    for name, values in (("prompts", prompts), ("completion_ids", completion_ids), ("columns", columns)):
        if len(values) != N:
            raise UserError(f"{len(values)} {name} for {N} completions")
    arguments: dict[str, Any] = {"openings": [""] * N if openings is None else list(openings)}
    arguments |= {name: [row.get(name) for row in columns] for name in dict.fromkeys(k for row in columns for k in row)}
    arguments |= offered or {}
    arguments |= {
        "prompts": list(prompts),
        "completions": list(conversations or map(_as_completion, prompts, completions)),
        "completion_ids": [list(ids) for ids in completion_ids],
        "trainer_state": trainer_state,
    }
    rows = [_rows(reward, applicable or [None] * N) for reward in rewards]
    called = [i for i, chosen in enumerate(rows) if chosen]
    logs = logs or RewardLogs(N)
    given = [_select(arguments, rows[i], N) | logs.arguments(rows[i]) for i in called]
    table = torch.full((N, len(rewards)), torch.nan, dtype=torch.float32)
    for i, scores in zip(called, _call_all([rewards[i] for i in called], given), strict=True):
        texts = [completions[row] for row in rows[i]]
        table[rows[i], i] = torch.tensor(_checked(rewards[i], scores, texts), dtype=torch.float32)
    return table


def _as_completion(prompt: str | list[dict[str, Any]], text: str) -> Completion:
    """The text as a message if the prompt is messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _rows(reward: Reward, applicable: Sequence[Collection[str] | None]) -> list[int]:
    """The completions that a reward applies to."""
    return [row for row, names in enumerate(applicable) if names is None or reward.name in names]


def _select(arguments: Mapping[str, Any], rows: Sequence[int], N: int) -> Mapping[str, Any]:
    """The arguments of a reward for some of N completions."""
    if len(rows) == N:
        return arguments
    state = {"trainer_state": arguments["trainer_state"]}
    return {name: [values[row] for row in rows] for name, values in arguments.items() if name not in state} | state


@contextmanager
def _named_in_errors(reward: Reward, arguments: Mapping[str, Any]) -> Iterator[None]:
    try:
        yield
    except SystemExit as error:
        raise RunError(
            f"the reward {reward.name!r} called sys.exit({error.code!r}), which would end the run; raise an exception, "
            "or return None for completions that it can't score"
        ) from error
    except Exception as error:
        at = completion_in_frame(list(traceback.walk_tb(error.__traceback__)), arguments)
        error.add_note(f"raised by the reward {reward.name!r}" + (f" while scoring {at}" if at else ""))
        raise


def _call(reward: Reward, arguments: Mapping[str, Any]) -> Any:
    with _named_in_errors(reward, arguments):
        return call_reward(reward, arguments)


def _copied(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A copy for one reward, whose changes to its arguments must not affect other rewards."""
    shared = {name: arguments[name] for name in ("trainer_state", "environments", *LOGS) if name in arguments}
    return copy.deepcopy({name: values for name, values in arguments.items() if name not in shared}) | shared


def _call_all(rewards: Sequence[Reward], arguments: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Call each reward with its arguments."""
    answers: list[Any] = []
    try:
        for reward, given in zip(rewards, map(_copied, arguments), strict=True):
            limit = None if reward.in_workers else reward.time_limit
            with time_limit(limit, repr(reward.name), given):
                answers.append(_call(reward, given))
    except Exception:
        for answer in filter(inspect.iscoroutine, answers):
            answer.close()
        raise
    waiting = [i for i, answer in enumerate(answers) if inspect.isawaitable(answer)]
    if waiting:
        awaited = _run_loop([(rewards[i], answers[i], arguments[i]) for i in waiting])
        for i, scores in zip(waiting, awaited, strict=True):
            answers[i] = scores
    return answers


def _run_loop(calls: Sequence[tuple[Reward, Awaitable[Scores], Mapping[str, Any]]]) -> list[Scores]:
    """Await all calls in a new thread, since a notebook's main thread already runs an event loop."""
    limits = [reward.time_limit for reward, *_ in calls]
    names = " or ".join(repr(reward.name) for reward, *_ in calls)
    result: Future[list[Scores]] = Future()

    def run() -> None:
        try:
            # each call has its own limit; this one is for a call that blocks the loop
            with time_limit(None if None in limits else max(limits), names, calls[0][2], slack=1.0):
                result.set_result(asyncio.run(_gather(calls)))
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, name="async-rewards", daemon=True).start()
    return result.result()


async def _gather(calls: Sequence[tuple[Reward, Awaitable[Scores], Mapping[str, Any]]]) -> list[Scores]:
    async def one(reward: Reward, answer: Awaitable[Scores], arguments: Mapping[str, Any]) -> Scores:
        try:
            async with asyncio.timeout(reward.time_limit) as limit:
                with _named_in_errors(reward, arguments):
                    return await answer
        except TimeoutError as error:
            if not limit.expired():
                raise
            stack = list(traceback.walk_tb(error.__context__.__traceback__))
            raise timeout_error(reward.time_limit, repr(reward.name), arguments, stack) from None

    return await asyncio.gather(*(one(*call) for call in calls))


def _checked(reward: Reward, answer: Any, completions: Sequence[str]) -> list[float]:
    if hasattr(answer, "tolist"):
        answer = answer.tolist()
    elif isinstance(answer, Iterable) and not isinstance(answer, str | bytes | Mapping | Set):
        answer = list(answer)
    if not isinstance(answer, list | tuple):
        raise UserError(f"the reward {reward.name!r} returned {answer!r}; return a list with one number per completion")
    if len(answer) != len(completions):
        raise UserError(
            f"the reward {reward.name!r} returned {len(answer)} values for {len(completions)} completions; "
            "return one number per completion, or None if the reward does not apply"
        )
    values = []
    for row, value in enumerate(answer):
        if value is None:
            values.append(math.nan)
            continue
        single = isinstance(value, np.generic) or (isinstance(value, Tensor | np.ndarray) and len(value.flatten()) == 1)
        number = value.item() if single else value
        # finite numbers beyond float32's range would become infinite
        if not isinstance(number, numbers.Real) or not abs(number) <= torch.finfo(torch.float32).max:
            raise UserError(
                f"the reward {reward.name!r} returned {value!r} ({type(value).__name__}) for row {row}, the completion "
                f"{completions[row][:80]!r}; return a finite number, or None if the reward does not apply"
            )
        values.append(float(number))
    return values
