"""The calculator, the Python tool and the guessing game."""

import copy
import json

import pytest
from fitting import fit, module

from lightning_grpo import PromptDataModule
from lightning_grpo.data.sources import hidden_numbers
from lightning_grpo.environments import GuessNumber, calculate, run_python
from lightning_grpo.environments.python_tools import evaluate
from lightning_grpo.errors import UserError


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("7311 * 7890", "57683790"),
        ("(1 + 2) * 3 - -4 // 2", "11"),
        (" 7 × 8 ÷ 2 ", "28.0"),
        ("2 ^ 10 % 1000", "24"),
        ("+1.5 − 1", "0.5"),
    ],
)
def test_expressions_have_their_value(expression, value):
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["", "1 +", "True", "'a' * 9", "__import__('os')", "x", "(1).real", "[1][0]", "1 if 1 else 2", "1 < 2"],
)
def test_nothing_but_arithmetic_is_evaluated(expression):
    with pytest.raises((ValueError, SyntaxError)):
        evaluate(expression)


def test_tools_evaluate_in_the_worker_processes():
    assert calculate("12 * 34") == "408"
    with pytest.raises(ValueError, match="ZeroDivisionError"):
        calculate("1 / 0")
    assert run_python("print(sum(range(10)))") == "45\n"
    assert run_python("import os\nprint(os.fork())").startswith("PermissionError")


def game(**options):
    environment = copy.deepcopy(GuessNumber(**options))
    assert environment.reset({"prompt": "", "low": 51, "high": 60, "answer": "57"}) is None
    return environment


def test_the_game_ends_with_the_right_guess():
    environment = game()
    steps = [environment.step(text) for text in ("I guess 55.", "It is not 55, so 58", "57")]
    assert [step.observation for step in steps] == ["It is higher than 55.", "It is lower than 58.", None]
    assert [(step.reward, step.done) for step in steps] == [(0.0, False), (0.0, False), (1.0, True)]


def test_guesses_that_agree_with_the_answers_are_rewarded_if_the_option_is_set():
    environment = game(guess_reward=0.1)
    guesses = ("55", "54", "55", "a", "61", "58", "58")
    assert [environment.step(guess).reward for guess in guesses] == [0.1, 0, 0, 0, 0, 0.1, 0]


@pytest.mark.parametrize("guesses", [["57"], ["55", "57"], ["55", "56", "58", "57"]], ids=len)
def test_a_long_game_is_not_better_than_a_short_one(guesses):
    environment = game(guess_reward=0.1, max_turns=4)
    assert sum(environment.step(guess).reward for guess in guesses) == pytest.approx(1.4)


@pytest.mark.parametrize("text", ["", "no number", "²", "9" * 10_000])
def test_the_game_goes_on_after_any_text(text):
    step = game().step(text)
    assert isinstance(step.observation, str)
    assert not step.done


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"low": 51, "high": None, "answer": 57}, "GuessNumber needs whole numbers .*NoneType"),
        ({"low": 51, "high": "x", "answer": 57}, "GuessNumber needs whole numbers .*'x'"),
        ({"low": 51, "high": 60, "answer": 61}, "the answer 61 is not between low = 51 and high = 60"),
    ],
    ids=["null", "text", "outside"],
)
def test_rows_that_give_no_game_are_refused_at_start(tmp_path, tiny_model_path, columns, reason):
    rows = [{"prompt": [{"role": "user", "content": letter}]} for letter in "abcdefgh"]
    good = {"low": 51, "high": 60, "answer": "57"}
    lines = [json.dumps(row | (columns if i == 6 else good)) for i, row in enumerate(rows)]
    (tmp_path / "numbers.jsonl").write_text("\n".join(lines))
    policy = module(tiny_model_path, rewards=[], environment=GuessNumber(), max_prompt_length=20)
    with pytest.raises(UserError, match=rf"numbers.jsonl, line 7: {reason}"):
        fit(tmp_path, policy, PromptDataModule(str(tmp_path / "numbers.jsonl"), prompts_per_rollout=8, chat=True))


def test_rows_without_the_columns_are_refused():
    with pytest.raises(UserError, match=r"needs whole numbers in the columns low, high and answer .*'low'"):
        GuessNumber().check([{"answer": "1"}])


def test_hidden_numbers_lie_in_their_ranges():
    rows = list(hidden_numbers(200, 0, width=5, highest=8))
    assert {row["low"] for row in rows} == {1, 2, 3, 4}
    assert all(row["low"] <= int(row["answer"]) <= row["high"] == row["low"] + 4 for row in rows)
    assert {int(row["answer"]) - row["low"] for row in rows} == set(range(5))
    assert rows == list(hidden_numbers(200, 0, width=5, highest=8)) != list(hidden_numbers(200, 1, width=5, highest=8))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"width": 0}, "width is 0"),
        ({"width": 9, "highest": 8}, "highest is 8"),
        ({"size": None}, "data.size is unset"),
    ],
    ids=str,
)
def test_wrong_arguments_of_hidden_numbers_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        list(hidden_numbers(**{"size": 3, "seed": 0} | arguments))
