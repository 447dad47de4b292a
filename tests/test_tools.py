"""Tools: parsing of calls, their execution, and objects written for TRL."""

import asyncio
import copy
import json
import threading
import time
from types import SimpleNamespace

import pytest
from chat_templates import QUESTION, TEMPLATES, bpe_tokenizer
from fitting import module
from test_environments import Script, ScriptedEngine

from lightning_grpo.data.encoding import Encoder
from lightning_grpo.data.template import ChatTemplate
from lightning_grpo.environments.episodes import Episodes, metrics
from lightning_grpo.environments.template import TurnTemplate
from lightning_grpo.environments.tool_calls import ToolCall, parse_calls
from lightning_grpo.environments.tools import ToolEnvironment
from lightning_grpo.environments.trl import TRLEnvironment, get_reward
from lightning_grpo.errors import RunError, UserError
from lightning_grpo.rewards import compute_rewards
from lightning_grpo.rollout import Sampling

# ── Parsing ──────────────────────────────────────────────────────────────────────────────────────────────────────────

ADD = ToolCall("add", {"a": 1, "b": 2})


def tagged(*calls: str) -> str:
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)


JSON = '{"name": "add", "arguments": {"a": 1, "b": 2}}'


@pytest.mark.parametrize(
    ("completion", "calls"),
    [
        ("The answer is 3.", []),
        ("", []),
        (tagged(JSON), [ADD]),
        (f"I add them.\n{tagged(JSON, JSON)}\n", [ADD, ADD]),
        (f"<tool_call>{JSON}", [ADD]),
        (f"<think>\n{tagged(JSON)}\n</think>\nThree.", []),
        (f"<think>\nhm\n</think>\n\n{tagged(JSON)}", [ADD]),
        (JSON, [ADD]),
        ('{"name": "add", "parameters": {"a": 1, "b": 2}}', [ADD]),
        ('<|python_tag|>{"name": "add", "parameters": {"a": 1, "b": 2}}; ' + JSON, [ADD, ADD]),
        ('{"name": "add", "arguments": "{\\"a\\": 1, \\"b\\": 2}"}', [ADD]),
        ('{"answer": 3}', []),
        ('{"name": "Ada", "age": 36}', []),
        ("{not json", []),
        (
            tagged('{"name": "suche", "arguments": {"text": "é 🙂 </tool>"}}'),
            [ToolCall("suche", {"text": "é 🙂 </tool>"})],
        ),
    ],
    ids=range(15),
)
def test_calls_are_read_in_both_formats(completion, calls):
    assert parse_calls(completion) == calls


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "",
        "add(1, 2)",
        "[1, 2]",
        "null",
        '{"name": 3, "arguments": {}}',
        '{"name": "add"}',
        '{"name": "add", "arguments": [1, 2]}',
        '{"name": "add", "arguments": "{"}',
        "[" * 100_000,
        '{"name": "add", "arguments": {"a": ' + "1" * 10_000 + "}}",
    ],
    ids=range(11),
)
def test_a_malformed_call_states_why(text):
    [call] = parse_calls(f"<tool_call>{text}</tool_call>")
    assert call.error
    assert not call.arguments


DESCRIPTION = {
    "start_anchor": "<assistant>",
    "fields": {
        "content": {"content": "text"},
        "tool_calls": {
            "open": "[CALL]",
            "close": "[/CALL]",
            "content": "json",
            "repeats": True,
            "transform": {"type": "function", "function": "{content}"},
        },
    },
}


@pytest.mark.parametrize(
    ("completion", "calls"),
    [
        ("It is 3.", []),
        (f"I add. [CALL]{JSON}[/CALL][CALL]{JSON}[/CALL]", [ADD, ADD]),
        ('[CALL]{"name": "add"}[/CALL]', [ToolCall(error="a call must have a name and arguments")]),
    ],
    ids=range(3),
)
def test_calls_are_read_in_the_format_that_the_tokenizer_describes(completion, calls):
    assert parse_calls(completion, DESCRIPTION) == calls


def test_a_call_that_does_not_fit_the_description_states_why():
    [call] = parse_calls("[CALL]{bad[/CALL]", DESCRIPTION)
    assert "the call can't be read" in call.error


def test_many_openings_take_linear_time():
    assert len(parse_calls("<tool_call>" * 50_000)) == 1


# ── Execution ────────────────────────────────────────────────────────────────────────────────────────────────────────


