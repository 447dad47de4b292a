"""Rewards for text: choices, similarity, JSON, constraints, formats and length, with responses that try to cheat."""

import json

import pytest

from lightning_grpo.errors import UserError
from lightning_grpo.rewards import (
    Constraints,
    CosineLength,
    ExactMatch,
    FunctionReward,
    FuzzyMatch,
    JSONSchema,
    MultipleChoice,
    RegexFormat,
    compute_rewards,
)
from lightning_grpo.rewards.choice import chosen_letter
from lightning_grpo.rewards.constraints import CHECKS
from lightning_grpo.rewards.logs import RewardLogs
from lightning_grpo.rewards.response import response


def scores(reward, completions, columns, lengths=None, **kwargs):
    N = len(completions)
    ids = [[0] * length for length in lengths or [1] * N]
    return compute_rewards([reward], ["?"] * N, completions, ids, columns, **kwargs)[:, 0].tolist()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("no thoughts", "no thoughts"),
        ("<think>a</think>b", "b"),
        ("a</think>b", "b"),
        ("<think>a", ""),
        ("<think>a</think>b<think>c", ""),
        ("<think>a</think>b</think>c", "c"),
        ("<thinking>a</thinking>b", "b"),
    ],
)
def test_the_response_is_what_follows_the_thoughts(text, expected):
    assert response(text) == expected


# ── Multiple choice ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "text",
    [
        "B",
        "(B)",
        "B.",
        "**B**",
        "B) Paris",
        "The answer is B",
        "The answer is (B).",
        "answer is **B**",
        "Answer: B",
        "The correct answer is option B because of A.",
        r"\boxed{B}",
        r"$\boxed{\text{B}}$",
        "<answer>B</answer>",
        "<answer>\nB\n</answer>",
        "I choose B",
        "The answer is A. No, the answer is B",
        "The best choice among these is B.",
        "It can't be a lie: so (B) is right",
        "Final Answer: The final answer is $\\boxed{B}$. I hope it is correct.",
    ],
)
def test_one_choice(text):
    assert chosen_letter(text, "ABCD") == "B"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "A, B, C, D",
        "A\nB\nC\nD",
        "(A) (B) (C) (D)",
        "A) Paris\nB) Rome",
        "The answer is A or B",
        "The answer is A, B, C, D",
        "The answer is A B C D",
        "The answer is ABCD",
        "Answer: A/B",
        "Answer: (A), (B)",
        "The answer is (A) and (B)",
        "The answer is either A or B",
        r"\boxed{A, B}",
        r"\boxed{A \text{ or } B}",
        "Answer: A;B",
        "Answer: A | B",
        "Answer: {A} + {B}",
        "The answer is not B",
        "(A) is wrong, so (B)",
        "A good question",
        "I think Bob",
        "Answer: Because",
        "answer: E",
        "Option B is wrong",
    ],
)
def test_no_single_choice(text):
    assert chosen_letter(text, "ABCD") is None


def test_choices_are_read_in_linear_time():
    for text in (
        "answer " * 9000,
        "answer is " + "A " * 9000,
        "answer:" + "(" * 9000,
        "answer is A" + " " * 9000 + "x",
    ):
        chosen_letter(text * 5, "ABCD")
    assert chosen_letter("answer is " + "A " * 9000, "ABCD") == "A"


def test_letters_and_indices_of_the_row():
    rows = [{"answer": answer} for answer in ("B", "(b)", 1, 0, None)]
    *given, none = scores(MultipleChoice(), ["B"] * 5, rows)
    assert given == [1.0, 1.0, 1.0, 0.0]
    assert none != none
    assert MultipleChoice().final_answers(["<think>A</think> B", "A or B"]) == ["B", None]


def test_options_and_rows_of_choices_are_checked():
    with pytest.raises(UserError, match=r"MultipleChoice.options is 1; set a number in \[2, 26\]"):
        MultipleChoice(options=1)
    for answer in ("E", "AB", 4, -1, "1"):
        with pytest.raises(UserError, match=f"row 0: {answer!r} is no option; set a letter from A to D"):
            MultipleChoice().check([{"answer": answer}])


# ── Similarity ────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("unit", "text", "expected"),
    [
        ("characters", "kitten", 1 - 3 / 7),  # Levenshtein's classic: three edits to sitting
        ("characters", "  SITTING\n", 1.0),
        ("characters", "", 0.0),
        ("characters", "<think>sitting", 0.0),
        ("characters", "sitting" * 7, 1 / 7),
        ("words", "Sitting, of course!", 2 * 1 / (3 + 1)),
        ("words", "kitten", 0.0),
        ("words", "?", 0.0),
        ("words", "sitting sitting sitting", 2 * 1 / (3 + 1)),
    ],
)
def test_similarity(unit, text, expected):
    assert scores(FuzzyMatch(unit=unit), [text], [{"answer": "sitting"}]) == pytest.approx([expected])


