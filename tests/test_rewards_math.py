"""Mathematical answers: extraction, equality, and answers that were written to be accepted without being correct."""

import random
import re
import sys

import pytest

from lightning_grpo.errors import UserError
from lightning_grpo.rewards import ExactMatch, MathMatch, compute_rewards, latex_parser, mathematics
from lightning_grpo.rewards.answers import extract
from lightning_grpo.rewards.mathematics import canonical, equivalent

pytestmark = pytest.mark.xdist_group("math")
MATRIX = r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"


def scores(reward, completions, answers, prompts=None, **kwargs):
    N = len(completions)
    columns = [{"answer": answer} for answer in answers]
    return compute_rewards([reward], prompts or ["?"] * N, completions, [[0]] * N, columns, **kwargs)[:, 0].tolist()


# ── Extraction ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\boxed{7}}", r"\boxed{7}"),
        (r"\boxed {7}", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed{}", ""),
        (r"\boxed{7} and then \boxed{8", "7"),
        (r"} { \boxed{7}", "7"),
        (r"\boxed 7", None),
        ("boxed{7}", None),
        ("7", None),
    ],
    ids=str,
)
def test_the_last_box_with_balanced_braces_counts(text, answer):
    assert extract(text, "boxed") == answer


def test_many_unclosed_boxes_are_read_in_linear_time():
    assert extract(r"\boxed{7}" + r"\boxed{" * 30_000, "boxed") == "7"


def test_exact_match_reads_boxes_in_completions_and_answers():
    columns = [{"answer": r"thus \boxed{7}"}, {"answer": "7"}]
    reward = ExactMatch(extract="boxed")
    assert compute_rewards([reward], ["?"] * 2, [r"\boxed{7}", "7"], [[0]] * 2, columns)[:, 0].tolist() == [1.0, 0.0]


# ── Equality ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("-(-2)", "2"),
        ("2^{10}", "1024"),
        (r"\frac12", "1/2"),
        (r"\dfrac{1}{2}", "0.5"),
        (".5", r"\frac{1}{2}"),
        (r"2\frac{1}{2}", "2.5"),
        ("2 1/2", "2.5"),
        ("1{,}000", "1000"),
        ("1,000", "1000"),
        (r"11,\! 111,\! 111", "11111111"),
        ("+7", "7"),
        ("7.", "7"),
        ("−7", "-7"),
        ("50%", "50"),
        (r"50\%", "0.5"),
        ("0.5", r"50\%"),
        ("50 percent", r"50\%"),
        (r"\$5", "5"),
        (r"5\text{ cm}", "5"),
        ("5 cm", r"5\text{ cm}"),
        (r"5\text{ cm}^2", "5"),
        (r"90^\circ", "90"),
        ("6.02e23", r"6.02\times10^{23}"),
        ("x=3", "3"),
        ("3", "x=3"),
        ("(1,2]", "(1, 2]"),
        ("x<3", "x<3"),
        ("(−∞,3)", r"(-\infty,3)"),
        (r"[3,4]\cup[1,2]", r"[1,2] \cup [3,4]"),
        (r"\{2,1\}", r"\{1,2\}"),
        ("{2,1}", r"\{1,2\}"),
        (r"\varnothing", r"\emptyset"),
        (r"\pm 2", "2,-2"),
        (MATRIX.replace("pmatrix", "bmatrix"), MATRIX),
        (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt2}{2}"),
        ("(x-1)(x+1)", "x^2-1"),
        ("2x+3", "y=2x+3"),
        (r"C+\frac{x^3}{3}", r"\frac{x^3}{3}+C"),
        (r"\log_2 8", "3"),
        ("3!", "6"),
        ("Monday", r"\text{Monday}"),
        (r"\text{(B)}", "B"),
        (r"\boxed{7}", "7"),
        ("9" * 2000, "9" * 2000),
    ],
)
def test_equal_answers(given, expected):
    assert equivalent(given, expected)
    assert canonical(expected)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("0.333", "1/3"),
        ("0.333333", "1/3"),
        ("1.414214", r"\sqrt{2}"),
        (r"0.5\%", "0.5"),
        (r"0.5\%", r"50\%"),
        ("[1,2)", "(1,2]"),
        ("(2,1)", "(1,2)"),
        ("1", "1,2"),
        ("1,2", "1"),
        (MATRIX.replace("3&4", "4&3"), MATRIX),
        ("y+1", "x+1"),
        ("y=3", "x=3"),
        (r"-\infty", r"\infty"),
        (r"x\ge7", "x>7"),
        ("5", "-5"),
        # several answers in one
        ("7;8", "7"),
        (r"7 \text{ or } 8", "7"),
        (r"7\vee 8", "7"),
        (r"7\\8", "7"),
        (r"7 \mid 8", "7"),
        ("x=7, x=8", "x=7"),
        ("7, anything", "7"),
        (r"\boxed{8}\boxed{7}", "7"),
        (r"\begin{cases}7\\8\end{cases}", "7"),
        # equal by accident of the parser
        ("act", "cat"),
        ("sey", "yes"),
        ("on that day", "on that dya"),
        (r"3\text{ hours }6\text{ minutes}", r"3\text{ hours }5\text{ minutes}"),
        (r"1.7\times10^{-19}\text{ C}", r"1.6\times10^{-19}\text{ C}"),
        (r"1.7\times10^{-19}\pi", r"1.6\times10^{-19}\pi"),
        (r"0.0000001\text{ m}", r"0.0000002\text{ m}"),
        ("1e-7", "0"),
        ("100001.0000001", "100001"),
        (r"\frac{7}{0}", "7"),
        (r"\frac{0}{0}", r"\frac{7}{0}"),
        ("nan", "7"),
        ("True", "1"),
        ("7=8", "7"),
        ("7<8", "7"),
        ("0=0", "x=7"),
        ("0=0", "y=x"),
        ("x=x", "y=x"),
        ("x", "7"),
        (r"7\pm 1", "7"),
        ("12!", "12"),
        ("9" * 2000, "9" * 1999 + "8"),
        ("", "7"),
        ("", ""),
        (" ", "7"),
        ("{", "7"),
        ("}{", "7"),
        (r"\frac{1}{", "7"),
        ("\x00", "7"),
        ("７₇", "7"),
    ],
)
def test_unequal_answers(given, expected):
    assert not equivalent(given, expected)