def add(a: int, b: int = 0) -> int:
    """Add two integers.

    Args:
        a: the first
        b: the second
    """
    return a + b


async def describe(words: list[str], mood: str | None = None) -> dict:
    """Describe words.

    Args:
        words: some words
        mood: how (choices: ["calm", "wild"])
    """
    await asyncio.sleep(0)
    return {"words": words, "mood": mood}


def fail(kind: str) -> str:
    """Fail.

    Args:
        kind: how
    """
    if kind == "exit":
        raise SystemExit(3)
    if kind == "wait":
        time.sleep(60)
    raise {"key": KeyError, "time": TimeoutError}[kind]("no such thing")


def run(environment: ToolEnvironment, completion: str):
    return asyncio.run(environment.step(completion))


def environment(**options) -> ToolEnvironment:
    return ToolEnvironment(tools=[add, describe, fail], **options)


def call(name: str, **arguments) -> str:
    return tagged(json.dumps({"name": name, "arguments": arguments}))


def test_calls_are_answered_in_their_order_by_plain_and_async_tools():
    step = run(environment(), call("add", a=1, b=2) + call("describe", words=["é"]) + call("add", a=5))
    assert step.observation == [
        {"role": "tool", "name": "add", "content": "3"},
        {"role": "tool", "name": "describe", "content": '{"words": ["é"], "mood": null}'},
        {"role": "tool", "name": "add", "content": "5"},
    ]
    assert not step.done
    assert step.metrics == {"tools/call_frequency": 3.0, "tools/failure_frequency": [0.0, 0.0, 0.0]}


def test_an_answer_without_a_call_ends_the_episode():
    step = run(environment(), "It is 3.")
    assert step.done
    assert step.metrics == {"tools/call_frequency": 0.0, "tools/failure_frequency": []}


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        (tagged("{"), "not valid JSON"),
        (call("multiply", a=1), "there is no tool 'multiply'; the tools are add, describe, fail"),
        (call("add"), "missing a required argument: 'a'; its arguments are a, b"),
        (call("add", a=1, c=2), "unexpected keyword argument 'c'"),
        (call("add", a="1"), "the argument a must be of type integer, not '1'"),
        (call("add", a=True), "must be of type integer, not True"),
        (call("add", a=None), "must be of type integer, not None"),
        (call("describe", words="one"), "the argument words must be of type array"),
        (call("describe", words=[], mood="sad"), "must be one of ['calm', 'wild'], not 'sad'"),
        (call("fail", kind="key"), "KeyError: 'no such thing'"),
        (call("fail", kind="time"), "TimeoutError: no such thing"),
        (call("fail", kind="exit"), "SystemExit: 3"),
    ],
    ids=range(12),
)
def test_the_policy_reads_why_a_call_failed(completion, reason):
    step = run(environment(), completion)
    [message] = step.observation
    assert message["content"].startswith("Error: ")
    assert reason in message["content"]
    assert step.metrics["tools/failure_frequency"] == [1.0]
    assert not step.done


def broken() -> str:
    """Find that the machine is broken."""
    raise RunError("no worker process starts")


def test_an_error_of_the_machine_ends_the_run():
    with pytest.raises(RunError, match="no worker process starts"):
        run(ToolEnvironment(tools=[broken]), call("broken"))


def test_a_call_ends_at_its_time_limit():
    step = run(environment(tool_time_limit=0.05), call("fail", kind="wait") + call("add", a=1))
    assert [message["content"] for message in step.observation] == ["Error: fail took more than 0.05 seconds", "1"]


def test_slow_calls_do_not_exceed_the_time_of_a_step():
    slow = environment(tool_time_limit=0.095, step_time_limit=0.1)
    reasons = [message["content"] for message in run(slow, 3 * call("fail", kind="wait")).observation]
    assert "Error: fail took more than 0.09" in reasons[0]
    assert reasons[1:] == 2 * ["Error: there was no time left to call fail"]
    with pytest.raises(UserError, match=r"tool_time_limit is 30, but all calls of a turn together have 30 seconds"):
        environment(step_time_limit=30)


def test_the_tokenizer_describes_the_format():
    described = environment()
    described.prepare(SimpleNamespace(response_template=DESCRIPTION))
    assert run(copy.deepcopy(described), f"[CALL]{JSON}[/CALL]").observation[0]["content"] == "3"
    described.prepare(SimpleNamespace())
    assert run(described, f"[CALL]{JSON}[/CALL]").done


