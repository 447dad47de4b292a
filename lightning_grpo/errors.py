"""Errors with a message for the user. The command line prints it without a traceback; any other error is a bug."""


class ReportedError(Exception):
    """Base class: the message names the option or file, its value, why it fails, and what to set instead."""


class UserError(ReportedError, ValueError):
    """An option, a file or a row that can't be used."""


class RunError(ReportedError, RuntimeError):
    """A run that can't continue: the engine, a reward or the machine failed."""


class NonFiniteError(ReportedError, FloatingPointError):
    """A loss or gradient is NaN or infinite."""


class UnreachableError(ReportedError, ConnectionError):
    """A server that can't be reached, or was lost."""


class OutOfMemoryError(ReportedError, MemoryError):
    """An engine or a batch that doesn't fit into memory."""