def test_similarities_below_the_minimum_become_0():
    rows = [{"answer": "sitting"}] * 2
    assert scores(FuzzyMatch(minimum=0.6), ["kitten", "sittin"], rows) == pytest.approx([0.0, 6 / 7])
    with pytest.raises(UserError, match=r"FuzzyMatch.unit is 'tokens'; set characters or words"):
        FuzzyMatch(unit="tokens")


# ── JSON ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"n": 1}', 1.0),
        (' \n{"n": 1} ', 1.0),
        ('Here it is:\n```json\n{"n": 1}\n```\nGood luck.', 1.0),
        ('```\n{"n": "1"}\n```\n```json\n{"n": 1}\n```', 1.0),
        ('<think>{"n": "x"}</think>{"n": 1}', 1.0),
        ('<think>{"n": 1}', 0.0),
        ('It is {"n": 1}', 0.0),
        ('{"n": 1} {"n": 1}', 0.0),
        ('{"n": 1, "n": 2}', 0.0),
        ('{"n": 1.5}', 0.0),
        ('{"n": true}', 0.0),
        ('{"n": NaN}', 0.0),
        ('{"n": 1, "m": 1}', 0.0),
        ("{'n': 1}", 0.0),
        ("{}", 0.0),
        ("", 0.0),
        ("[" * 20_000, 0.0),
        ('{"n": ' + "9" * 9000 + "}", 0.0),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_json_by_schema(text, score):
    assert scores(JSONSchema(schema=SCHEMA), [text], [{}]) == [score]


def test_schemas_of_rows():
    rows = [{"schema": SCHEMA}, {"schema": json.dumps({"type": "array"})}, {"schema": None}]
    first, second, none = scores(JSONSchema(), ['{"n": 1}'] * 3, rows)
    assert (first, second) == (1.0, 0.0)
    assert none != none


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"schema": {"type": "number"}}, {}], "row 1 has no such column"),
        ([{"schema": {"type": "numeral"}}], "the 'schema' of row 0 is not a JSON schema: 'numeral' is not valid"),
        ([{"schema": "{"}], "the 'schema' of row 0 is not a JSON schema: Expecting property name"),
    ],
    ids=["column", "type", "text"],
)
def test_schemas_are_checked_before_training(rows, message):
    with pytest.raises(UserError, match=message):
        JSONSchema().check(rows)


def test_a_bad_schema_in_the_options():
    with pytest.raises(UserError, match=r"JSONSchema.schema is not a JSON schema: 'object' is not of type 'integer'"):
        JSONSchema(schema={"minLength": "object"})


# ── Constraints ───────────────────────────────────────────────────────────────────────────────────────────────────────

CASES = [
    ("keywords:existence", {"keywords": ["cat", "dog"]}, "A dog and a CAT.", "A dog and a catalog."),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "A catalog.", "The cat."),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2}, "cat, cat", "cat, catalog"),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2, "relation": "less than"}, "cat", "cat cat"),
    ("keywords:letter_frequency", {"letter": "A", "let_frequency": 2, "let_relation": "at least"}, "banal", "bAn"),
    ("language:response_language", {"language": "de"}, "Das ist ein schöner Satz.", "This is a nice sentence."),
    ("length_constraints:number_words", {"num_words": 3, "relation": "exactly"}, "It isn't 3.5", "One two"),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at most"}, "one two three", "a b c d"),
    ("length_constraints:number_sentences", {"num_sentences": 2}, "One. Two!", "Only 2.5 here..."),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "less than"}, "Version 3.11.", "A? B."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n***\n"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"},
        "a\n\nSo, b",
        "so\n\na",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name] [city]", "[name] []"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP.S. Hi", "Bye.\nP.S."),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n* b", "* a\n---\n**b**"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "- a", "- a\n- b"),
    ("detectable_format:constrained_response", {}, "My answer is yes.", "My answer is yesterday."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* **b**", "*a* ** **"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\na\nSection 2\nb",
        "Section 1\nSection",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{a: 1}"),
    ("detectable_format:title", {}, "<<Cats>>\nThey purr.", "<< >>"),
    ("combination:two_responses", {}, "a\n******\nb", "a\n******\na"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, "Say hi.\nHi.", "Hi. Say hi."),
    ("startend:end_checker", {"end_phrase": "That is all."}, "Hi. That is all.\n", "That is all. Hi."),
    ("startend:quotation", {}, '"Hi."', '"Hi.'),
    ("change_case:capital_word_frequency", {"capital_frequency": 2}, "I AM here", "I am here"),
    ("change_case:english_capital", {}, "HI 5!", "Hi"),
    ("change_case:english_lowercase", {}, "hi 5!", "Hi"),
    ("punctuation:no_comma", {}, "No comma; none.", "Yes, one."),
]


def test_all_constraints_are_tested():
    assert {name for name, *_ in CASES} == set(CHECKS)
    assert len(CHECKS) == 25


@pytest.mark.parametrize(
    ("name", "arguments", "right", "wrong"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)]
)
def test_constraint(name, arguments, right, wrong):
    assert CHECKS[name](right, **arguments)
    assert not CHECKS[name](wrong, **arguments)