def test_results_and_errors_are_bounded():
    step = run(environment(max_result_length=10), call("describe", words=["x" * 10_000]) + call("x" * 10_000))
    assert [len(message["content"]) for message in step.observation] == [12, 12]
    assert "name" not in step.observation[1]


def test_tools_are_found_by_import_path_and_have_schemas():
    found = ToolEnvironment(tools=["test_tools.add"])
    assert found.tool_schemas[0]["function"]["parameters"]["required"] == ["a"]
    assert run(found, call("add", a=1, b=1)).observation[0]["content"] == "2"


def undescribed(a: int) -> int:
    """Return a."""
    return a


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        (["test_tools.no_such_tool"], "the tool 'test_tools.no_such_tool' can't be imported"),
        (["no_such_module.tool"], "can't be imported"),
        (["test_tools.JSON"], "can't be called"),
        ([undescribed], "the tool 'undescribed' has no JSON schema"),
        ([add, add], "two of the tools add, add have the same name"),
    ],
    ids=range(5),
)
def test_wrong_tools_are_refused_at_start(tools, message):
    with pytest.raises(UserError, match=message):
        ToolEnvironment(tools=tools)


@pytest.mark.parametrize("options", [{"tool_time_limit": 0}, {"max_result_length": 0}, {"max_turns": 0}], ids=str)
def test_options_are_checked(options):
    with pytest.raises(UserError, match=f"ToolEnvironment.{next(iter(options))} is 0"):
        environment(**options)


def test_the_template_renders_the_tools_into_the_prompts():
    bpe = bpe_tokenizer()
    template = (TEMPLATES / "qwen2.5.jinja").read_text()
    encoder = Encoder(tokenizer=bpe, chat_template=template, tools=environment().tool_schemas)
    [[prompt, other]] = encoder.encode(
        [("row 1", {"prompt": QUESTION, "tools": None}), ("row 2", {"prompt": QUESTION, "tools": [{"name": "more"}]})]
    )
    text, longer = (bpe.decode(row.ids) for row in (prompt, other))
    assert '"name": "add", "description": "Add two integers."' in text
    assert "more" not in text
    assert longer.index('"name": "fail"') < longer.index('"name": "more"')


def test_an_episode_has_the_tokens_of_the_rendered_conversation():
    bpe = bpe_tokenizer()
    template = ChatTemplate(bpe, (TEMPLATES / "qwen2.5.jinja").read_text())
    schemas = environment().tool_schemas
    said = [call("add", a=40, b=2), call("add", a="x") + call("add", a=0), "It is 42."]

    def write(turn):
        return bpe(
            said[bpe.decode(turn.token_ids).count("<|im_start|>assistant") - 1], add_special_tokens=False
        ).input_ids

    [[prompt]] = Encoder(tokenizer=bpe, chat_template=template.template, tools=schemas).encode(
        [("row 1", {"prompt": QUESTION})]
    )
    end = bpe.convert_tokens_to_ids("<|im_end|>")
    episodes = Episodes(
        environment(),
        tokenizer=bpe,
        end_ids=[end],
        template=TurnTemplate(bpe, template),
        max_prompt_length=1000,
        max_tokens=1000,
    )
    with episodes:
        [[episode]] = episodes.run(ScriptedEngine(Script(write, end=[end])), [prompt], [[0]], Sampling())
    texts = {message["content"] for message in episode.messages}
    assert texts == {*said, "42", "0", "Error: add: the argument a must be of type integer, not 'x'"}
    whole = bpe.apply_chat_template(
        [*QUESTION, *episode.messages], tools=schemas, chat_template=template.template, tokenize=False
    )
    assert bpe(whole.rstrip(), add_special_tokens=False).input_ids == [*prompt.ids, *episode.token_ids]
    sampled = [token for token, is_sampled in zip(episode.token_ids, episode.mask, strict=True) if is_sampled]
    assert bpe.decode(sampled) == "<|im_end|>".join([*said, ""])
    logged = metrics([episode])
    assert (logged["tools/call_frequency"], logged["tools/failure_frequency"]) == ([3.0], [0.0, 1.0, 0.0])


# ── Objects written for TRL ──────────────────────────────────────────────────────────────────────────────────────────


