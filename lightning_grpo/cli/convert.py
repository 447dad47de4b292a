"""``lightning-grpo convert-trl``: the configuration of a TRL run as one of ours, with a comment on each difference."""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_grpo.cli.trl import data, learning, policy, run
from lightning_grpo.cli.trl.commented import comment, lines
from lightning_grpo.cli.trl.conversion import Conversion
from lightning_grpo.cli.trl.given import check_types, read, unknown
from lightning_grpo.cli.trl.options import ROWS
from lightning_grpo.errors import UserError

PARTS = (
    run.trainer,
    policy.model,
    run.batches,
    policy.sampling,
    learning.objective,
    learning.optimizer,
    data.prompts,
    data.environment,
    data.rewards,
    data.evaluation,
    policy.rollout,
    run.checkpoint,
)
"""Parts of the configuration, in its order."""
SEPARATE = ("trainer.strategy", "ckpt_path", "export.best", "rollout.max_num_seqs", "trainer.deterministic")
"""Options that the conversion does not set."""


def convert(given: Mapping[str, Any], *, devices: int | None = None) -> Conversion:
    """Convert the options of a TRL run; see `Conversion`.

    Raises:
        UserError: a value of the wrong type, or a combination of options that can't be trained.
    """
    check_types(given)
    conversion = Conversion(given, devices=devices)
    for part in PARTS:
        part(conversion)
    for name, value in given.items():
        row = ROWS.get(name)
        if row is None or value == row.default or (row.ours and row.ours not in SEPARATE):
            continue
        what = f"is not converted; set {row.ours}" if row.ours else "has no equivalent option"
        shown = json.dumps(value, default=str)
        conversion.remarks.append(f"{name}: {shown} {what}{f' ({row.note})' if row.note else ''}")
    return conversion


def render(conversion: Conversion, head: Sequence[str]) -> str:
    """The configuration as YAML, below a comment with the lines of ``head`` and what it can't contain."""
    comments = [line for text in (*head, *conversion.remarks) for line in comment(text)]
    return "\n".join([*comments, *lines(conversion.config)]) + "\n"


def parser() -> argparse.ArgumentParser:
    """The options."""
    out = argparse.ArgumentParser(
        prog="lightning-grpo convert-trl",
        description="Print the configuration of a TRL run as one of lightning-grpo. A comment stands at each option "
        "that has another meaning or another default, and at the top what has no equivalent.",
        epilog="Example: lightning-grpo convert-trl grpo.yaml > my_run.yaml && lightning-grpo fit --config my_run.yaml",
    )
    out.add_argument(
        "file", metavar="FILE", help="a YAML file for `trl grpo`, or the keyword arguments of a GRPOConfig in JSON"
    )
    out.add_argument("--devices", type=int, metavar="N", help="GPUs of the run (default: num_processes in FILE, or 1)")
    return out


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    arguments = parser().parse_args(argv)
    if arguments.devices is not None and arguments.devices < 1:
        raise UserError(f"--devices is {arguments.devices}; set 1 or more")
    given = read(arguments.file)
    problems = list(unknown(list(given)))
    conversion = convert(given, devices=arguments.devices)
    print(render(conversion, [f"Converted from {arguments.file} by lightning-grpo convert-trl", *problems]), end="")
    for problem in problems:
        print(f"{arguments.file}: {problem}", file=sys.stderr)