def test_share_of_constraints():
    row = {
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [None, {"num_words": 2, "relation": "at least", "num_sentences": None}],
    }
    texts = ["Two words", "One", "<think>a,</think>Two words", "", "<think>Two words", "One,"]
    reward = Constraints()
    reward.check([row])
    assert scores(reward, texts, [row] * 6) == [1.0, 0.5, 1.0, 0.0, 0.0, 0.0]
    assert scores(Constraints(all_or_nothing=True), texts, [row] * 6) == [1.0, 0.0, 1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "the 'instruction_id_list' of row 0 is None"),
        ({"instruction_id_list": [], "kwargs": []}, "row 0 has no constraints"),
        ({"instruction_id_list": ["punctuation:no_comma"], "kwargs": []}, "lists of the same length"),
        ({"instruction_id_list": ["no_comma"], "kwargs": [{}]}, "'no_comma' in row 0 is unknown; set one of keywords"),
        (
            {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{"words": 3}]},
            "do not fit: .* set num_words, relation",
        ),
        (
            {"instruction_id_list": ["length_constraints:number_words"], "kwargs": [{"num_words": "3"}]},
            "{'num_words': '3'}, do not fit",
        ),
        (
            {"instruction_id_list": ["keywords:existence"], "kwargs": [{"keywords": "cat"}]},
            "{'keywords': 'cat'}, do not fit",
        ),
        (
            {
                "instruction_id_list": ["length_constraints:number_words"],
                "kwargs": [{"num_words": 3, "relation": "about"}],
            },
            "the relation 'about' is unknown; set one of less than, at least",
        ),
        (
            {"instruction_id_list": ["startend:end_checker"], "kwargs": [{"end_phrase": ""}]},
            "end_phrase of startend:end_checker in row 0 is ''; set a text, or drop it",
        ),
        (
            {
                "instruction_id_list": ["length_constraints:nth_paragraph_first_word"],
                "kwargs": [{"num_paragraphs": 3, "nth_paragraph": "1", "first_word": "x"}],
            },
            "do not fit: '>=' not supported",
        ),
    ],
    ids=["columns", "none", "lengths", "name", "argument", "type", "list", "relation", "empty", "type of another"],
)
def test_constraints_are_checked_before_training(row, message):
    with pytest.raises(UserError, match=message):
        Constraints().check([row])


# ── Formats and length ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>a</think><answer>b</answer>", 1.0),
        ("<think>\na\n</think>\n<answer>\nb\n</answer>\n", 1.0),
        ("<think>a</think>b", 0.0),
        ("<think>a</think><answer>b</answer>c", 0.0),
        ("<think>a</think>c<answer>b</answer>", 0.0),
        ("<think><answer>b</answer></think><answer>b</answer>", 0.0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0.0),
        ("<answer>b</answer>", 0.0),
    ],
)
def test_thoughts_and_tagged_answer(text, score):
    assert scores(RegexFormat(pattern="think_answer"), [text], [{}]) == [score]


def test_cosine_of_the_length():
    reward = CosineLength(reward=ExactMatch(), max_completion_length=100)
    rows = [{"answer": answer} for answer in ("4", "4", "4", "4", "5", "5", "5", None)]
    *values, none = scores(reward, ["4"] * 8, rows, lengths=[0, 50, 100, 900, 0, 50, 100, 1])
    assert values == pytest.approx([1.0, 0.75, 0.5, 0.5, -1.0, -0.75, -0.5])
    assert none != none
    assert reward.final_answers(["so 4"]) == ["4"]


def test_cosine_of_an_asynchronous_reward():
    async def right(completions, **columns):
        return [1.0] * len(completions)

    reward = CosineLength(reward=FunctionReward(function=right), max_completion_length=10, correct=(2.0, 1.0))
    assert scores(reward, ["a", "b"], [{}] * 2, lengths=[5, 10]) == pytest.approx([1.5, 1.0])


def test_the_reward_within_a_cosine_logs():
    def right(completions, log_metric, **columns):
        columns["log_extra"]("text", completions)
        log_metric("right", 1.0)
        return [1.0] * len(completions)

    logs = RewardLogs(1)
    reward = CosineLength(reward=FunctionReward(function=right), max_completion_length=10)
    assert scores(reward, ["a"], [{}], lengths=[10], logs=logs) == [0.5]
    assert logs.metrics == {"right": [1.0]} and logs.extras == [{"text": "a"}]
    assert CosineLength(reward=JSONSchema(), max_completion_length=10).in_workers


def test_options_and_rows_of_the_cosine_are_checked():
    with pytest.raises(UserError, match=r"CosineLength.max_completion_length is 0; set 1 or more"):
        CosineLength(reward=ExactMatch(), max_completion_length=0)
    with pytest.raises(UserError, match=r"CosineLength.wrong is \(1.0,\); set two finite numbers"):
        CosineLength(reward=ExactMatch(), max_completion_length=1, wrong=(1.0,))
    with pytest.raises(UserError, match="row 0 has no such column"):
        CosineLength(reward=ExactMatch(), max_completion_length=1).check([{}])
