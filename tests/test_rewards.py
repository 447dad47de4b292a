import asyncio
import logging
import math
import sys

import jsonargparse
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_grpo.rewards import (
    ExactMatch,
    FunctionReward,
    LengthPenalty,
    PrefixMatch,
    ReasoningGym,
    RegexFormat,
    Reward,
    as_rewards,
    completion_text,
    compute_rewards,
)
from lightning_grpo.rewards.answers import same_answer
from lightning_grpo.rewards.numbers import last_number, number_value
from lightning_grpo.rewards.strict import strict_score

CHAT = [{"role": "user", "content": "What is 2 + 2?"}]


def evaluate(*rewards, completions=("so 4", "five"), prompts=None, columns=None, **kwargs):
    N = len(completions)
    return compute_rewards(
        as_rewards(rewards),
        prompts or ["2 + 2 ="] * N,
        list(completions),
        [list(range(i + 1)) for i in range(N)],
        columns or [{"answer": "4"}] * N,
        **kwargs,
    )


# What a reward function gets -----------------------------------------------------------------------------------------


def test_arguments_are_those_of_trl():
    seen = {}

    def spy(prompts, completions, completion_ids, **columns):
        seen.update(columns, prompts=prompts, completions=completions, completion_ids=completion_ids)
        return [0.0, 0.0]

    columns = [{"answer": "4", "level": 1}, {"answer": "5", "level": 2}]
    evaluate(spy, prompts=["2 + 2 =", CHAT], columns=columns, trainer_state="state")
    assert callable(seen.pop("log_metric"))
    assert callable(seen.pop("log_extra"))
    assert seen == {
        "prompts": ["2 + 2 =", CHAT],
        "completions": ["so 4", [{"role": "assistant", "content": "five"}]],
        "completion_ids": [[0], [0, 1]],
        "answer": ["4", "5"],
        "level": [1, 2],
        "trainer_state": "state",
    }
    assert [completion_text(c) for c in seen["completions"]] == ["so 4", "five"]


def test_function_may_name_just_what_it_needs():
    def long_enough(completions, answer, least=4):
        return [float(len(text) >= least) for text in completions]

    assert evaluate(long_enough).tolist() == [[1.0], [1.0]]


def test_function_that_needs_a_column_that_is_not_there():
    def needs_level(completions, level):
        return level

    with pytest.raises(ValueError, match="'level', but the arguments are openings, answer, prompts") as raised:
        evaluate(needs_level)
    assert raised.value.__notes__ == ["raised by the reward 'needs_level'"]


def test_none_becomes_nan_and_each_reward_has_its_column():
    table = evaluate(lambda completions: [None, 2], LengthPenalty(max_completion_length=2, soft_punish_cache=1))
    assert table.dtype == torch.float32 and table.shape == (2, 2)
    assert math.isnan(table[0, 0]) and table[1, 0] == 2
    assert table[:, 1].tolist() == [0.0, -1.0]


def test_column_missing_in_a_row_is_none_there():
    assert evaluate(ExactMatch(), columns=[{"answer": "4"}, {"other": 1}]).isnan().tolist() == [[False], [True]]


@pytest.mark.parametrize("values", [torch.tensor([0.5, 1]), (True, 0), [torch.tensor(0.5), torch.tensor([1])]])
def test_numbers_of_any_kind(values):
    assert evaluate(lambda completions: values).tolist() == [[float(values[0])], [float(values[1])]]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1.0], "returned 1 values for 2 completions"),
        ([1.0, 2.0, 3.0], "returned 3 values for 2 completions"),
        (1.0, "returned 1.0; return a list"),
        ({"a": 1, "b": 2}, "returned {'a': 1, 'b': 2}; return a list"),
        (None, "returned None; return a list"),
        ([0.0, "yes"], r"returned 'yes' \(str\) for row 1, the completion 'five'"),
        ([math.nan, 0.0], "returned nan .*row 0, the completion 'so 4'; return a finite number, or None"),
        ([0.0, -math.inf], "returned -inf .*row 1"),
        ([1e39, 0.0], r"returned 1e\+39 .*row 0"),
        ([0.0, 1j], "returned 1j .*row 1"),
        (torch.zeros(2, 2), r"returned \[0.0, 0.0\] \(list\) for row 0"),
    ],
)
def test_wrong_answers_are_named(answer, message):
    def careless(completions, **columns):
        return answer

    with pytest.raises(ValueError, match=f"the reward 'careless' {message}"):
        evaluate(careless)


def test_as_many_rows_everywhere():
    with pytest.raises(ValueError, match="1 prompts for 2 completions"):
        evaluate(ExactMatch(), prompts=["only one"])


# Async rewards --------------------------------------------------------------------------------------------------------


