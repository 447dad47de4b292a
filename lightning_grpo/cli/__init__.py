"""The command ``lightning-grpo``: what each subcommand needs is imported only once it is named."""

import errno
import os
import shlex
import sys

from lightning_grpo.errors import ReportedError
from lightning_grpo.stopping import Stopped, end_children, is_first_rank, name_of, stop_on_signals

ENVIRONMENT = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO}
"""What the machine refuses, whatever a program does."""
PATIENCE = 20.0


HELP = """usage: lightning-grpo SUBCOMMAND ...

Group Relative Policy Optimization of language models.

  fit         train a policy
  validate    sample held-out prompts and report their rewards
  test        the same, for a final figure
  predict     sample completions and write them to a file
  export      write a checkpoint's policy as a Hugging Face model or a PEFT adapter
  configure   choose hyperparameters for a task, a model and a GPU; predict memory, time and cost

  lightning-grpo fit --config configs/smoke.yaml       a run of half a minute
  lightning-grpo SUBCOMMAND --help                     the options
  lightning-grpo fit --model.help                      those of the model; likewise --data.help

Every option can stand in a YAML file (--config), on the command line, and in the environment
(LIGHTNING_GRPO_FIT__TRAINER__MAX_STEPS)."""


def main(args: list[str] | None = None) -> None:
    """Run the command line ``args``; those of the process where None.

    A `ReportedError` ends as its message and exit status 1; LIGHTNING_GRPO_TRACEBACK=1 shows where it
    came from. Ctrl-C and SIGTERM end with 130 and 143.
    """
    given = sys.argv[1:] if args is None else args
    # classes in a file of the folder where the command is run are found by ``file.Class``, as under ``python -m``
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        with stop_on_signals():
            _run(given)
    except Stopped as stop:
        if is_first_rank():
            print("\n".join(farewell(stop, given)), file=sys.stderr)
        if args is None:
            end_children(PATIENCE)
        # a rank that ended with an error would have Lightning kill the first one
        raise SystemExit(0 if _is_launched() else stop.exit_code) from None
    except Exception as error:
        message = own_message(error)
        if message is None or os.environ.get("LIGHTNING_GRPO_TRACEBACK"):
            raise
        print(f"error: {message}", file=sys.stderr)
        raise SystemExit(1) from error


def _run(args: list[str]) -> None:
    if not args or args[0] in ("-h", "--help"):
        print(HELP)
        raise SystemExit(0 if args else 2)
    if args[:1] == ["configure"]:
        from lightning_grpo.configure import command as configure

        raise SystemExit(configure.main(args[1:]))
    if args[:1] == ["export"]:
        from lightning_grpo.cli import export

        return export.main(args[1:])
    from lightning_grpo.cli import commands

    commands.run(args)


def own_message(error: BaseException | None) -> str | None:
    """What to say of an error that is not a bug: a `ReportedError`, or what the machine refused. None for a bug."""
    while error is not None:
        if isinstance(error, ReportedError):
            notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
            return f"{error}{notes}"
        if isinstance(error, OSError) and error.errno in ENVIRONMENT:
            file = f"{error.filename}: " if error.filename else ""
            return f"{file}{os.strerror(error.errno)}; results are written under trainer.default_root_dir"
        error = error.__cause__
    return None


def farewell(stop: Stopped, args: list[str]) -> list[str]:
    """What to say when a signal ended the run: how far it got, where its checkpoint lies, how to go on."""
    name = name_of(stop.signum)
    if stop.progress is None:
        return [f"stopped by {name} before training began: nothing was changed"]
    if stop.saved is None:
        reason = f": {own_message(stop.failure) or repr(stop.failure)}" if stop.failure else ""
        return [f"stopped by {name} after {stop.progress}, without a checkpoint{reason}"]
    return [
        f"stopped by {name} after {stop.progress}; checkpoint: {stop.saved}",
        f"go on with: {resuming_command(args)}",
    ]


def resuming_command(args: list[str]) -> str:
    """The command line that goes on with the newest checkpoint of the run that ``args`` started."""
    kept: list[str] = []
    skip = False
    for arg in args:
        if skip or arg.startswith("--ckpt_path"):
            skip = arg == "--ckpt_path"
            continue
        kept.append(arg)
    return shlex.join(["lightning-grpo", *kept, "--ckpt_path", "last"])


def _is_launched() -> bool:
    """Whether this process is a further rank that Lightning started beside the one of the command line."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" not in os.environ