class Counter:
    """In the form that TRL documents for ``environment_factory``."""

    def __init__(self):
        self.client = threading.Lock()  # as a connection, it can't be copied
        self.total = 0.0

    def reset(self, **kwargs) -> str | None:
        self.total = float(kwargs["start"])
        return f"It is {kwargs['start']}." if kwargs["start"] else None

    def increment(self, step: int) -> str:
        """
        Increment the counter.

        Args:
            step: The value to add

        Returns:
            The new value.
        """
        if step < 0:
            raise ValueError("Game over.")
        self.total += step
        return f"{self.total:g}"

    async def peek(self) -> float:
        """
        Return the value.
        """
        return self.total

    def get_reward(self) -> float:
        return self.total

    def _private(self) -> None: ...


def test_objects_written_for_trl_run_unchanged():
    prototype = TRLEnvironment(factory="test_tools.Counter")
    assert [tool["function"]["name"] for tool in prototype.tool_schemas] == ["increment", "peek"]
    first, second = copy.deepcopy(prototype), copy.deepcopy(prototype)

    async def episodes():
        opened = [await first.reset({"prompt": QUESTION, "start": 5}), await second.reset({"prompt": [], "start": 0})]
        steps = [await first.step(call("increment", step=2) + call("peek") + call("increment", step=-1))]
        steps += [await second.step(call("increment", step=1)), await second.step("One.")]
        return opened, steps

    opened, (one, two, last) = asyncio.run(episodes())
    assert opened == ["It is 5.", None]
    assert [message["content"] for message in one.observation] == ["7", "7.0", "Error: ValueError: Game over."]
    assert two.observation[0]["content"] == "1"
    assert (one.done, two.done, last.done) == (False, False, True)
    assert asyncio.run(get_reward([first.for_rewards, second.for_rewards])) == [7.0, 1.0]


def test_text_of_reset_is_appended_to_the_last_message():
    bpe = bpe_tokenizer()
    template = (TEMPLATES / "qwen2.5.jinja").read_text()
    prototype = TRLEnvironment(factory=Counter)
    encoder = Encoder(tokenizer=bpe, chat_template=template, tools=prototype.tool_schemas)
    prompts = [[{"role": "user", "content": text}] for text in ("Hi! ", "Hi! It is 5.")]
    [[given, expected]] = encoder.encode([("row", {"prompt": prompt, "start": 5}) for prompt in prompts])
    with Episodes(
        prototype,
        tokenizer=bpe,
        end_ids=[],
        template=TurnTemplate(bpe, ChatTemplate(bpe, template)),
        max_prompt_length=1000,
        max_tokens=1000,
    ) as episodes:
        [[episode]] = episodes.run(ScriptedEngine(Script(lambda turn: [9], end=[])), [given], [[0]], Sampling())
    assert episode.prompt.messages == expected.messages == prompts[1]
    assert episode.prompt.ids == expected.ids


class Remote(Counter):
    async def get_reward(self) -> float:
        return -self.total


class Unrewarded(Counter):
    get_reward = None


@pytest.mark.parametrize(("factory", "reward"), [(Counter, 2.0), (Remote, -2.0)])
def test_an_empty_list_of_rewards_means_that_of_the_objects(tiny_model_path, factory, reward):
    sample = TRLEnvironment(factory=factory)
    asyncio.run(sample.reset({"start": 2}))
    rewards = module(tiny_model_path, rewards=[], environment=sample).rewards
    values = compute_rewards(rewards, [QUESTION], ["a"], [[1]], [{}], offered={"environments": [sample.for_rewards]})
    assert values.tolist() == [[reward]]


@pytest.mark.parametrize(
    "sample", [TRLEnvironment(factory=Unrewarded), ToolEnvironment(tools=[add])], ids=["TRL", "tools"]
)
def test_an_empty_list_of_rewards_is_refused_if_the_environment_gives_none(tiny_model_path, sample):
    with pytest.raises(UserError, match="rewards is empty"):
        module(tiny_model_path, rewards=[], environment=sample)


def test_an_object_serves_one_episode_after_another():
    prototype = TRLEnvironment(factory=Counter, tools=[add])
    seen = []
    for start in (1, 2):
        sample = copy.deepcopy(prototype)
        asyncio.run(sample.reset({"start": start}))
        seen.append(sample.for_rewards)
        assert run(sample, call("increment", step=1)).observation[0]["content"] == str(start + 1)
        assert run(sample, call("add", a=1)).observation[0]["content"] == "1"
        sample.close()
    assert seen[0] is seen[1]


def test_a_factory_without_reset_is_refused():
    with pytest.raises(UserError, match="have no method reset"):
        TRLEnvironment(factory=dict)
