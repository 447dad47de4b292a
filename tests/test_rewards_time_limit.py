"""Rewards that do not return end the run, with an error that states where they were."""

import asyncio
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import pytest
from engines import CopyRollout
from fitting import AHEAD, fit, module

from lightning_grpo.rewards import FunctionReward, compute_rewards, time_limit

COMPLETIONS = ["so 4", "a" * 40 + "!"]


def score(*functions, time_limit=0.3):
    rewards = [FunctionReward(function=function, time_limit=time_limit) for function in functions]
    return compute_rewards(rewards, ["2 + 2 =", "Say a"], COMPLETIONS, [[0], [1]], [{}, {}])


def loop(completion):
    while True:
        len(completion)


def regex(completion):
    re.fullmatch("(a+)+", completion)


def sleep(completion):
    time.sleep(1000)


def swallow(completion):
    while True:
        with suppress(BaseException):
            time.sleep(1000)


def hanging(how):
    def hangs(completions):
        return [float(completion == "so 4" or how(completion)) for completion in completions]

    return hangs


def end_of(tmp_path, call, *arguments):
    """The exit code of a process that makes this call, and what it writes to its stderr."""

    def run():
        with (tmp_path / "stderr").open("w") as file:
            os.dup2(file.fileno(), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)  # where pytest captures nothing
        time_limit.log.parent.propagate = time_limit.log.propagate = False
        call(*arguments)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    process.kill()
    return process.exitcode, (tmp_path / "stderr").read_text()


def score_in_a_thread(*functions):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(score, *functions).result()


@pytest.fixture(autouse=True)
def no_threads_remain():
    threads = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - threads:
        thread.join(1)
        assert not thread.is_alive() or thread.name == "async-rewards"


@pytest.mark.parametrize("run", [score, score_in_a_thread])
@pytest.mark.parametrize("how", [loop, sleep, swallow])
def test_the_process_ends_and_states_the_completion_and_the_stack(tmp_path, how, run):
    code, message = end_of(tmp_path, run, hanging(how))
    assert code == 1
    assert (
        "the reward 'hangs' exceeded its time_limit of 0.3 s while scoring row 1, the completion 'aaaa" in message
        and "of the prompt 'Say a'; avoid" in message
        and "raise its time_limit (null disables it)" in message
    )
    stack = message.partition("stack of the reward:\n")[2]
    assert f"in {how.__name__}\n" in stack and "_call_all" not in stack


@pytest.mark.parametrize("run", [score, score_in_a_thread])
def test_what_blocks_all_threads_ends_the_process_too(tmp_path, monkeypatch, run):
    """`re` keeps the interpreter lock."""
    monkeypatch.setattr(time_limit, "GRACE", 0.2)
    code, message = end_of(tmp_path, run, hanging(regex))
    assert code == 1 and "in regex\n" in message and "in hangs\n" in message


async def awaits(completions):
    await asyncio.sleep(1000)


async def blocks(completions):
    time.sleep(1000)


async def fine(completions):
    return [0.0, 0.0]


def test_async_rewards(tmp_path):
    with pytest.raises(
        TimeoutError, match=r"the reward 'awaits' exceeded its time_limit of 0\.3 s while scoring 2 compl"
    ) as raised:
        score(fine, awaits)
    assert "await asyncio.sleep(1000)" in raised.value.__notes__[0]
    code, message = end_of(tmp_path, score, fine, blocks)
    assert code == 1 and "the reward 'fine' or 'blocks' exceeded its time_limit of 0.3 s" in message
    assert "in blocks\n" in message


def test_an_async_rewards_own_timeout_is_its_own():
    async def impatient(completions):
        await asyncio.wait_for(asyncio.sleep(1000), timeout=0.01)

    with pytest.raises(TimeoutError) as raised:
        score(impatient, time_limit=100)
    assert raised.value.__notes__ == ["raised by the reward 'impatient'"]


@pytest.mark.parametrize("changes", [{}, AHEAD], ids=["in turn", "ahead"])
def test_early_rewards_end_the_run(tmp_path, tiny_model_path, changes):
    def hangs(prompts, completions, trainer_state):
        if trainer_state.global_step:
            time.sleep(1000)
        return [float(len(completion)) for completion in completions]

    reward = FunctionReward(function=hangs, early=True, time_limit=0.3)
    policy = module(tiny_model_path, **changes | {"rewards": [reward]})
    code, message = end_of(tmp_path, lambda: fit(tmp_path, policy, rollout=CopyRollout()))
    assert code == 1
    assert "the reward 'hangs' exceeded its time_limit of 0.3 s while scoring 4 compl" in message


@pytest.mark.parametrize("run", [score, score_in_a_thread])
def test_a_warning_comes_first(caplog, run):
    def slow(completions):
        while not caplog.messages:
            time.sleep(0.01)
        return [1.0, 2.0]

    table = run(slow) if run is score_in_a_thread else score(slow, time_limit=5.0)
    assert table.tolist() == [[1.0], [2.0]]
    assert re.fullmatch(
        r"The reward 'slow' has been running for [\d.]+ s; the run will stop at its time_limit of [\d.]+ s\.",
        *caplog.messages,
    )


def test_without_a_limit_nothing_watches():
    def looks(completions):
        return [threading.active_count()] * 2

    assert score(looks, time_limit=None).tolist() == [[threading.active_count()]] * 2
    assert score(looks).tolist() == [[threading.active_count() + 1]] * 2
    assert score(fine, time_limit=None).tolist() == [[0.0], [0.0]]


def test_rewards_may_use_alarms_of_their_own():
    class Alarm(Exception):
        pass

    def alarms(completions):
        def on_alarm(*_):
            raise Alarm

        before = signal.signal(signal.SIGALRM, on_alarm)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            time.sleep(1000)
        except Alarm:
            return [1.0, 2.0]
        finally:
            signal.signal(signal.SIGALRM, before)

    assert score(alarms, time_limit=100).tolist() == [[1.0], [2.0]]


@pytest.mark.parametrize("seconds", [0, -1.0, float("inf"), float("nan")])
def test_limits_that_make_no_sense(seconds):
    with pytest.raises(ValueError, match=f"the time_limit of the reward 'sleep' is {seconds}; set seconds above 0"):
        FunctionReward(function=sleep, time_limit=seconds)


def test_an_error_names_the_completion():
    def breaks(completions):
        return [1 / (4 - len(text)) for text in reversed(completions)]

    with pytest.raises(ZeroDivisionError) as raised:
        score(breaks)
    assert raised.value.__notes__ == [
        "raised by the reward 'breaks' while scoring row 0, the completion 'so 4' of the prompt '2 + 2 ='"
    ]
