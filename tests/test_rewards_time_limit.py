"""Rewards that do not return are interrupted, with an error that states where they were."""

import asyncio
import multiprocessing
import os
import re
import signal
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
        with suppress(Exception):
            len(completion)


def regex(completion):
    re.fullmatch("(a+)+", completion)


def sleep(completion):
    time.sleep(1000)


def wait(completion):
    threading.Event().wait()


def swallow(completion):
    try:
        time.sleep(1000)
    except:  # noqa: E722
        time.sleep(1000)


def hanging(how):
    def hangs(completions):
        return [float(completion == "so 4" or how(completion)) for completion in completions]

    return hangs


def check(error, how):
    message = str(error)
    assert message.startswith(
        "the reward 'hangs' exceeded its time_limit of 0.3 s while scoring row 1, the completion 'aaaa"
    )
    assert "of the prompt 'Say a'; avoid" in message and "raise its time_limit (null disables it)" in message
    (note,) = error.__notes__
    assert note.startswith("stack of the reward:\n") and f"in {how.__name__}\n" in note


@pytest.fixture(autouse=True)
def no_threads_or_signal_handlers_remain():
    threads = set(threading.enumerate())
    yield
    assert signal.getsignal(signal.SIGVTALRM) is signal.SIG_DFL and signal.getitimer(signal.ITIMER_VIRTUAL) == (0, 0)
    # threads of rewards that block outside of Python may remain
    assert {thread.name for thread in set(threading.enumerate()) - threads} <= {"reward"}


@pytest.mark.parametrize("how", [loop, regex, sleep, wait, swallow])
def test_in_the_main_thread(how):
    with pytest.raises(TimeoutError) as raised:
        score(hanging(how))
    check(raised.value, how)


@pytest.mark.parametrize("how", [loop, sleep, wait])
def test_in_another_thread(how):
    with ThreadPoolExecutor(1) as pool, pytest.raises(TimeoutError) as raised:
        pool.submit(score, hanging(how)).result()
    check(raised.value, how)


def test_a_loop_in_another_thread_is_interrupted():
    threads = []

    def hangs(completions):
        threads.append(threading.current_thread())
        while True:
            pass

    with ThreadPoolExecutor(1) as pool, pytest.raises(TimeoutError, match="while scoring 2 completions"):
        pool.submit(score, hangs).result()
    threads[0].join(30)
    assert not threads[0].is_alive()


def test_what_cannot_be_interrupted_ends_the_process(tmp_path, monkeypatch):
    """`re` in another thread blocks all other Python threads, including this test: use a child process."""
    monkeypatch.setattr(time_limit, "GRACE", 0.2)

    def hang_in_a_thread():
        with (tmp_path / "stderr").open("w") as file:
            os.dup2(file.fileno(), 2)
        thread = threading.Thread(target=score, args=(hanging(regex),))
        thread.start()
        thread.join()

    process = multiprocessing.get_context("fork").Process(target=hang_in_a_thread)
    process.start()
    process.join(60)
    process.kill()
    assert process.exitcode == 1
    stacks = (tmp_path / "stderr").read_text()
    assert "in regex\n" in stacks and "in the reward 'hangs', limited by its time_limit to 0.3 s\n" in stacks


async def awaits(completions):
    await asyncio.sleep(1000)


async def blocks(completions):
    time.sleep(1000)


async def fine(completions):
    return [0.0, 0.0]


def test_async_rewards():
    with pytest.raises(
        TimeoutError, match=r"the reward 'awaits' exceeded its time_limit of 0\.3 s while scoring 2 compl"
    ) as raised:
        score(fine, awaits)
    assert "await asyncio.sleep(1000)" in raised.value.__notes__[0]
    with pytest.raises(
        TimeoutError, match=r"the reward 'fine' or 'blocks' exceeded its time_limit of 0\.3 s"
    ) as raised:
        score(fine, blocks)
    assert "in blocks\n" in raised.value.__notes__[0]


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
    with pytest.raises(
        TimeoutError, match=r"the reward 'hangs' exceeded its time_limit of 0\.3 s while scoring 4 compl"
    ):
        fit(tmp_path, policy, rollout=CopyRollout())
    assert policy.trainer.global_step >= 1


@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_warning_comes_first(caplog, elsewhere):
    def slow(completions):
        while not caplog.messages:
            time.sleep(0.01)
        return [1.0, 2.0]

    with ThreadPoolExecutor(1) as pool:
        table = pool.submit(score, slow, time_limit=5.0).result() if elsewhere else score(slow, time_limit=5.0)
    assert table.tolist() == [[1.0], [2.0]]
    assert caplog.messages == [
        "The reward 'slow' has been running for 0.5 s; the run will stop at its time_limit of 5 s."
    ]


def test_without_a_limit_nothing_watches():
    def looks(completions):
        handler, timer = signal.getsignal(signal.SIGVTALRM), signal.getitimer(signal.ITIMER_VIRTUAL)
        return [float(handler is signal.SIG_DFL and timer == (0, 0)), threading.active_count()]

    assert score(looks, time_limit=None).tolist() == [[1.0], [threading.active_count()]]
    assert score(looks).tolist() == [[0.0], [threading.active_count() + 1]]
    assert score(fine, time_limit=None).tolist() == [[0.0], [0.0]]


def test_rewards_may_use_alarms_of_their_own():
    class Alarm(Exception):
        pass

    def hangs(completions):
        def on_alarm(*_):
            raise Alarm

        before = signal.signal(signal.SIGALRM, on_alarm)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.01)
            time.sleep(1000)
        except Alarm:
            regex(COMPLETIONS[1])
        finally:
            signal.signal(signal.SIGALRM, before)

    with pytest.raises(TimeoutError, match="the reward 'hangs'"):
        score(hangs)


def test_an_existing_handler_stays():
    seen = []

    def own_handler(*_):
        seen.append(True)

    def raises_signal(completions):
        signal.raise_signal(signal.SIGVTALRM)
        return [0.0, 0.0]

    before = signal.signal(signal.SIGVTALRM, own_handler)
    try:
        score(raises_signal)
        assert seen and signal.getsignal(signal.SIGVTALRM) is own_handler
    finally:
        signal.signal(signal.SIGVTALRM, before)


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