HEDGES = [
    *(
        r"\quad ",
        r"\;",
        r"\!",
        "\n",
        r"\approx ",
        r"\equiv ",
        r"\to ",
        r"\implies ",
        r"\lor ",
        r"\&",
        r"\text{ or }",
        "{,}",
    ),
    *(
        r"\cup ",
        r"\pm ",
        r"\%",
        r"\mod ",
        "=",
        "==",
        r"\ne ",
        "_",
        "^{0}",
        r"\ldots ",
        r"}\boxed{",
        r"$, $",
        r"\text{ cm } ",
    ),
    *(r"\atop ", r"\not ", "~", "\u200b", "\u2009", "、", "∨", "±", "→", "≈", "?", "!", "#", " (", r"\text{, not }"),
]


@pytest.mark.parametrize("form", ["7{}8", "x=7{}x=8", r"\{{7{}8\}}"])
def test_no_answer_equals_two_numbers(form):
    for hedge in HEDGES:
        assert sum(equivalent(form.format(hedge), number) for number in ("7", "8")) <= 1, hedge


def test_tolerance_is_relative():
    assert equivalent("0.333", "1/3", tolerance=0.01)
    assert equivalent("1.414", r"\sqrt{2}", tolerance=0.001)
    assert equivalent("99", "100", tolerance=0.01)
    assert not equivalent("98.9", "100", tolerance=0.01)
    assert not equivalent("1e-9", "0", tolerance=0.5)


@pytest.mark.parametrize(
    "answer",
    [
        r"e^{e^{e^{e^{10}}}}",
        "9^{9^{9^9}}" * 100,
        "(" * 2000 + "7" + ")" * 2000,
        r"\frac{" * 60 + "7",
        r"\frac{1}{" * 40 + "7" + "}" * 40,
        "{" * 40 + "7" + "}" * 40,
        "__import__('os').system('true')",
        "x" + "'" * 300,
        "$" * 300,
        "7" * 399,
        r"\text{" * 50 + "7",
        "<|im_end|>7",
        "7\u202e\u2067",
    ],
    ids=lambda answer: answer[:20].encode("unicode_escape").decode(),
)
def test_hostile_answers_are_unequal_and_cheap(answer):
    assert not equivalent(answer, "7")
    assert not equivalent(answer, r"x+\sqrt{7}")


# ── The parser ────────────────────────────────────────────────────────────────────────────────────────────────────────

SHAPES = r"""
x^2+12x-5 | \frac{x+12}{3} | 12\sqrt{5} | (12, 5) | [-12, 5) | \{12, 5, 7\} | x \in (12, \infty) | 12, 5 | 12 < x \le 57
x = 12 \text{ or } x = 5 | \left(\frac{12}{5}, 7\right) | f(12) | e^{12x} | 12\pi | \log_{12} 5 | \binom{12}{5}
\sin(12x) | 12^\circ | 12! | \overline{AB} | 1.25\% | x_{12} | (-\infty, 12] \cup (57, 91) | \int_0^{12} x^5 dx
\sum_{k=1}^{12} k | 12\text{ cm}^5 | (1,2],(3 | x^{12 | 12+*5 | \begin{pmatrix}1&2\\3&4\end{pmatrix} | 1,5;2,7
"""


def test_stored_predictions_lead_to_the_same_expressions(monkeypatch):
    """What the parser predicts for a text is what it predicted for an earlier one with other numbers and letters."""
    from latex2sympy2_extended.antlr_parser import PSParser
    from math_verify import parser
    from sympy import srepr

    mathematics._parse("1")
    stored = PSParser.math
    draw = random.Random(7)
    texts = re.split(r" \| |\n", SHAPES.strip())
    for text in texts:
        for _ in range(2):
            expressions = []
            for math in (stored, stored.__wrapped__):
                monkeypatch.setattr(PSParser, "math", math)
                parser.parse_latex_cached.cache_clear()
                value, normal = mathematics._parse.__wrapped__(text)
                expressions.append((None if value is None else srepr(value), normal))
            assert expressions[0] == expressions[1], text
            text = re.sub("[1-9]", lambda _: str(draw.randint(1, 9)), text)
    assert latex_parser._predictions.cache_info().hits >= len(texts)


