"""Episodes against a scripted engine: token-exact histories, limits, concurrency, errors."""

import asyncio
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest

from lightning_grpo.data import Prompt
from lightning_grpo.data.template import ChatTemplate
from lightning_grpo.environments import Environment, Step
from lightning_grpo.environments.episodes import Episodes, metrics, require_messages
from lightning_grpo.environments.template import TurnTemplate
from lightning_grpo.errors import RunError, UserError
from lightning_grpo.rollout import Completion, Engine, Rollout, Sampling, Turns
from lightning_grpo.rollout.seeds import turn_seed

EOS = 1


class Script(Turns):
    """Each turn is the letters that ``write`` returns. The turn that was submitted last ends first."""

    def __init__(self, write, end=(EOS,)):
        self.write, self.end_tokens, self.waiting, self.submitted, self.ended = write, list(end), [], [], []

    @property
    def running(self):
        return len(self.waiting)

    def submit(self, turn):
        assert turn.key not in [other.key for other in self.waiting]
        self.waiting.append(turn)
        self.submitted.append(turn)

    def step(self, timeout=0.05):
        turn = self.waiting.pop()
        ids = [*self.write(turn), *self.end_tokens][: turn.max_tokens]
        reason = "stop" if ids[-1] == EOS else "length"
        logprobs = [-1.0 - i for i in range(len(ids))]
        return [(turn.key, Completion(token_ids=ids, logprobs=logprobs, finish_reason=reason, versions=[3] * len(ids)))]

    def end(self, key):
        self.ended.append(key)


class ScriptedEngine(Engine):
    def __init__(self, turns):
        self.script = turns

    @contextmanager
    def turns(self, sampling):
        yield self.script

    def generate(self, request, on_group=None): ...

    def update_weights(self, weights, version, *, in_flight=False): ...

    def logprobs(self, sequences): ...


@dataclass(kw_only=True, eq=False)
class Echo(Environment):
    """Repeats what the policy wrote, and gives a reward for its length, until it has done so ``length`` times."""

    length: int = 3
    heard: list = field(default_factory=list, init=False)
    closed: list = field(default_factory=list, init=False)

    def __deepcopy__(self, memo):
        return replace_state(self)

    def step(self, completion):
        self.heard.append(completion)
        return Step(
            observation=f"you wrote {completion}",
            reward=float(len(completion)),
            done=len(self.heard) == self.length,
            metrics={"echo/letters": len(completion), "echo/long": [len(completion) > 1]},
            extras={"last": completion},
        )

    def close(self):
        self.closed.append(self)  # shared by all copies


def replace_state(prototype):
    """A copy that shares ``closed`` with its prototype."""
    copied = replace(prototype)
    copied.closed = prototype.closed
    return copied


def row(tokenizer, index=0, text="hi", **columns):
    messages = [{"role": "user", "content": text}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)["input_ids"]
    return Prompt(index=index, place=f"test.jsonl, line {index + 1}", ids=ids, messages=messages, columns=columns)


