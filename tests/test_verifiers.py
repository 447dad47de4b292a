"""Environments of the package verifiers: their rollouts and rubrics, with turns that the engine samples."""

import json
import signal

import pytest
from chat_templates import TEMPLATES, bpe_tokenizer
from fitting import fit, module
from test_environments import Script, ScriptedEngine

from lightning_grpo import PromptDataModule
from lightning_grpo.data.encoding import Encoder
from lightning_grpo.data.sources import read
from lightning_grpo.data.template import ChatTemplate
from lightning_grpo.environments import VerifiersEnvironment
from lightning_grpo.environments.episodes import Episodes
from lightning_grpo.environments.template import TurnTemplate
from lightning_grpo.errors import RunError, UserError
from lightning_grpo.rewards import compute_rewards
from lightning_grpo.rewards.logs import RewardLogs
from lightning_grpo.rollout import Sampling

pytest.importorskip("verifiers", reason="needs lightning-grpo[verifiers]")

NAME = "verifiers_environments"
TEMPLATE = (TEMPLATES / "qwen2.5.jinja").read_text()


def environment(kind, *, max_turns=None, **args):
    return VerifiersEnvironment(name=NAME, args={"kind": kind, **args}, max_turns=max_turns)


def run(prototype, *samples, max_tokens=2000):
    """Run an episode for each sample, which lists the texts of its turns, and score the group."""
    bpe = bpe_tokenizer()
    [[prompt, *_]] = Encoder(tokenizer=bpe, chat_template=TEMPLATE, tools=prototype.tool_schemas).encode(
        read(f"verifiers:{NAME}", args=prototype.args, size=None, seed=0)
    )
    [end] = bpe.convert_tokens_to_ids(["<|im_end|>"])

    def write(turn):
        turns = bpe.decode(turn.token_ids[len(prompt.ids) :]).count("<|im_start|>assistant")
        return bpe(samples[turn.key][turns], add_special_tokens=False).input_ids

    template = TurnTemplate(bpe, ChatTemplate(bpe, TEMPLATE))
    limits = {"max_prompt_length": 1000, "max_tokens": max_tokens}
    scores = []

    def score(_, group):
        logs, offered = RewardLogs(len(group)), {"environments": [episode.environment for episode in group]}
        size = len(group)
        values = compute_rewards(
            prototype.default_rewards, [prompt.messages] * size, [""] * size, [[]] * size, [{}] * size,
            logs=logs, offered=offered,
        )  # fmt: skip
        scores.append((values[:, 0].tolist(), logs))

    with Episodes(prototype, tokenizer=bpe, end_ids=[end], template=template, **limits) as episodes:
        engine = ScriptedEngine(Script(write, end=[end]))
        [group] = episodes.run(engine, [prompt], [range(len(samples))], Sampling(), score)
    return group, *scores[0]


def assert_exact(episode, *texts):
    """The tokens are those of the rendered conversation, and those of the turns were sampled."""
    bpe, schemas = bpe_tokenizer(), episode.environment.tool_schemas
    messages = [*episode.prompt.messages, *episode.messages]
    whole = bpe.apply_chat_template(messages, tools=schemas or None, chat_template=TEMPLATE, tokenize=False)
    assert bpe(whole.rstrip(), add_special_tokens=False).input_ids == [*episode.prompt.ids, *episode.token_ids]
    sampled = [token for token, is_sampled in zip(episode.token_ids, episode.mask, strict=True) if is_sampled]
    assert bpe.decode(sampled) == "<|im_end|>".join([*texts, ""])


def test_a_single_turn_is_scored_by_the_rubric():
    group, scores, logs = run(environment("single"), ["3"], ["four"])
    assert scores == [1.0, 0.0]
    assert [(episode.turns, episode.end_reason) for episode in group] == [(1, "done"), (1, "done")]
    assert group[0].prompt.messages[0] == {"role": "system", "content": "Answer briefly."}
    assert logs.metrics["verifiers/exact"] == [0.5]
    assert_exact(group[0], "3")


def test_the_environment_answers_until_its_stop_condition():
    group, scores, logs = run(environment("hints"), ["7", "1", "3"], ["3"])
    assert [message["content"] for message in group[0].messages] == ["7", "3 minus 7", "1", "3 minus 1", "3"]
    assert [episode.end_reason for episode in group] == ["done", "done"]
    # the functions of groups, and those without a weight
    assert scores == pytest.approx([1.0, 1.0 + 0.1 * 6])
    assert logs.metrics["verifiers/num_turns"] == [2.0]
    assert [extras["verifiers/wrong"] for extras in logs.extras] == [2.0, 0.0]
    assert_exact(group[0], "7", "1", "3")


