"""Reward functions in worker processes. The workers import this module, so that it imports little at its top."""

import os

import pytest

from lightning_grpo.errors import UserError
from lightning_grpo.rewards import FunctionReward


def scores(function, completions, logs=None, **options):
    from lightning_grpo.rewards import compute_rewards

    N = len(completions)
    columns = [{"answer": "4"} for _ in completions]
    reward = FunctionReward(function=function, sandbox=True, **options)
    table = compute_rewards([reward], ["2 + 2 ="] * N, completions, [[0]] * N, columns, openings=["<a>"] * N, logs=logs)
    return table[:, 0].tolist()


def matches(completions, answer, openings, log_metric, log_extra):
    (text,), (expected,) = completions, answer
    log_metric("words", len(text.split()))
    if text == "four":
        log_extra("opening", openings)
    return [text == expected]


def takes_all(prompts, completions, completion_ids, **columns):
    return [len({*columns} & {"answer", "log_metric", "log_extra"}) - 3.0 + len(completions[0])]


def applies_to_letters(completions):
    return [1.0 if text.isalpha() else None for text in completions]


def hangs(completions):
    while completions == ["loop"]:
        pass
    if completions == ["end"]:
        os._exit(0)
    return [1.0 / len(completions[0])]


def takes_the_trainer(completions, trainer_state):
    return [0.0]


async def waits(completions):
    return [0.0]


def test_a_function_in_workers_gets_one_completion_and_logs():
    from lightning_grpo.rewards.logs import RewardLogs

    logs = RewardLogs(3)
    assert scores(matches, ["4", "four", "it is 4"], logs=logs) == [1.0, 0.0, 0.0]
    assert logs.metrics == {"words": [1.0, 1.0, 3.0]}
    assert logs.extras == [{"opening": None}, {"opening": "<a>"}, {"opening": None}]
    assert scores(f"{__name__}.takes_all", ["a", "bc"]) == [1.0, 2.0]


def test_no_reward_where_the_function_returns_none():
    letters, none = scores(applies_to_letters, ["a", "1"])
    assert letters == 1.0 and none != none


def test_what_a_function_does_to_one_completion_costs_no_other(caplog):
    assert scores(hangs, ["loop", "ab", "", "end", "a"], seconds=0.5) == [0.0, 0.5, 0.0, 0.0, 1.0]
    assert {message.split(": ")[1] for message in caplog.messages} == {
        "it took more than 0.5 s",
        "ZeroDivisionError",
        "it ended its worker process",
    }


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda completions: [0.0],
            "can't be sent to worker processes: .*; define it in a module that can be imported",
        ),
        (takes_the_trainer, "'takes_the_trainer' takes trainer_state, which stays in the process of the run; change"),
        (waits, "'waits' is async, but there is nothing to wait for .* or set sandbox: false"),
    ],
    ids=["lambda", "trainer_state", "async"],
)
def test_functions_that_workers_cannot_call_are_refused(function, message):
    with pytest.raises(UserError, match=message):
        FunctionReward(function=function, sandbox=True)


def test_a_function_of_a_script_is_refused(monkeypatch):
    monkeypatch.setattr(matches, "__module__", "__main__")
    monkeypatch.setattr("__main__.matches", matches, raising=False)
    with pytest.raises(UserError, match="it is defined in the script or notebook that runs; define it in a module"):
        FunctionReward(function=matches, sandbox=True)


def test_former_class_path():
    from lightning_grpo.rewards import base

    assert base.FunctionReward is FunctionReward