def test_async_rewards_run_together():
    """Each waits for the other: one after another they would never end."""
    events = {}

    def make(mine, other):
        async def reward(completions, **columns):
            events.setdefault(mine, asyncio.Event()).set()
            await asyncio.wait_for(events.setdefault(other, asyncio.Event()).wait(), timeout=20)
            return [float(mine)] * len(completions)

        reward.__name__ = f"reward_{mine}"
        return reward

    table = evaluate(make(1, 2), lambda completions: [7, 7], make(2, 1))
    assert table.tolist() == [[1, 7, 2], [1, 7, 2]]


def test_async_class_inside_a_running_loop():
    class Given(Reward):
        async def __call__(self, completions, **columns):
            await asyncio.sleep(0)
            return [float(len(c)) for c in completions]

    async def notebook():
        return evaluate(Given())

    assert asyncio.run(notebook()).tolist() == [[4.0], [4.0]]


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_error_in_a_reward_names_it(asynchronous):
    async def waits(completions):
        await asyncio.sleep(0)
        raise KeyError("late")

    def breaks(completions):
        raise KeyError("late")

    async def fine(completions):
        return [0, 0]

    with pytest.raises(KeyError, match="late") as raised:
        evaluate(fine, waits if asynchronous else breaks)
    assert raised.value.__notes__ == [f"raised by the reward {'waits' if asynchronous else 'breaks'!r}"]


# Classes, functions, names --------------------------------------------------------------------------------------------


def test_names_and_weights():
    class TwoWords(Reward):
        """A user's class that knows nothing of dataclasses and calls no super().__init__()."""

        def __init__(self, factor: float):
            self.factor = factor

        def __call__(self, completions, **columns):
            return [self.factor] * len(completions)

    rewards = as_rewards([TwoWords(3.0), ExactMatch(weight=2, name="right"), LengthPenalty.__call__, "os.path.join"])
    assert [reward.name for reward in rewards] == ["two_words", "right", "__call__", "join"]
    assert [reward.weight for reward in rewards] == [1.0, 2, 1.0, 1.0]
    assert evaluate(rewards[0]).tolist() == [[3.0], [3.0]]


def test_two_rewards_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two rewards are named 'exact_match'; set another `name` for one of them"):
        as_rewards([ExactMatch(), ExactMatch(extract="whole")])


@pytest.mark.parametrize("path", ["nowhere.at_all", "os.path.nothing", "plain", ""])
def test_dotted_path_to_nothing(path):
    with pytest.raises(ValueError, match=f"reward function {path!r} can't be imported"):
        FunctionReward(function=path)


def test_from_the_command_line(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "from lightning_grpo.rewards import Reward\n"
        "def ends_well(completions, **columns):\n    return [float(c.endswith('.')) for c in completions]\n"
        "class Brief(Reward):\n"
        "    def __init__(self, most: int = 5, **kwargs):\n"
        "        super().__init__(**kwargs)\n        self.most = most\n"
        "    def __call__(self, completions, **columns):\n"
        "        return [float(len(c) <= self.most) for c in completions]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def train(rewards: list[Reward]):
        return rewards

    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(train)
    (tmp_path / "config.yaml").write_text(
        "rewards:\n- ExactMatch\n- class_path: FunctionReward\n  init_args: {function: my_rewards.ends_well}\n"
    )
    parser.add_argument("--config", action="config")
    parsed = parser.parse_args(
        ["--config", str(tmp_path / "config.yaml"), "--rewards+=my_rewards.Brief", "--rewards.weight=0.5"]
    )
    rewards = parser.instantiate(parsed).rewards
    assert [(reward.name, reward.weight) for reward in rewards] == [
        ("exact_match", 1),
        ("ends_well", 1),
        ("brief", 0.5),
    ]
    assert evaluate(*rewards, completions=["4.", "four."]).tolist() == [[1, 1, 1], [0, 1, 1]]
    sys.modules.pop("my_rewards")


# Exact match ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 1,234.50 in all.", "1234.50"),
        ("7-3=4", "4"),
        ("7-3", "3"),
        ("x=-4", "-4"),
        ("it is −5", "-5"),
        ("(-4)", "-4"),
        ("$12.", "12"),
        ("**12**", "12"),
        ("12km", "12"),
        ("1, 2,3", "3"),
        (".5", ".5"),
        ("-.5", "-.5"),
        ("No.5", "5"),
        ("\\boxed{72}", "72"),
        ("x2 v10", None),
        ("none", None),
        ("", None),
    ],
)
def test_last_number(text, number):
    assert last_number(text) == number


@given(st.integers(), st.text(alphabet="ab .!?\n", max_size=10), st.text(alphabet="ab !?\n", max_size=10))
def test_last_number_of_any_sentence(number, before, after):
    for written in (str(number), f"{number:,}", f"{number}."):
        assert int(last_number(f"2 {before.rstrip('ab.')} {written} {after}")) == number