# ── The reward ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_answers_in_thoughts_do_not_count():
    texts = [
        r"<think>\boxed{7}</think> \boxed{8}",
        r"<think>\boxed{8}</think> \boxed{7}",
        r"<think>it is \boxed{7}",
        r"<think>it is</think> <think>\boxed{7}",
        r"\boxed{7}</think> I don't know",
        r"\boxed{7}",
        r"I can't say",
        "",
    ]
    assert scores(MathMatch(), texts, ["7"] * 8) == [0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]


def test_thoughts_that_the_template_opened_do_not_count():
    texts = [r"\boxed{7}", r"hm</think> \boxed{7}"]
    assert scores(MathMatch(), texts, ["7"] * 2, openings=["<think>\n"] * 2) == [0.0, 1.0]


@pytest.mark.parametrize(
    ("how", "completion", "answer", "score"),
    [
        ("boxed", r"$\boxed{\frac12}$", "so #### 0.5", 1.0),
        ("boxed", r"\boxed{0.5}", r"because of this it is $\boxed{\frac{1}{2}}$.", 1.0),
        ("boxed", r"\boxed{7}", 7, 1.0),
        ("boxed", r"\boxed{7}", 7.5, 0.0),
        ("boxed", r"\boxed{7}", None, None),
        ("last_number", "it is 3/4", r"\frac{3}{4}", 1.0),
        ("whole", r" $x = \frac{3}{4}$. ", "0.75", 1.0),
        ("<answer>(.*?)</answer>", r"<answer>\{1,2\}</answer>", r"<answer>\{2,1\}</answer>", 1.0),
        ("<answer>(.*?)</answer>", r"\{1,2\}", r"\{2,1\}", 0.0),
    ],
)
def test_extraction_from_completion_and_row(how, completion, answer, score):
    rows = scores(MathMatch(extract=how), [completion, "so"], [answer, "7"])
    assert rows[0] == score or (score is None and rows[0] != rows[0])


@pytest.mark.slow
def test_expressions_that_take_for_ever_cost_their_limit_and_delay_nothing():
    endless = ["9^{9^{9^9}}", r"\sum_{i=1}^{10^9} i^{i}", "100000000!", "x^{" * 90 + "7" + "}" * 90, r"10^{10^{10}}"]
    texts = [rf"\boxed{{{answer}}}" for answer in endless for _ in range(2)] + [r"\boxed{\frac{14}{2}}"] * 4
    answers = ["7", r"x+\sqrt{7}"] * len(endless) + ["7"] * 4
    assert scores(MathMatch(seconds=3), texts, answers) == [0.0] * 2 * len(endless) + [1.0] * 4


def test_majority_votes_on_values():
    texts = [
        r"\boxed{\frac12}",
        r"\boxed{0.50}",
        r"\boxed{x=1}",
        r"\boxed{\frac{\sqrt2}{2}}",
        r"\boxed{1/\sqrt{2}}",
        "?",
    ]
    half, same, other, *roots, none = MathMatch().final_answers(texts)
    assert half == same != other
    assert roots[0] == roots[1] != half
    assert none is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tolerance": 1.0}, "MathMatch.tolerance is 1.0"),
        ({"tolerance": -0.1}, "MathMatch.tolerance is -0.1"),
        ({"extract": "box"}, "MathMatch.extract is 'box', an expression with 0 groups; set boxed, last_number, whole"),
        ({"seconds": 0}, "MathMatch.seconds is 0"),
    ],
    ids=str,
)
def test_options_are_checked(options, message):
    with pytest.raises(UserError, match=message):
        MathMatch(**options)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"solution": "7"}, "MathMatch.answer is 'answer', and row 1 has no such column; set it to one of solution"),
        ({"answer": " "}, "MathMatch: the 'answer' of row 1: it is empty"),
        ({"answer": "so ####"}, "MathMatch: the 'answer' of row 1: it is empty"),
        ({"answer": r"\boxed{}"}, "MathMatch: the 'answer' of row 1: it is empty"),
        ({"answer": ["7"]}, r"MathMatch: the 'answer' of row 1: \['7'\] is neither text nor a number"),
        ({"answer": True}, "True is neither text nor a number"),
    ],
    ids=str,
)
def test_rows_are_checked_before_training(row, message):
    reward = MathMatch()
    reward.check([{"answer": "7"}, {"answer": None}])
    with pytest.raises(UserError, match=message):
        reward.check([{"answer": "7"}, row])


def test_a_missing_library_is_named_at_start(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(UserError, match=r"MathMatch needs math_verify, .* pip install 'lightning-grpo\[math\]'"):
        MathMatch().check([{"answer": "7"}])
