"""TRL's reward functions: they run unchanged, and ours give the same figures. The figures are those of TRL 1.16.0 with
math-verify 0.9.0; the last test computes them anew if TRL is installed."""

import pytest

from lightning_grpo.cli.trl.data import REWARDS
from lightning_grpo.rewards import (
    CosineLength,
    FunctionReward,
    LengthPenalty,
    MathMatch,
    RegexFormat,
    RepetitionPenalty,
    compute_rewards,
)
from lightning_grpo.rewards import __all__ as exported

CHAT = [{"role": "user", "content": "?"}]
ANSWERS = [
    # completion, solution, and accuracy_reward, which is reasoning_accuracy_reward if thoughts precede the completion
    (r"\boxed{\frac{1}{3}}", r"\frac{1}{3}", 1.0),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{3}", 0.0),
    (r"so \boxed{0.5}", r"$\frac{1}{2}$", 1.0),
    (r"\boxed{x^2-1}", "$(x-1)(x+1)$", 1.0),
    (r"\boxed{50\%}", "0.5", 1.0),
    (r"\boxed{(1,2]}", "$(1,2]$", 1.0),
    (r"\boxed{[1,2)}", "$(1,2]$", 0.0),
    (r"\boxed{5\text{ cm}}", "5", 1.0),
    (r"\boxed{1,000}", "1000", 1.0),
    (r"\boxed{\{2,1\}}", r"$\{1,2\}$", 1.0),
    ("I don't know", "7", 0.0),
    ("7", "7", 0.0),
]
FORMATS = [
    ("<think>a</think>b", 1.0),
    ("<think>a</think>", 1.0),
    ("<think>\na\n</think>\nb", 1.0),
    (" <think>a</think>b", 0.0),
    ("<think>a<think>b</think>c", 0.0),
    ("<think>a</think>b</think>c", 1.0),
    ("a</think>b", 0.0),
    ("<think>a", 0.0),
    ("<think></think>b", 1.0),
    ("b<think>a</think>", 0.0),
    ("<think>a</think>b<think>", 0.0),
]
OVERLONG = [(1023, 0.0), (1024, 0.0), (1025, -0.00390625), (1279, -0.99609375), (1280, -1.0), (5000, -1.0)]
"""Length, and get_soft_overlong_punishment(max_completion_len=1280, soft_punish_cache=256)."""
COSINE = [(0, 1.0, -1.0), (25, 0.926777, -0.926777), (50, 0.75, -0.75), (100, 0.5, -0.5), (250, 0.5, -0.5)]
"""Length, and get_cosine_scaled_reward(max_len=100) of a correct and of a wrong completion."""
REPETITION = [
    ([5, 5, 5, 5, 5], -2 / 3, -0.75),
    ([1, 2, 1, 2, 1, 2], -0.5, -0.6),
    ([1, 2, 3], 0.0, 0.0),
    ([1], 0.0, 0.0),
]
"""Tokens, and get_repetition_penalty_reward() with n-grams of 3 and of 2."""


def scores(reward, completions, solutions=None, completion_ids=None):
    N = len(completions)
    columns = [{"solution": solution} for solution in solutions or ["7"] * N]
    table = compute_rewards([reward], [CHAT] * N, completions, completion_ids or [[0]] * N, columns)
    return table[:, 0].tolist()


def converted(name):
    """Our reward into which convert-trl turns TRL's."""
    options, _ = REWARDS[name]
    kinds = {kind.__name__: kind for kind in (MathMatch, RegexFormat, LengthPenalty)}
    return kinds[options["class_path"].rpartition(".")[2]](**options.get("init_args", {}))


@pytest.mark.parametrize("name", ["accuracy_reward", "reasoning_accuracy_reward"])
def test_accuracy(name):
    texts, solutions, expected = map(list, zip(*ANSWERS, strict=True))
    opened = "<think>hm</think>" if name == "reasoning_accuracy_reward" else ""
    assert scores(converted(name), [opened + text for text in texts], solutions) == expected


def test_format():
    texts, expected = map(list, zip(*FORMATS, strict=True))
    assert scores(converted("think_format_reward"), texts) == expected