@given(st.text(max_size=200))
def test_last_number_of_any_text_is_a_number(text):
    found = last_number(text)
    # what no number is (a date, a division by zero) is found whole, and has no value
    assert found is None or found == last_number(found)
    assert math.isfinite(number_value(found or "") or 0)


@pytest.mark.parametrize(
    ("given_", "expected", "same"),
    [
        ("1,000", "1000.0", True),
        ("-0.50", "-.5", True),
        ("  New\n York. ", "new york", True),
        ("12", "1 2", False),
        ("1,2", "12", False),
        ("4", "four", False),
        ("nan", "NaN", True),
        ("1e999999999", "5", False),
        ("", "0", False),
    ],
)
def test_same_answer(given_, expected, same):
    assert same_answer(given_, expected) is same and same_answer(expected, given_) is same


@pytest.mark.parametrize(
    ("how", "completion", "answer", "score"),
    [
        ("last_number", "3 + 4 = 7", "7", 1.0),
        ("last_number", "7 is 3 + 4", "7", 0.0),
        ("last_number", "I think 72.", "Half of 48 is 24.\n#### 72", 1.0),
        ("last_number", "no idea", "7", 0.0),
        ("last_number", "7.0", 7, 1.0),
        ("whole", " Paris. ", "paris", 1.0),
        ("whole", "It is Paris", "Paris", 0.0),
        ("<answer>(.*?)</answer>", "<answer>3</answer> no: <answer>\n4\n</answer>", "4", 1.0),
        ("<answer>(.*?)</answer>", "4", "4", 0.0),
        ("<answer>(.*?)</answer>", "<answer>4</answer>", "we say <answer>4</answer>", 1.0),
        ("last_number", "4", None, None),
    ],
)
def test_exact_match(how, completion, answer, score):
    table = evaluate(ExactMatch(extract=how), completions=[completion], columns=[{"answer": answer}])
    assert table.isnan().item() if score is None else table.item() == score


def test_exact_match_of_conversations_and_of_another_column():
    reward = ExactMatch(answer="solution")
    assert evaluate(reward, completions=["5"], prompts=[CHAT], columns=[{"solution": 5}]).item() == 1


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ([{"answer": "4"}, {"solution": "4"}], "row 1 has no such column; set it to one of solution"),
        ([{"answer": "four"}], "'four' is not one number.* set it to whole"),
        ([{"answer": [4]}], r"\[4\] is neither text nor a number"),
        ([{"answer": True}], "True is neither"),
    ],
)
def test_exact_match_checks_the_data_first(columns, message):
    with pytest.raises(ValueError, match=message):
        ExactMatch().check(columns)
    ExactMatch().check([{"answer": "4"}, {"answer": None}, {"answer": 4.5}])


@pytest.mark.parametrize(
    ("how", "message"), [("(", "unterminated"), ("a", "with 0 groups"), ("(a)(b)", "with 2 groups")]
)
def test_extraction_that_cannot_work(how, message):
    for reward in (ExactMatch, ReasoningGym):
        with pytest.raises(ValueError, match=message):
            reward(extract=how)


def test_prefix_match_is_the_share_of_places():
    table = evaluate(PrefixMatch(), completions=["aaaa", "aba", "baaaaaaa", "", "AA"], columns=[{"answer": "aaaa"}] * 5)
    assert table[:, 0].tolist() == [1.0, 0.5, 0.75, 0.0, 0.0]
    with pytest.raises(ValueError, match=r"PrefixMatch.answer is 'answer', which is None in row 0"):
        evaluate(PrefixMatch(), columns=[{"other": 1}] * 2)


# Format and length ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>two and two</think> 4", 1),
        ("\n<think>\n</think>\n4\n", 1),
        ("<think>two and two</think>  ", 0),
        ("so <think>two</think> 4", 0),
        ("<think>two 4", 0),
        ("<think>a</think> b <think>c</think> 4", 0),
        ("<think><think>a</think></think> 4", 0),
        ("4", 0),
    ],
)
def test_think_format(text, score):
    assert evaluate(RegexFormat(), completions=[text], prompts=[CHAT]).item() == score


def test_format_is_quick_on_hostile_text():
    """With a quadratic pattern this would hang."""
    texts = [
        "<think>" * 50_000,
        "<think></think>" + " " * 500_000 + "</think>",
        "<think></think>" + "a " * 500_000 + "<think>",
    ]
    assert evaluate(RegexFormat(), completions=texts).tolist() == [[0], [0], [0]]


def test_bad_pattern():
    with pytest.raises(ValueError, match=r"RegexFormat.pattern is '\('"):
        RegexFormat(pattern="(")
    assert evaluate(RegexFormat(pattern="[0-9]+.*")).tolist() == [[0], [0]]


