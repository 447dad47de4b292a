"""A reward that runs the program in a completion against tests."""

import ast
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from lightning_grpo.errors import UserError
from lightning_grpo.ranges import check_ranges
from lightning_grpo.rewards.sandbox.program import enforced_restrictions, run_program
from lightning_grpo.rewards.text_reward import TextReward

_FENCE = re.compile(r"^```[ \t]*(?:python|py|python3)?[ \t]*\n(.*?)^```", re.DOTALL | re.MULTILINE | re.IGNORECASE)
_MISSING = object()


def extract_code(text: str) -> str | None:
    """The last fenced block of Python in a completion; None if there is none."""
    blocks = _FENCE.findall(text)
    return blocks[-1] if blocks else None


class Close:
    """Equal to the numbers that ``math.isclose`` accepts with these arguments."""

    def __init__(self, value: float, **tolerances: float) -> None:
        self._value, self._tolerances = value, tolerances
        math.isclose(value, value, **tolerances)  # raises if these are no tolerances

    def __eq__(self, other: object) -> bool:
        return isinstance(other, int | float) and math.isclose(other, self._value, **self._tolerances)

    __hash__ = None  # type: ignore[assignment]


@lru_cache(maxsize=4096)
def read_assertion(test: str) -> tuple[str, Any]:
    """The expression that a test ``assert EXPRESSION == VALUE`` evaluates, and the value, a Python literal.

    ``assert EXPRESSION`` expects true, ``assert not EXPRESSION`` false, and ``assert math.isclose(EXPRESSION, VALUE)``
    a number that is `Close`.

    Raises:
        UserError: the test has another form, or the program could decide a comparison in it: the value that it returns
            may be equal to everything.
    """
    try:
        (statement,) = ast.parse(test.strip()).body
        if not isinstance(statement, ast.Assert):
            raise ValueError
        expression, value = _expected(statement.test)
        if isinstance(value, bool) and any(isinstance(n, ast.Compare | ast.BoolOp) for n in ast.walk(expression)):
            raise ValueError
        return ast.unparse(expression), value
    except (SyntaxError, ValueError, TypeError) as error:
        raise UserError(
            f"the test {test[:80]!r} is not of the form 'assert EXPRESSION == VALUE' with a literal VALUE; its value "
            "is compared outside of the program, so that the program can't forge it: rewrite or drop this test"
        ) from error


def _expected(condition: ast.expr) -> tuple[ast.expr, Any]:
    """What the program evaluates of a condition, and the value with which the condition holds."""
    if isinstance(condition, ast.Compare):
        (operator,), (right,) = condition.ops, condition.comparators
        if not isinstance(operator, ast.Eq | ast.Is):
            raise ValueError
        return condition.left, ast.literal_eval(right)
    if isinstance(condition, ast.Call) and ast.unparse(condition.func) in ("math.isclose", "isclose"):
        left, right = condition.args
        tolerances = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in condition.keywords}
        return left, Close(ast.literal_eval(right), **tolerances)
    negated = isinstance(condition, ast.UnaryOp) and isinstance(condition.op, ast.Not)
    operand = condition.operand if negated else condition  # type: ignore[attr-defined]
    return ast.Call(ast.Name("bool"), [operand], []), not negated


