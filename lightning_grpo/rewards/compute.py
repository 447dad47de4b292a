"""From reward functions to a tensor, with every answer of theirs checked."""

import asyncio
import copy
import inspect
import math
import numbers
import traceback
from collections.abc import Awaitable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

# classes that configuration files name are found among those that are imported
import lightning_grpo.rewards.answers
import lightning_grpo.rewards.code
import lightning_grpo.rewards.format
import lightning_grpo.rewards.reasoning_gym  # noqa: F401
from lightning_grpo.errors import RunError, UserError
from lightning_grpo.rewards.base import FunctionReward, Reward, Scores, call_with
from lightning_grpo.rewards.time_limit import in_hand, overdue, within


def compute_rewards(
    rewards: Sequence[Reward],
    prompts: Sequence[str | list[dict[str, Any]]],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
    columns: Sequence[Mapping[str, Any]],
    trainer_state: Any = None,
    openings: Sequence[str] | None = None,
) -> Tensor:
    """Judge N completions with R rewards: [N, R] float32, NaN where a reward does not apply (it answered None).

    Plain rewards run one after another in the calling thread; those that are ``async`` run together after them.

    Args:
        rewards: R of them.
        prompts: N prompts, as text or messages.
        completions: N decoded completions; made conversational for prompts that are messages.
        completion_ids: N lists of token ids, without padding.
        columns: N rows of further columns; a column missing in a row is None there.
        trainer_state: passed on to rewards that ask for it.
        openings: N tags that the prompts end in and the completions therefore lack, such as ``<think>``; None: none.

    Raises:
        UserError: a reward gave the wrong count of values, or one that is no finite number.
        RunError: a reward called ``sys.exit``. Whatever else it raises goes through, with the reward's name noted, and
            the completion it was at.
        TimeoutError: a call took longer than the reward's `time_limit`.
    """
    N = len(completions)
    for name, values in (("prompts", prompts), ("completion_ids", completion_ids), ("columns", columns)):
        if len(values) != N:
            raise UserError(f"{len(values)} {name} for {N} completions")
    arguments: dict[str, Any] = {"openings": [""] * N if openings is None else list(openings)}
    arguments |= {name: [row.get(name) for row in columns] for name in dict.fromkeys(k for row in columns for k in row)}
    arguments |= {
        "prompts": list(prompts),
        "completions": [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, completions, strict=True)
        ],
        "completion_ids": [list(ids) for ids in completion_ids],
        "trainer_state": trainer_state,
    }
    scores = _call_all(rewards, arguments)
    table = [_checked(reward, answer, completions) for reward, answer in zip(rewards, scores, strict=True)]
    return torch.tensor(table, dtype=torch.float32).reshape(len(rewards), N).T.contiguous()


@contextmanager
def _named(reward: Reward, arguments: Mapping[str, Any]) -> Iterator[None]:
    try:
        yield
    except SystemExit as error:
        raise RunError(
            f"the reward {reward.name!r} called sys.exit({error.code!r}), which would end the run; raise an exception, "
            "or return None for completions it can't judge"
        ) from error
    except Exception as error:
        at = in_hand(list(traceback.walk_tb(error.__traceback__)), arguments)
        error.add_note(f"raised by the reward {reward.name!r}" + (f" at {at}" if at else ""))
        raise


def _call(reward: Reward, arguments: Mapping[str, Any]) -> Any:
    with _named(reward, arguments):
        if isinstance(reward, FunctionReward):
            return call_with(reward.function, arguments)
        # a column of this name collides with the method's own first argument
        return call_with(reward, {name: values for name, values in arguments.items() if name != "self"})


def _own(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A copy for one reward: what it changes in its arguments, no other reward sees."""
    state = arguments["trainer_state"]
    return copy.deepcopy({**arguments, "trainer_state": None}) | {"trainer_state": state}


def _call_all(rewards: Sequence[Reward], arguments: dict[str, Any]) -> list[Any]:
    answers: list[Any] = []
    try:
        for reward in rewards:
            given = _own(arguments)
            call = partial(_call, reward, given)
            answers.append(within(reward.time_limit, repr(reward.name), given, call))
    except Exception:
        for answer in filter(inspect.iscoroutine, answers):
            answer.close()
        raise
    waiting = [i for i, answer in enumerate(answers) if inspect.isawaitable(answer)]
    if waiting:
        # a notebook's thread has a running loop, where asyncio.run is refused: a thread of its own works everywhere
        names = " or ".join(repr(rewards[i].name) for i in waiting)
        limits = [rewards[i].time_limit for i in waiting]
        together = _gather([rewards[i] for i in waiting], [answers[i] for i in waiting], arguments)
        limit = None if None in limits else max(limits)
        judged = within(limit, names, arguments, partial(asyncio.run, together), loop=True)
        for i, scores in zip(waiting, judged, strict=True):
            answers[i] = scores
    return answers


async def _gather(
    rewards: Sequence[Reward], answers: Sequence[Awaitable[Scores]], arguments: Mapping[str, Any]
) -> list[Scores]:
    async def one(reward: Reward, answer: Awaitable[Scores]) -> Scores:
        try:
            async with asyncio.timeout(reward.time_limit) as limit:
                with _named(reward, arguments):
                    return await answer
        except TimeoutError as error:
            if not limit.expired():
                raise
            stack = list(traceback.walk_tb(error.__context__.__traceback__))
            raise overdue(reward.time_limit, repr(reward.name), arguments, stack) from None

    return await asyncio.gather(*(one(*pair) for pair in zip(rewards, answers, strict=True)))


def _checked(reward: Reward, answer: Any, completions: Sequence[str]) -> list[float]:
    if hasattr(answer, "tolist"):
        answer = answer.tolist()
    elif isinstance(answer, Iterable) and not isinstance(answer, str | bytes | Mapping | Set):
        answer = list(answer)
    if not isinstance(answer, list | tuple):
        raise UserError(f"the reward {reward.name!r} returned {answer!r}; return a list with one number a completion")
    if len(answer) != len(completions):
        raise UserError(
            f"the reward {reward.name!r} returned {len(answer)} values for {len(completions)} completions; "
            "return one for each, None where it does not apply"
        )
    values = []
    for row, value in enumerate(answer):
        if value is None:
            values.append(math.nan)
            continue
        single = isinstance(value, np.generic) or (isinstance(value, Tensor | np.ndarray) and len(value.flatten()) == 1)
        number = value.item() if single else value
        # beyond float32 a finite number would become infinite
        if not isinstance(number, numbers.Real) or not abs(number) <= torch.finfo(torch.float32).max:
            raise UserError(
                f"the reward {reward.name!r} returned {value!r} ({type(value).__name__}) for row {row}, the completion "
                f"{completions[row][:80]!r}; return a finite number, or None where it does not apply"
            )
        values.append(float(number))
    return values
