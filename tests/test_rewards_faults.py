"""What reward functions do wrong, and what scorers and templates do to answers."""

import re

import numpy as np
import pytest

from lightning_grpo.errors import ReportedError, RunError
from lightning_grpo.rewards import (
    ExactMatch,
    FunctionReward,
    ReasoningGym,
    RegexFormat,
    Reward,
    as_rewards,
    compute_rewards,
    decode_completions,
    template_opening,
)
from lightning_grpo.rewards.strict import EXACT, FORM

CHAT = [{"role": "user", "content": "Hi"}]


def evaluate(*rewards, completions=("so 4", "five"), columns=None, prompts=None, **kwargs):
    N = len(completions)
    columns = columns or [{"answer": "4"}] * N
    return compute_rewards(as_rewards(rewards), prompts or [CHAT] * N, list(completions), [[1]] * N, columns, **kwargs)


# Reward functions ---------------------------------------------------------------------------------------------------


def test_what_a_reward_changes_no_other_sees():
    def vandal(prompts, completions, completion_ids, answer, **columns):
        completions[0][0]["content"] = "4"
        completion_ids[1].append(7)
        prompts[0].clear()
        answer[:] = ["x", "x"]
        return [0, 0]

    def witness(prompts, completions, completion_ids, answer, **columns):
        assert completions[0][0]["content"] == "so 4" and completion_ids == [[1], [1]] and prompts[0] == CHAT
        return [float(a == "4") for a in answer]

    assert evaluate(vandal, witness).tolist() == [[0, 1], [0, 1]]


@pytest.mark.parametrize(
    "answer",
    [[np.True_, np.False_], (x for x in (1, 0)), np.array([1, 0]), [np.float16(1), np.int64(0)], range(1, -1, -1)],
)
def test_numbers_of_numpy_and_iterators(answer):
    assert evaluate(lambda completions: answer).tolist() == [[1], [0]]


def test_a_huge_integer_is_no_overflow():
    with pytest.raises(ValueError, match="row 1, the completion 'five'; return a finite number"):
        evaluate(lambda completions: [0, 10**400])


@pytest.mark.parametrize("asynchronous", [False, True])
def test_exit_in_a_reward_is_an_error_of_the_run(asynchronous):
    async def waits(completions):
        raise SystemExit(0)

    def leaves(completions):
        raise SystemExit(0)

    with pytest.raises(RunError, match=r"the reward '(waits|leaves)' called sys.exit\(0\)"):
        evaluate(waits if asynchronous else leaves)


def test_a_missing_argument_is_found_before_training():
    def needs(completions, level, log_metric):
        return [0]

    FunctionReward(function=needs).check([{"level": 1}])
    with pytest.raises(ReportedError, match="the reward function 'needs' can't be called: it requires 'level'"):
        FunctionReward(function=needs).check([{"answer": 1}])


def test_a_column_named_self():
    class Mine(Reward):
        def __call__(self, completions, **columns):
            return [float("self" not in columns)] * len(completions)

    columns = [{"self": 3}, {"self": 4}]
    assert evaluate(lambda **columns: columns["self"], Mine(), columns=columns).tolist() == [[3, 1], [4, 1]]


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1"])
def test_weights_are_finite_numbers(weight):
    with pytest.raises(ValueError, match=f"the weight of the reward 'exact_match' is {weight}; set a finite number"):
        ExactMatch(weight=weight)


def test_a_models_name_is_no_function():
    with pytest.raises(ValueError, match=r"looks like a model's name or a file\. For a reward model, set class_path"):
        as_rewards(["Skywork/Skywork-Reward-V2-Qwen3-0.6B"])


# reasoning-gym ------------------------------------------------------------------------------------------------------


def wrong_answers(task, gold):
    numbers = re.sub("[0-9]+", "NaN", gold)
    yield from ("nan", "inf", "-Infinity", "nan+nanj", "[NaN, NaN, NaN]", "1e100000000", "9" * 5000, "xyz", numbers)
    # an answer behind which something else stands is another answer
    yield from (f"{gold} xyz", f"{gold}, xyz", f"xyz {gold}", f"{gold}\nxyz", f"{gold}, 17")


EASY = {"gsm_symbolic": {}, "coin_flip": {}, "complex_arithmetic": {}, "base_conversion": {}, "calendar_arithmetic": {}}


@pytest.mark.parametrize("task", sorted({*EXACT, *FORM, *EASY}))
def test_scorers_give_no_marks_to_wrong_answers(task):
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(task, size=4, seed=7)
    for entry in dataset:
        if "Integral" in entry["answer"]:  # the integral itself is no answer
            continue
        row = {"task": task, "task_args": {}, "entry": entry, "answer": entry["answer"]}
        wrong = [answer for answer in wrong_answers(task, entry["answer"]) if answer != entry["answer"]]
        table = evaluate(ReasoningGym(), completions=[entry["answer"], *wrong], columns=[row] * (1 + len(wrong)))
        assert table[0, 0] == 1, entry["answer"]
        assert not table[1:, 0].any(), [answer for answer, s in zip(wrong, table[1:, 0], strict=True) if s]


@pytest.mark.parametrize(
    ("task", "right", "wrong"),
    [
        ("coin_flip", lambda a: a, lambda a: "0"),
        ("number_sorting", lambda a: a.replace("'", ""), lambda a: a.replace("1", "1.9").replace("2", "2.9")),
        ("word_sorting", lambda a: a.lower(), lambda a: a.rpartition(", ")[0]),
        ("spell_backward", lambda a: f" {a}\n", lambda a: f"{a}xyz"),
        ("gsm_symbolic", lambda a: f" {a}. ", lambda a: f"-{a}"),
    ],
)
def test_strict_scores_take_other_spellings_of_the_same_answer(task, right, wrong):
    import reasoning_gym

    entry = reasoning_gym.create_dataset(task, size=1, seed=7)[0]
    row = {"task": task, "task_args": {}, "entry": entry, "answer": entry["answer"]}
    table = evaluate(ReasoningGym(), completions=[right(entry["answer"]), wrong(entry["answer"])], columns=[row] * 2)
    assert table[:, 0].tolist() == [1, 0]


# Texts --------------------------------------------------------------------------------------------------------------


def test_a_tag_that_the_template_opened_counts():
    think = RegexFormat()
    texts = ["a</think> 4", "<think>a</think> 4"]
    assert evaluate(think, completions=texts, openings=["<think>\n", ""]).tolist() == [[1], [1]]
    assert evaluate(think, completions=["a</think> 4", "a</think> 4"]).tolist() == [[0], [0]]
    seen = evaluate(lambda completions, **columns: [float("openings" in columns)] * 2, openings=["<think>", ""])
    assert seen.tolist() == [[0], [0]]


def test_special_tokens_reach_rewards_but_for_those_that_end(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "<think>": 1, "<end>": 2, "<pad>": 3}, unk_token="a")),
        additional_special_tokens=["<think>"],
        eos_token="<end>",
        pad_token="<pad>",
    )
    texts = decode_completions(tokenizer, [[1, 0, 2, 3, 3], [0, 2, 0], [2], []], [2])
    assert [text.split() for text in texts] == [["<think>", "a"], ["a", "a"], [], []]
    assert template_opening(tokenizer, [0, 2, 1]) == "<think>"
    assert template_opening(tokenizer, [1, 0]) == ""