def test_length_penalty_is_dapos():
    """Figures of the paper's setting: 20,480 tokens at most, of which 4,096 are the punished cache."""
    reward = LengthPenalty(max_completion_length=20480, soft_punish_cache=4096)
    lengths = [1, 16384, 16385, 18432, 20480, 30000]
    assert reward(completion_ids=[[0] * n for n in lengths]) == [0.0, 0.0, -1 / 4096, -0.5, -1.0, -1.0]


@pytest.mark.parametrize("cache", [0, -1, 11])
def test_length_penalty_refuses(cache):
    remedy = "set 1 or more" if cache < 1 else "set a value from 1 to max_completion_length = 10"
    with pytest.raises(ValueError, match=f"soft_punish_cache is {cache}; {remedy}"):
        LengthPenalty(max_completion_length=10, soft_punish_cache=cache)


# reasoning-gym --------------------------------------------------------------------------------------------------------


def gym_columns(task, seed=1, **args):
    import reasoning_gym

    entry = reasoning_gym.create_dataset(task, size=1, seed=seed, **args)[0]
    return {"answer": entry["answer"], "task": task, "task_args": args, "entry": entry}


def test_reasoning_gym_scores_with_the_task_itself():
    columns = gym_columns("chain_sum", max_terms=2)
    texts = [columns["answer"], f"= <answer>{columns['answer']}</answer>", "<answer>no</answer>", "nothing"]
    whole = evaluate(ReasoningGym(), completions=texts, columns=[columns] * 4)
    assert whole[:, 0].tolist() == [1, 0, 0, 0]
    tagged = evaluate(ReasoningGym(extract="<answer>(.*?)</answer>"), completions=texts, columns=[columns] * 4)
    assert tagged[:, 0].tolist() == [0, 1, 0, 0]


def test_reasoning_gym_threshold_takes_the_floor_away():
    columns = [gym_columns("power_function")] * 2
    texts = ["garbage", columns[0]["answer"]]
    graded = evaluate(ReasoningGym(threshold=None), completions=texts, columns=columns)[:, 0]
    assert 0 < graded[0] < 0.1 and graded[1] == 1
    assert evaluate(ReasoningGym(), completions=texts, columns=columns)[:, 0].tolist() == [0, 1]


def test_scorer_that_raises_counts_as_zero_and_is_logged(caplog):
    columns = [gym_columns("prime_factorization")] * 3
    with caplog.at_level(logging.WARNING):
        table = evaluate(ReasoningGym(), completions=["?", "x y", columns[0]["answer"]], columns=columns)
    assert table[:, 0].tolist() == [0, 0, 1]
    assert caplog.messages == [
        "1 of 3 completions get 0 from reasoning_gym: ValueError: invalid literal for int() with base 10: '?'",
        "1 of 3 completions get 0 from reasoning_gym: ValueError: invalid literal for int() with base 10: 'x y'",
    ]


EVALUATING = (
    *("binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication", "puzzle24"),
    *("simple_integration", "spiral_matrix", "string_insertion"),
)


@pytest.mark.parametrize("task", EVALUATING)
def test_no_code_reaches_scorers_that_evaluate_it(task):
    columns = gym_columns(task)
    called = []
    scorer = lambda answer, entry: called.append(answer) or 1.0
    payloads = ["exit()", "__import__('os')", "exec(chr(49))", "().__class__", "x.y", "lambda: 1", "9**9**9", "x!"]
    payloads += ["[1][0]", "S('1')", "eval(input())", "print(1)", "(1).real", "f'{1}'", "x=1", "9**99999", "0x1", "1j"]
    payloads += ["9**(9**9)", "2**-999", "1e9999999"]
    assert [strict_score(task, payload, columns["entry"], scorer) for payload in payloads] == [0.0] * len(payloads)
    assert called == []


def test_tasks_whose_scorers_evaluate_answers():
    tasks = [gym_columns(task) for task in EVALUATING]
    right = [columns["answer"] for columns in tasks]
    assert evaluate(ReasoningGym(), completions=right, columns=tasks)[:, 0].tolist() == [1] * len(tasks)
    entry = {"answer": "1*(7*4 - 4)", "metadata": {"source_dataset": "puzzle24", "numbers": [7, 4, 4, 1]}}
    composite = {"task": "puzzle24", "task_args": {}, "entry": entry}
    texts = ["(7*4-4)/1", "6*4*1*1", "24"]
    assert evaluate(ReasoningGym(), completions=texts, columns=[composite] * 3)[:, 0].tolist() == [1, 0, 0]


def test_reasoning_gym_needs_its_own_rows():
    with pytest.raises(ValueError, match=r"no column 'task'; set data.source to reasoning_gym:TASK"):
        evaluate(ReasoningGym())
    with pytest.raises(ValueError, match=r"row 0 is not from data.source = reasoning_gym:TASK"):
        ReasoningGym().check([{"answer": "4"}])