@dataclass(kw_only=True, eq=False)
class CodeTests(TextReward):
    """The share of tests, from 0 to 1, that the program in the completion passes; 0 without a program.

    The program is the last fenced block of Python. Each row has a list of tests: ``assert f(2) == 4`` (as in MBPP,
    arXiv:2108.07732), or ``{"input": stdin, "output": stdout}`` (as in APPS, arXiv:2105.09938). A program never sees
    the expected values: it can pass only by computing them. It runs in a process of its own, with the standard library,
    an empty folder and limited time and memory; Linux seccomp and Landlock refuse it other processes, signals, the
    network and other files.
    """

    tests: str = "tests"
    """Column with the list of tests."""
    all_or_nothing: bool = False
    """1 only if all tests pass, else 0."""
    program_seconds: float = 4.0
    """Limit on the time of the program, over all its tests."""
    memory_mb: int = 512
    """Limit on the program's address space."""
    allow_unsandboxed: bool = False
    """Run programs even if this system has neither seccomp nor Landlock, so that they have all rights of the worker."""

    def __post_init__(self) -> None:
        super().__post_init__()
        ranges = {"program_seconds": "(0, inf)", "memory_mb": "[64, inf)"}
        check_ranges(self, ranges, prefix="CodeTests.")
        if not self.sandbox:
            raise UserError("CodeTests.sandbox is False; programs of a model run only in worker processes: remove it")
        if self.seconds <= self.program_seconds:
            raise UserError(
                f"CodeTests.seconds is {self.seconds:g}; set more than program_seconds = {self.program_seconds:g}"
            )

    def _require_sandbox(self) -> None:
        if not self.allow_unsandboxed and not any(enforced_restrictions().values()):
            raise UserError(
                "CodeTests runs programs that a model wrote, and this system has neither seccomp (x86-64 Linux) nor "
                "Landlock (Linux 5.13) to restrict them; use another system, or set CodeTests.allow_unsandboxed to "
                "true if this one has nothing to protect, such as a disposable container"
            )

    def __call__(self, **arguments: Any) -> list[float | None]:
        self._require_sandbox()
        return super().__call__(**arguments)

    def check(self, columns: Sequence[Mapping[str, Any]]) -> None:
        self._require_sandbox()
        for row, values in enumerate(columns):
            tests = values.get(self.tests)
            if not isinstance(tests, list) or not tests:
                raise UserError(
                    f"CodeTests.tests is {self.tests!r}, which is {tests!r:.80} in row {row}; set it to a column with "
                    f"a list of tests, one of {', '.join(values) or '(none)'}"
                )
            for test in tests:
                if isinstance(test, str):
                    read_assertion(test)
                elif not (isinstance(test, Mapping) and all(isinstance(test.get(k), str) for k in ("input", "output"))):
                    raise UserError(
                        f"CodeTests: row {row} has the test {test!r:.80}; set 'assert EXPRESSION == VALUE', or "
                        '{"input": ..., "output": ...} with texts'
                    )

    def score(self, text: str, row: Mapping[str, Any]) -> float:
        code = extract_code(text)
        if code is None:
            return 0.0
        deadline = time.monotonic() + self.program_seconds
        tests = row[self.tests]
        assertions = [read_assertion(test) for test in tests if isinstance(test, str)]
        passed = 0
        if assertions:
            output = self._run(code, deadline, expressions=[expression for expression, _ in assertions])
            values = _values(output, len(assertions))
            passed = sum(_equal(value, expected) for value, (_, expected) in zip(values, assertions, strict=True))
        for test in tests:
            if isinstance(test, Mapping):
                output = self._run(code, deadline, stdin=test["input"])
                passed += _lines(output.decode(errors="replace")) == _lines(test["output"])
        return float(passed == len(tests)) if self.all_or_nothing else passed / len(tests)

    def _run(self, code: str, deadline: float, **given: Any) -> bytes:
        """The output of a program, empty if it is killed."""
        return run_program(code, **given, seconds=deadline - time.monotonic(), memory_mb=self.memory_mb)


def _values(output: bytes, count: int) -> list[Any]:
    """The values of a program's expressions; `_MISSING` for each that raised, or that it did not reach."""
    values = []
    for line in output.splitlines()[:count]:
        try:
            values.append(ast.literal_eval(json.loads(line)["value"]))
        except (ValueError, SyntaxError, KeyError, TypeError, MemoryError, RecursionError):
            values.append(_MISSING)
    return values + [_MISSING] * (count - len(values))


def _equal(value: Any, expected: Any) -> bool:
    return value is not _MISSING and value == expected


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]
