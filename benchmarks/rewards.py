"""Rewards in worker processes: scorings per second, and what a hostile completion costs.

- Ordinary answers per second of `MathMatch`, in groups of 8 with other numbers in each call; expressions alone, which
  must be parsed; and the ordinary answers of an earlier call, as a policy repeats them. Ordinary programs per second of
  `CodeTests`, each in a process of its own with three tests. All cores.
- Scorings per second of a reward that does almost nothing, in this process and in workers, in batches of 8 and 512.
- Batches with one hostile completion: how long the batch takes beyond that completion's own limit, and after how long
  the last of the others was scored.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_grpo.rewards import CodeTests, ExactMatch, MathMatch, RegexFormat, TextReward
from lightning_grpo.rewards.sandbox.pool import shared_pool

GOALS = {"math": 2000.0, "programs": 50.0}
LIMIT, MAX_EXCESS, REPEATS = 2.0, 0.5, 3
# of ten answers in the MATH data set, about seven are a number, one is a fraction and two are expressions
ANSWERS = [
    *([(r"so $x = \boxed{%(n)d}$", "%(n)d")] * 5),
    (r"we obtain \boxed{%(grouped)s.5}", "%(n)d.5"),
    (r"which gives \boxed{%(n)d\%%}", r"%(n)d\%%"),
    (r"the answer is \boxed{\frac{%(n)d}{7}}.", "%(n)d/7"),
    (r"The solution is \boxed{(-\infty, %(n)d]}", r"(-\infty, %(n)d]"),
    (r"Therefore \boxed{x^2 + %(n)d}", "%(n)d+x^2"),
]
EXPRESSIONS = ANSWERS[-2:]
GENERATIONS = 8
PROGRAM = """```python
def primes(n):
    sieve = [True] * (n + 1)
    for i in range(2, n + 1):
        if sieve[i]:
            sieve[i * i :: i] = [False] * len(sieve[i * i :: i])
    return [i for i in range(2, n + 1) if sieve[i]]
```"""
TESTS = ["assert primes(10) == [2, 3, 5, 7]", "assert primes(1) == []", "assert len(primes(1000)) == 168"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a fifth of the completions")
    parser.add_argument("--check", action="store_true", help="fail if a figure misses its goal")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    size = 1 if args.quick else 5
    figures = {f"{name} per second": measure() for name, measure in rates(size).items()}
    for name, measure in hostile(size).items():
        figures |= {f"{name}: {key}": value for key, value in measure().items()}
    for name, value in figures.items():
        print(f"{name:60} {value:10.2f}")
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1))
    missed = [name for name, goal in GOALS.items() if figures[f"{name} per second"] < goal]
    missed += [name for name, value in figures.items() if "beyond" in name and value > MAX_EXCESS]
    missed += [name for name, value in figures.items() if "others" in name and value > LIMIT]
    if args.check and missed:
        sys.exit(f"goals missed: {', '.join(missed)}")


def rates(size: int) -> dict[str, Callable[[], float]]:
    """What is measured in scorings per second."""
    programs = [PROGRAM] * 80 * size, {"tests": [TESTS] * 80 * size}
    small, large = ((["<a>4</a>"] * n, {"answer": ["4"] * n}) for n in (8, 512))
    here, workers = ExactMatch(extract="<a>(.*?)</a>"), ExactMatch(extract="<a>([0-9]*)</a>")
    return {
        "math": lambda: rate(MathMatch(), lambda call: answers(call, 100 * size), mean=0.5),
        "math, expressions alone": lambda: rate(
            MathMatch(), lambda call: answers(100 + call, 20 * size, EXPRESSIONS), mean=0.5
        ),
        "math, answers of an earlier call": lambda: rate(MathMatch(), lambda call: answers(0, 100 * size), mean=0.5),
        "programs": lambda: rate(CodeTests(), lambda call: programs),
        "trivial, in this process, batches of 8": lambda: rate(here, lambda call: small),
        "trivial, in workers, batches of 8": lambda: rate(workers, lambda call: small),
        "trivial, in this process, batches of 512": lambda: rate(here, lambda call: large),
        "trivial, in workers, batches of 512": lambda: rate(workers, lambda call: large),
    }


def answers(
    call: int, prompts: int, kinds: Sequence[tuple[str, str]] = ANSWERS
) -> tuple[list[str], dict[str, list[str]]]:
    """Groups of completions, of which every second one is correct, with other numbers in each group and call."""
    rows = [(prompt, sample) for prompt in range(prompts) for sample in range(GENERATIONS)]
    texts, right = zip(*(kinds[prompt % len(kinds)] for prompt, _ in rows), strict=True)
    numbers = [11 + call * prompts + prompt for prompt, _ in rows]
    given = [number + (sample % 2) * (10**4 + sample) for number, (_, sample) in zip(numbers, rows, strict=True)]
    return [written(*each) for each in zip(texts, given, strict=True)], {
        "answer": [written(*each) for each in zip(right, numbers, strict=True)]
    }


def written(text: str, number: int) -> str:
    """The text with the number, of which some answers separate the thousands."""
    return text % {"n": number, "grouped": f"{number:,}"}


def rate(reward: TextReward, batch: Callable[[int], tuple[list[str], dict[str, Any]]], mean: float = 1.0) -> float:
    """Completions per second, the median of several calls, after one that starts the workers."""
    rates = []
    for call in range(1 + REPEATS):
        completions, columns = batch(call)
        start = time.perf_counter()
        scores = reward(completions=completions, **columns)
        rates.append(len(completions) / (time.perf_counter() - start))
        assert statistics.mean(scores) == mean, statistics.mean(scores)
    return statistics.median(rates[1:])


def hostile(size: int) -> dict[str, Callable[[], dict[str, float]]]:
    """Batches with one hostile completion, the first one, whose limit is LIMIT seconds."""
    loop = "```python\nwhile True: pass\n```"
    blocked = "```python\nimport os, signal\nsignal.pthread_sigmask(0, range(1, 65))\nwhile True: open('a', 'w')\n```"
    tests = {"tests": TESTS}
    return {
        "endless loop": lambda: batch(CodeTests(program_seconds=LIMIT), loop, PROGRAM, tests, 30 * size),
        "blocked signals": lambda: batch(CodeTests(program_seconds=LIMIT), blocked, PROGRAM, tests, 30 * size),
        "backtracking": lambda: batch(RegexFormat(pattern="(a+)+", seconds=LIMIT), "a" * 40 + "!", "a", {}, 400 * size),
    }


def batch(reward: TextReward, first: str, other: str, row: dict[str, Any], count: int) -> dict[str, float]:
    """Score a batch without and with the hostile completion."""
    stamps = []
    for completions in ([other] * count, [first, *[other] * count]):
        start = time.monotonic()
        jobs = [(reward, text, row) for text in completions]
        ends = shared_pool().map(stamped, jobs, reward.seconds)
        stamps.append((time.monotonic() - start, max(end for _, end in ends[-count:]) - start))
    (_, alone), (whole, together) = stamps
    return {
        "seconds beyond its limit": whole - max(LIMIT, together),
        "seconds until the others are scored": together,
        "seconds until they are scored without it": alone,
    }


def stamped(reward: TextReward, text: str, row: dict[str, Any]) -> tuple[float | None, float]:
    """The score, and when it was computed."""
    return reward.score(text, row), time.monotonic()


if __name__ == "__main__":
    from rewards import main as main_of_module  # worker processes import this file under its own name

    main_of_module()