def letters(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def run(tokenizer, environment, script, *, rows=1, samples=1, max_tokens=200, on_group=None, **columns):
    prompts = [row(tokenizer, i, **columns) for i in range(rows)]
    seeds = [[100 * i + g for g in range(samples)] for i in range(rows)]
    with Episodes(
        environment,
        tokenizer=tokenizer,
        end_ids=[EOS],
        template=TurnTemplate(tokenizer, ChatTemplate(tokenizer)),
        max_prompt_length=40,
        max_tokens=max_tokens,
    ) as episodes:
        return episodes.run(ScriptedEngine(script), prompts, seeds, Sampling(), on_group)


def test_a_history_is_what_was_sampled_with_the_rendered_observations_in_between(tokenizer):
    script = Script(lambda turn: letters(tokenizer, "ab" if turn.seed == 0 else "xyz"))
    [[episode]] = run(tokenizer, Echo(length=2), script)
    first, second = script.submitted
    between = letters(tokenizer, "<user>you wrote ab<assistant>")
    assert first.token_ids == row(tokenizer).ids
    assert second.token_ids == [*first.token_ids, *letters(tokenizer, "ab"), EOS, *between]
    assert episode.token_ids == [*second.token_ids[len(first.token_ids) :], *letters(tokenizer, "xyz"), EOS]
    assert episode.mask == [True] * 3 + [False] * len(between) + [True] * 4
    assert episode.logprobs == [-1, -2, -3] + [0] * len(between) + [-1, -2, -3, -4]
    assert episode.versions == [3] * 3 + [0] * len(between) + [3] * 4
    assert episode.turn_rewards == [(2, 2.0), (len(episode.token_ids) - 1, 3.0)]
    assert episode.messages == [
        {"role": "assistant", "content": "ab"},
        {"role": "user", "content": "you wrote ab"},
        {"role": "assistant", "content": "xyz"},
    ]
    assert episode.extras == {"last": "xyz"}
    assert script.ended == [0]


def test_turns_and_environments_have_seeds_that_follow_from_the_samples(tokenizer):
    script = Script(lambda turn: letters(tokenizer, "a"))
    groups = run(tokenizer, Echo(length=3), script, rows=2, samples=2)
    seeds = {key: [turn.seed for turn in script.submitted if turn.key == key] for key in range(4)}
    assert [seeds[key][0] for key in range(4)] == [0, 1, 100, 101]
    assert seeds[3] == [turn_seed(101, turn) for turn in range(3)]
    environments = [episode.environment.seed for group in groups for episode in group]
    assert environments == [turn_seed(seed, -1) for seed in (0, 1, 100, 101)]
    assert len({*environments, *(seed for of_key in seeds.values() for seed in of_key)}) == 16


@pytest.mark.parametrize(
    ("options", "max_tokens", "reason", "truncated", "turns"),
    [
        ({"length": 2}, 200, "done", False, 2),
        ({"length": 9, "max_turns": 3}, 200, "turn_limit", False, 3),
        ({"length": 9}, 30, "token_limit", True, 2),
        ({"length": 9}, 2, "token_limit", True, 1),
        ({"length": 2, "max_turn_tokens": 1}, 200, "done", True, 2),
    ],
    ids=["done", "turns", "tokens", "tokens of the first turn", "tokens of the last turn"],
)
def test_an_episode_ends(tokenizer, options, max_tokens, reason, truncated, turns):
    script = Script(lambda turn: letters(tokenizer, "abc"))
    [[episode]] = run(tokenizer, Echo(**options), script, max_tokens=max_tokens)
    assert episode.end_reason == reason
    assert episode.turns == turns == len(episode.turn_rewards)
    assert len(episode.token_ids) <= max_tokens
    assert episode.mask[-1]
    rollout = Rollout.collate([row(tokenizer).ids], [[episode]], pad_id=0)
    assert rollout.truncated.tolist() == [truncated]
    assert rollout.rewards_of_turns() == [[reward for _, reward in episode.turn_rewards]]
    assert rollout.conversations == [episode.messages]


def test_a_turn_that_was_cut_off_is_ended_before_the_observation(tokenizer):
    script = Script(lambda turn: letters(tokenizer, "abc"))
    [[episode]] = run(tokenizer, Echo(length=2, max_turn_tokens=2), script)
    assert tokenizer.decode(episode.token_ids) == "ab<eos><user>you wrote ab<assistant>ab"
    assert episode.mask[:3] == [True, True, False]


def test_metrics_are_sums_over_turns_and_means_over_values(tokenizer):
    script = Script(lambda turn: letters(tokenizer, "a" * (1 + turn.seed % 2)))
    groups = run(tokenizer, Echo(length=1), script, samples=2)
    assert metrics(groups[0]) == {
        "environment/turns": [1, 1],
        "environment/reward": [1, 2],
        "environment/done": [1, 1],
        "environment/turn_limit": [0, 0],
        "environment/token_limit": [0, 0],
        "echo/letters": [1, 2],
        "echo/long": [False, True],
    }


# ── reset ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(kw_only=True, eq=False)
class Task(Environment):
    """Appends a message to the prompt."""

    answers: tuple = ("b", "b")
    length: int = 1

    def reset(self, row):
        assert row["prompt"] == [{"role": "user", "content": "hi"}]
        row["prompt"].clear()  # a copy
        return [{"role": "user", "content": self.answers[self.seed % 2] * self.length}]

    def step(self, completion):
        return Step(done=True)


def test_messages_of_reset_are_appended_to_the_prompt(tokenizer):
    script = Script(lambda turn: letters(tokenizer, "a"))
    [group] = run(tokenizer, Task(), script, samples=4)
    expected = [{"role": "user", "content": "hi"}, {"role": "user", "content": "b"}]
    for episode in group:
        assert episode.prompt.messages == expected
        assert tokenizer.decode(episode.prompt.ids) == "<user>hi<user>b<assistant>"
    assert all(turn.token_ids == group[0].prompt.ids for turn in script.submitted)


def test_samples_of_a_row_must_have_the_same_prompt(tokenizer):
    with pytest.raises(RunError, match=r"line 1: Task.reset returned .*'c'.*, but .*'b'.* for another sample"):
        run(tokenizer, Task(answers=("b", "c")), Script(lambda turn: letters(tokenizer, "a")), samples=8)


def test_a_prompt_that_becomes_too_long_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"Task.reset made the prompt 45 tokens long, above max_prompt_length = 40"):
        run(tokenizer, Task(length=40), Script(lambda turn: [9]))


def test_a_plain_prompt_is_refused(tokenizer):
    with pytest.raises(UserError, match=r"line 1: the prompt is plain text.* set data.chat to true"):
        require_messages([replace(row(tokenizer), messages="hi")])


