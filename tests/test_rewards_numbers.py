"""Numbers are compared by value over their whole notation, or not at all."""

import time
from fractions import Fraction

import pytest

from lightning_grpo.rewards import ExactMatch
from lightning_grpo.rewards.answers import extract
from lightning_grpo.rewards.numbers import last_number, number_value


def score(completion, answer, how="last_number"):
    return ExactMatch(extract=how)(completions=[completion], answer=[answer])[0]


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("3/4", "1/4"),
        (r"\frac{1}{2}", r"\frac{3}{2}"),
        (r"so \boxed{\frac12}", 2),
        ("7^6", "10^6"),
        ("3e-5", "1e-5"),
        ("5", 1e-05),
        ("16", 1e16),
        ("6.02 x 10^23", "1.1 x 10^23"),
        (r"6.02 \times 10^{23}", "23"),
        ("23", "6.02 x 10^23"),
        (r"5\sqrt{3}", 3),
        ("√3", 3),
        ("2π", 2),
        ("at 12:30", 30),
        ("on 2024-01-02", 2),
        ("1 1/2", "1/2"),
        ("10/12/2024", 2024),
        ("2^2^3", 3),
        ("x^2", 2),
        ("10^-2", 2),
        ("1/0", 0),
        ("9^9^9^9", 9),
    ],
)
def test_another_number_is_wrong(completion, answer):
    assert score(completion, answer) == 0


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("1.5", r"\frac{3}{2}"),
        ("3/2", "1.5"),
        (r"the answer is \boxed{\frac{3}{2}}.", "3/2"),
        (r"1\frac{1}{2}", "1 1/2"),
        ("0.00001", 1e-05),
        ("1e-5", "0.00001"),
        ("10^6", "1,000,000"),
        ("6.02 × 10²³", "6.02e23"),
        ("5 m^2", 5),
        ("5 m²", 5),
        ("42 (since 6*7)", 42),
        ("$1,234.50 in all", "$1234.5"),
        ("50%", "50"),
        ("It is −3.", -3),
        ("so $x = 7$", "$7$"),
        ("48/2 = 24", "Half of 48 is <<48/2=24>>24.\n#### 24"),
        ("2**10 = 1024", r"\boxed{1024}"),
    ],
)
def test_the_same_number_is_right(completion, answer):
    assert score(completion, answer) == 1


@pytest.mark.parametrize(
    "answer",
    [r"5\sqrt{3}", "{1, 2}", "[0, 1)", "(1, 2)", "12:30", "four", "5 apples or 6", "", "nan", "x = 5", "1 or 2"],
)
def test_an_answer_that_is_not_one_number_is_refused_at_start(answer):
    with pytest.raises(ValueError, match=r"row 1: .* is not one number, .* set it to whole or to an expression"):
        ExactMatch().check([{"answer": "1"}, {"answer": answer}])
    # compared as text, it will do
    assert score(answer, answer, "whole") == 1


def test_an_expression_that_finds_a_part_of_the_answer_is_refused():
    reward = ExactMatch(extract="([0-9]+)")
    with pytest.raises(
        ValueError, match=r"finds only '4' of the answer '1/4'.* set an expression that takes the whole"
    ):
        reward.check([{"answer": "1/4"}])
    reward.check([{"answer": "14"}])
    tags = ExactMatch(extract="<answer>(.*?)</answer>")
    tags.check([{"answer": "1/4"}, {"answer": "hence <answer>1/4</answer>"}])
    assert score("<answer>.25</answer>", "hence <answer>1/4</answer>", tags.extract) == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [("-2^2", -4), ("2^{-2}", Fraction(1, 4)), ("1" * 3000, None), ("1e999999999", None), ("٣", None), ("1_000", None)],
)
def test_values(text, value):
    assert number_value(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "1",
        "1,",
        "1/",
        "1 ",
        "^",
        "(",
        "1 (a",
        r"\frac{",
        "√",
        "1^",
        ".1",
        "-",
        "1:",
        "x^{",
        "10^",
        r"\sqrt{1}",
        "$",
        "9e",
        "%",
        "%!",
    ],
)
def test_hostile_texts_take_linear_time(text):
    """With a quadratic expression, each would take minutes."""
    found = last_number(text * 100_000)
    assert found is None or found in (text * 100_000).replace(",", "")
    assert number_value(text * 100_000) is None
    assert number_value(text * 100_000 + "!") is None


def test_tags_are_found_from_the_end():
    start = time.process_time()
    assert extract("<answer>" * 200_000, "<answer>(.*?)</answer>") is None
    assert extract("<answer>1</answer> or <answer>2</answer>", "<answer>(.*?)</answer>") == "2"
    assert extract("[1] [2] (3)", r"\[(.*?)\]") == "2"
    assert extract("a <b> c", "<(.*)>") == "b"
    assert extract("no tag", r"\((.*?)\)") is None
    # minutes with a search from the start
    assert time.process_time() - start < 60