def test_overlong():
    lengths, expected = map(list, zip(*OVERLONG, strict=True))
    reward = converted("get_soft_overlong_punishment")
    assert scores(reward, ["a"] * 6, completion_ids=[[0] * n for n in lengths]) == expected


def test_cosine():
    reward = CosineLength(reward=MathMatch(answer="solution"), max_completion_length=100)
    ids = [[0] * length for length, *_ in COSINE]
    for column, text in ((1, r"\boxed{7}"), (2, r"\boxed{8}")):
        expected = [row[column] for row in COSINE]
        assert scores(reward, [text] * len(ids), completion_ids=ids) == pytest.approx(expected, abs=1e-6)


def test_repetition_where_tokens_are_words():
    texts = [" ".join(f"w{token}" for token in tokens) for tokens, *_ in REPETITION]
    assert scores(RepetitionPenalty(), texts) == pytest.approx([row[1] for row in REPETITION])
    assert scores(RepetitionPenalty(n=2), texts) == pytest.approx([row[2] for row in REPETITION])


def test_functions_with_trls_signatures_run_unchanged():
    logged = {}

    def accuracy_reward(completions, solution, log_extra=None, **kwargs):
        log_extra("solution", list(solution))
        logged.update(kwargs)
        return [None if s == "?" else float(c[0]["content"] == s) for c, s in zip(completions, solution, strict=True)]

    class Overlong:
        __name__ = "soft_overlong_punishment_reward"

        def __call__(self, completion_ids, **kwargs):
            return [-1.0 if len(ids) > 1 else 0.0 for ids in completion_ids]

    right, wrong, none = scores(FunctionReward(function=accuracy_reward), ["7", "8", "9"], ["7", "7", "?"])
    assert (right, wrong) == (1.0, 0.0)
    assert none != none
    assert {"prompts", "completion_ids", "trainer_state", "log_metric"} <= set(logged)
    assert FunctionReward(function=Overlong()).name == "soft_overlong_punishment_reward"
    assert scores(FunctionReward(function=Overlong()), ["a", "b"], completion_ids=[[0], [0, 0]]) == [0.0, -1.0]


def test_all_rewards_of_the_script_are_converted_to_exported_classes():
    assert set(REWARDS) == {
        "accuracy_reward",
        "reasoning_accuracy_reward",
        "think_format_reward",
        "get_soft_overlong_punishment",
    }
    assert {options["class_path"].rpartition(".")[2] for options, _ in REWARDS.values()} <= set(exported)


def test_the_figures_are_trls():
    trl = pytest.importorskip("trl.rewards", exc_type=ImportError)
    texts, solutions, expected = map(list, zip(*ANSWERS, strict=True))
    assert scores(FunctionReward(function=trl.accuracy_reward), texts, solutions) == expected
    reasoned = ["<think>hm</think>" + text for text in texts]
    assert scores(FunctionReward(function=trl.reasoning_accuracy_reward), reasoned, solutions) == expected
    texts, expected = map(list, zip(*FORMATS, strict=True))
    assert scores(FunctionReward(function=trl.think_format_reward), texts) == expected
    overlong = FunctionReward(function=trl.get_soft_overlong_punishment(1280, 256))
    ids = [[0] * length for length, _ in OVERLONG]
    assert scores(overlong, ["a"] * 6, completion_ids=ids) == [expected for _, expected in OVERLONG]
    cosine = FunctionReward(function=trl.get_cosine_scaled_reward(100))
    ids = [[0] * length for length, *_ in COSINE]
    for column, text in ((1, r"\boxed{7}"), (2, r"\boxed{8}")):
        figures = [row[column] for row in COSINE]
        assert scores(cosine, [text] * len(ids), completion_ids=ids) == pytest.approx(figures, abs=1e-6)
    ids = [tokens for tokens, *_ in REPETITION]
    for column, n in ((1, 3), (2, 2)):
        repetition = FunctionReward(function=trl.get_repetition_penalty_reward(ngram_size=n))
        figures = [row[column] for row in REPETITION]
        assert scores(repetition, ["a"] * len(ids), completion_ids=ids) == pytest.approx(figures)
