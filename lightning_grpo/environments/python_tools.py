"""Tools that evaluate what the policy wrote, in the worker processes of the sandbox."""

import ast
import operator
from collections.abc import Callable
from typing import Any

from lightning_grpo.rewards.sandbox.pool import Failure, shared_pool
from lightning_grpo.rewards.sandbox.program import run_program

SECONDS = 5.0
"""Limit on the time of a program or an expression."""
_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_UNARY: dict[type, Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


def calculate(expression: str) -> str:
    """Calculate the value of an arithmetic expression.

    Args:
        expression: numbers, parentheses and the operators + - * / // % **

    Returns:
        The value.
    """
    return _in_worker(evaluate, expression)


def run_python(code: str) -> str:
    """Run a Python program.

    Args:
        code: the program, which prints its results

    Returns:
        What the program printed.
    """
    return _in_worker(_output, code)


def evaluate(expression: str) -> str:
    """The value of an arithmetic expression, as text.

    Raises:
        ValueError: the expression has anything else than numbers, parentheses and operators.
    """
    text = expression.replace("×", "*").replace("÷", "/").replace("−", "-").replace("^", "**")
    return str(_value(ast.parse(text.strip(), mode="eval").body))


def _value(node: ast.AST) -> int | float:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return value
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return _BINARY[type(op)](_value(left), _value(right))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
            return _UNARY[type(op)](_value(operand))
    raise ValueError("only numbers, parentheses and the operators + - * / // % ** are allowed")


def _output(code: str) -> str:
    program = (
        f"try:\n    exec(compile({code!r}, '<program>', 'exec'), {{'__name__': '__main__'}})\n"
        "except Exception as error:\n    print(f'{type(error).__name__}: {error}')\n"
    )
    return run_program(program, seconds=SECONDS).decode(errors="replace")


def _in_worker(function: Callable[[str], str], text: str) -> str:
    [value] = shared_pool().map(function, [(text,)], SECONDS + 1)
    if isinstance(value, Failure):
        raise ValueError(value.reason)
    return value