# ── Concurrency ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(kw_only=True, eq=False)
class Slow(Environment):
    """The first step of sample 0 waits until another sample has ended its episode."""

    other_ended: threading.Event = field(default_factory=threading.Event)
    waited: list = field(default_factory=list)

    def __deepcopy__(self, memo):
        return replace(self)

    def reset(self, row):
        self.is_slow, self.steps = self.seed == turn_seed(0, -1), 0

    def step(self, completion):
        self.steps += 1
        if self.is_slow:
            self.waited.append(self.other_ended.wait(20))
        elif self.steps == 3:
            self.other_ended.set()
        return Step(observation="go on", done=self.steps == (1 if self.is_slow else 3))


class SlowAsync(Slow):
    async def step(self, completion):
        self.steps += 1
        if self.is_slow:
            for _ in range(2000):
                if self.other_ended.is_set():
                    break
                await asyncio.sleep(0.01)
            self.waited.append(self.other_ended.is_set())
        elif self.steps == 3:
            self.other_ended.set()
        return Step(observation="go on", done=self.steps == (1 if self.is_slow else 3))


@pytest.mark.parametrize("kind", [Slow, SlowAsync])
def test_a_slow_step_delays_no_other_sample(tokenizer, kind):
    environment = kind()
    [group] = run(tokenizer, environment, Script(lambda turn: letters(tokenizer, "a")), samples=2)
    assert environment.waited == [True]
    assert [episode.turns for episode in group] == [1, 3]


def test_groups_are_reported_as_soon_as_they_end(tokenizer):
    reported = []
    script = Script(lambda turn: letters(tokenizer, "a"))
    groups = run(
        tokenizer,
        Echo(length=2),
        script,
        rows=3,
        samples=2,
        on_group=lambda index, group: reported.append((index, group, len(script.ended))),
    )
    assert {index for index, _, _ in reported} == {0, 1, 2}
    assert all(group == groups[index] for index, group, _ in reported)
    assert [count for _, _, count in reported][-1] == 6


# ── Errors ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(kw_only=True, eq=False)
class Broken(Echo):
    answer: object = None

    def step(self, completion):
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


class BrokenAsync(Broken):
    async def step(self, completion):
        return super().step(completion)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            KeyError("city"),
            r"line 1: \w+.step raised KeyError: 'city'\n(.|\n)*test_environments.py\", line \d+, in step",
        ),
        (SystemExit(3), r"step raised (SystemExit: 3|RuntimeError: sys.exit\(3\) was called)"),
        ("done", "step returned 'done'; return a Step"),
        (Step(), "returned neither an observation nor done=True"),
        (Step(observation={"role": "user"}), r"returned the message \{'role': 'user'\}; return an object"),
        (Step(observation="a", reward=float("nan")), "returned the reward nan; return a finite number"),
    ],
    ids=["an exception", "an exit", "no step", "no observation", "no content", "no number"],
)
@pytest.mark.parametrize("kind", [Broken, BrokenAsync])
def test_an_error_names_the_environment_and_the_row(tokenizer, kind, answer, message):
    environment = kind(answer=answer)
    with pytest.raises(RunError, match=message):
        run(tokenizer, environment, Script(lambda turn: letters(tokenizer, "a")), samples=2)


class Hung(Broken):
    """Waits until the test ends."""

    method = "step"
    released = threading.Event()

    def reset(self, row):
        if self.method == "reset":
            self.released.wait()

    def step(self, completion):
        if self.method == "step":
            self.released.wait()
        return Step(done=True)

    def close(self):
        if self.method == "close":
            self.released.wait()


class HungAsync(Broken):
    async def step(self, completion):
        await asyncio.Event().wait()


@pytest.mark.parametrize(
    ("kind", "method"),
    [(Hung, "reset"), (Hung, "step"), (Hung, "close"), (HungAsync, "step")],
)
def test_a_call_that_does_not_end_stops_the_run(tokenizer, monkeypatch, kind, method):
    monkeypatch.setattr(Hung, "method", method)
    monkeypatch.setattr(Hung, "released", threading.Event())
    message = rf"line 1: {kind.__name__}.{method} took more than 0.05 seconds; .* step_time_limit \(null"
    try:
        with pytest.raises(RunError, match=message):
            run(tokenizer, kind(step_time_limit=0.05), Script(lambda turn: letters(tokenizer, "a")), samples=2)
    finally:
        Hung.released.set()


def test_every_environment_is_closed_once(tokenizer):
    environment = Echo(length=1)
    groups = run(tokenizer, environment, Script(lambda turn: letters(tokenizer, "a")), rows=2, samples=2)
    assert set(environment.closed) == {episode.environment for group in groups for episode in group}
    assert len(environment.closed) == 4


def test_options_have_ranges():
    with pytest.raises(UserError, match=r"Echo.max_turns is 0; set 1 or more"):
        Echo(max_turns=0)
