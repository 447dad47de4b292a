"""The command ``lightning-grpo``. It imports only what the given subcommand needs."""

import errno
import os
import shlex
import sys

from lightning_grpo.errors import ReportedError
from lightning_grpo.stopping import Stopped, end_children, is_first_rank, name_of, stop_on_signals

ENVIRONMENT = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO}
"""Errors of the operating system, such as a full disk."""
PATIENCE = 20.0
"""Seconds that child processes have to end after a stop."""

HELP = """usage: lightning-grpo SUBCOMMAND ...

Group Relative Policy Optimization of language models.

  fit         train a policy
  validate    sample held-out prompts and report their rewards
  test        the same, for the final evaluation
  predict     sample completions and write them to a file
  export      write the policy of a checkpoint as a Hugging Face model or a PEFT adapter
  diagnose    check the metrics of a run, and print what is wrong and what to set
  report      write one HTML file about runs: metrics, findings, samples, and how runs compare
  convert-trl print the configuration of a TRL run as one for fit
  data        look at prompts as rendered, and measure how often the model solves them
  configure   choose hyperparameters for a task, a model and a GPU; predict memory, time and cost

  lightning-grpo fit --config configs/smoke.yaml       train a tiny model for half a minute
  lightning-grpo SUBCOMMAND --help                     list the options of a subcommand
  lightning-grpo fit --model.help                      list the options of the model; also --data.help

Every option can be set in a YAML file (--config), on the command line, and in the environment
(LIGHTNING_GRPO_FIT__TRAINER__MAX_STEPS)."""


def main(args: list[str] | None = None) -> None:
    """Run the command line ``args``, by default that of the process.

    A `ReportedError` is printed as its message, and the exit code is 1; LIGHTNING_GRPO_TRACEBACK=1 shows the traceback.
    After Ctrl-C and SIGTERM the exit codes are 130 and 143.
    """
    given = sys.argv[1:] if args is None else args
    # as under ``python -m``, classes in files of the current folder are found by ``file.Class``
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
        # if another rank ended with an error, Lightning would kill the first one
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
    if args[:1] == ["convert-trl"]:
        from lightning_grpo.cli import convert

        return convert.main(args[1:])
    if args[:1] == ["export"]:
        from lightning_grpo.cli import export

        return export.main(args[1:])
    if args[:1] == ["data"]:
        from lightning_grpo.cli.data import main as look_at_data

        return look_at_data(args[1:])
    if args[:1] == ["report"]:
        from lightning_grpo.report import command as report

        return report.main(args[1:])
    if args[:1] == ["diagnose"]:
        from lightning_grpo.diagnosis import command as diagnosis

        raise SystemExit(diagnosis.main(args[1:]))
    from lightning_grpo.cli import commands

    commands.run(args)


def own_message(error: BaseException | None) -> str | None:
    """The message of a `ReportedError` or of an error of the operating system. None for any other error, a bug."""
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
    """Lines to print after a signal ended the run: its progress, its checkpoint, and the command that resumes it."""
    name = name_of(stop.signum)
    if stop.progress is None:
        return [f"stopped by {name} before training began: nothing was changed"]
    if stop.saved is None:
        reason = f": {own_message(stop.failure) or repr(stop.failure)}" if stop.failure else ""
        return [f"stopped by {name} after {stop.progress}, without a checkpoint{reason}"]
    return [
        f"stopped by {name} after {stop.progress}; checkpoint: {stop.saved}",
        f"resume with: {resuming_command(args)}",
    ]


def resuming_command(args: list[str]) -> str:
    """The command line that resumes the newest checkpoint of the run that ``args`` started."""
    kept: list[str] = []
    skip = False
    for arg in args:
        if skip or arg.startswith("--ckpt_path"):
            skip = arg == "--ckpt_path"
            continue
        kept.append(arg)
    return shlex.join(["lightning-grpo", *kept, "--ckpt_path", "last"])


def _is_launched() -> bool:
    """Whether Lightning started this process as another rank of the command line's process."""
    return os.environ.get("LOCAL_RANK", "0") != "0" and "TORCHELASTIC_RUN_ID" not in os.environ
