"""The penalty on repeated n-grams, against hand-counted ones."""

import pytest

from lightning_grpo.errors import ReportedError
from lightning_grpo.rewards import RepetitionPenalty


@pytest.mark.parametrize(
    ("n", "text", "penalty"),
    [
        (1, "a b c", 0.0),
        (1, "a A a a", -0.75),
        (2, "a b a b a", -0.5),
        (3, "a b c a b c a b c", -4 / 7),
        (3, "a b", 0.0),
        (3, "", 0.0),
        (2, "\n a \u3000 b \t", 0.0),
    ],
)
def test_the_share_of_repeated_ngrams(n, text, penalty):
    plain, chat = text, [{"role": "assistant", "content": text}]
    assert RepetitionPenalty(n=n)(completions=[plain, chat]) == [pytest.approx(penalty)] * 2


@pytest.mark.parametrize("n", [0, -1, 1.5, "3"])
def test_n_is_a_count(n):
    with pytest.raises(ReportedError, match=r"RepetitionPenalty\.n is"):
        RepetitionPenalty(n=n)
