"""Errors whose message is for the user. The command line prints it without a traceback; other errors are bugs."""

from importlib import import_module
from types import ModuleType


class ReportedError(Exception):
    """Base class: the message names the option or file, its value, why it fails, and what to set instead."""


class UserError(ReportedError, ValueError):
    """An option, a file or a row is invalid."""


class RunError(ReportedError, RuntimeError):
    """The run can't continue: the engine, a reward or the machine failed."""


class NonFiniteError(ReportedError, FloatingPointError):
    """A loss or gradient is NaN or infinite."""


class UnreachableError(ReportedError, ConnectionError):
    """A server can't be reached, or the connection was lost."""


class OutOfMemoryError(ReportedError, MemoryError):
    """An engine or a batch doesn't fit into memory."""


def optional(module: str, extra: str, feature: str) -> ModuleType:
    """Import a module of a package that only an extra of lightning-grpo installs.

    Raises:
        UserError: if it is not installed; the message names the extra.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{feature} needs {error.name}, which is not installed; run pip install 'lightning-grpo[{extra}]'"
        ) from error