@pytest.mark.parametrize(
    ("options", "max_tokens", "reason"), [({"max_turns": 2}, 2000, "turn_limit"), ({}, 20, "token_limit")]
)
def test_a_limit_of_the_run_ends_the_rollout_as_truncated(options, max_tokens, reason):
    prototype = environment("hints", **options)
    ended = prototype._environment.ended
    ended.clear()
    [episode], scores, logs = run(prototype, ["7"] * 9, max_tokens=max_tokens)
    assert episode.end_reason == reason
    assert ended == [("prompt_too_long", True, episode.turns)]
    assert scores == [0.0]
    assert logs.metrics["verifiers/failed"] == [0.0]


def test_the_limit_on_turns_is_that_of_the_environment():
    assert [environment(kind).max_turns for kind in ("single", "hints", "tools")] == [1, 8, 10]
    [episode], *_ = run(environment("tools", max_turns=1), [call(a=1, b=2), "3"])
    assert episode.end_reason == "turn_limit"


def call(**arguments):
    return f"<tool_call>\n{json.dumps({'name': 'add', 'arguments': arguments})}\n</tool_call>"


def test_tools_are_called():
    written = [call(a=1, b=2) + call(a=1), "<tool_call>{</tool_call>", "3"]
    [episode], scores, logs = run(environment("tools"), written)
    results = [message["content"] for message in episode.messages if message["role"] == "tool"]
    assert results[0] == "3"
    assert "missing 1 required positional argument" in results[1]
    assert "Expecting value" in results[2]
    assert scores == [1.0]
    assert logs.metrics["verifiers/add_calls"] == [2.0]
    prompt = bpe_tokenizer().decode(episode.prompt.ids)
    assert '"description": "Add two integers."' in prompt
    assert_exact(episode, *written)


def test_an_error_of_verifiers_ends_the_rollout():
    [episode], scores, logs = run(environment("hints"), ["sandbox"])
    assert (episode.end_reason, scores) == ("done", [0.0])
    assert logs.metrics["verifiers/failed"] == [1.0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (
            "broken",
            "row 0: VerifiersEnvironment.step raised ZeroDivisionError: no hint",
        ),
        ("again", "changed earlier messages"),
        ("picture", "contains 'image_url'"),
    ],
)
def test_what_cannot_be_trained_on_ends_the_run(text, reason):
    with pytest.raises(RunError, match=reason):
        run(environment("hints"), [text, "3"])


def test_an_environment_that_cannot_begin_ends_the_run():
    with pytest.raises(RunError, match=r"ended before its first turn .SandboxError.*no machine is free"):
        run(environment("unavailable"), ["3"])


def test_wrong_environments_are_refused_at_start():
    with pytest.raises(UserError, match="the environment 'no_such': Could not import 'no_such' environment"):
        VerifiersEnvironment(name="no_such")
    with pytest.raises(UserError, match="missing 1 required positional argument: 'kind'"):
        VerifiersEnvironment(name=NAME)
    with pytest.raises(UserError, match="use one with message_type chat"):
        environment("text")


def test_rows_are_those_of_the_data_set():
    def questions(split):
        return read(f"verifiers:{NAME}", args={"kind": "single", "split": split}, size=None, seed=0)

    assert [row["answer"] for _, row in questions("train")] == ["3", "5", "1"]
    assert [row["answer"] for _, row in questions("eval")] == ["3"]
    with pytest.raises(UserError, match=r"source_args.split is 'test'; set train or eval"):
        questions("test")


def test_signals_keep_their_handlers():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    environment("single", max_workers=3)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_training_on_a_rubric(tmp_path, tiny_model_path):
    prompts = PromptDataModule(f"verifiers:{NAME}", source_args={"kind": "hints"}, prompts_per_rollout=2, seed=1)
    policy = module(
        tiny_model_path, rewards=[], environment=environment("hints", max_turns=2), max_completion_length=60,
        max_prompt_length=60,
    )  # fmt: skip
    record = fit(tmp_path, policy, prompts, steps=1, accumulate=1)
    assert policy.reward_names == ["rubric"]
    assert record["verifiers/num_turns"] == record["environment/turns"]
    assert record["sampling/sampling_logp_difference/max"][0] < 1e-5
