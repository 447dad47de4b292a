"""The command ``lightning-grpo``: what each subcommand needs is imported only once it is named."""

import os
import sys

from lightning_grpo.errors import ReportedError


def main(args: list[str] | None = None) -> None:
    """Run the command line ``args``; those of the process where None.

    A `ReportedError` ends as its message and exit status 1; LIGHTNING_GRPO_TRACEBACK=1 shows where it
    came from.
    """
    given = sys.argv[1:] if args is None else args
    # classes in a file of the folder where the command is run are found by ``file.Class``, as under ``python -m``
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        if given[:1] == ["configure"]:
            from lightning_grpo.configure import command as configure

            raise SystemExit(configure.main(given[1:]))
        from lightning_grpo import commands

        commands.run(args)
    except Exception as error:
        message = own_message(error)
        if message is None or os.environ.get("LIGHTNING_GRPO_TRACEBACK"):
            raise
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(1) from error


def own_message(error: BaseException | None) -> str | None:
    """The message of a `ReportedError`, or of the one that caused ``error``; None where the error is a bug."""
    while error is not None:
        if isinstance(error, ReportedError):
            notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
            return f"{error}{notes}"
        error = error.__cause__
    return None
