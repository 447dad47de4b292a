"""``lightning-grpo configure``: a plan on the command line."""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from lightning_grpo.configure.devices import GPUS, GiB
from lightning_grpo.configure.overrides import PINNABLE
from lightning_grpo.configure.recommendations import TASKS
from lightning_grpo.errors import UserError


def parser() -> argparse.ArgumentParser:
    """Of all options, with units and defaults."""
    tasks = "; ".join(f"{name}: {task.about}" for name, task in TASKS.items())
    out = argparse.ArgumentParser(
        prog="lightning-grpo configure",
        description="Choose the hyperparameters of a run for a task, a model and a device; predict memory, time and "
        "cost. Writes a complete configuration for lightning-grpo fit to standard output.",
        epilog="Example: lightning-grpo configure --task math_reasoning --model Qwen/Qwen2.5-1.5B-Instruct --gpu h100 "
        "> my_run.yaml && lightning-grpo fit --config my_run.yaml",
    )
    add = out.add_argument
    add("--task", required=True, metavar="TASK", help=tasks)
    add("--model", required=True, help="folder or hub name; only its config is read")
    add(
        "--gpu",
        default=None,
        help=f"{', '.join(GPUS)}, cpu, or gigabytes of memory such as 24 (default: what is in this machine)",
    )
    add("--num_gpus", type=int, default=1, help="devices, one rank on each (default: 1)")
    add("--lora", action="store_true", help="train adapters instead of the whole weights (default: off)")
    add(
        "--prompts",
        metavar="FILE",
        help=".jsonl or .parquet with a column prompt; its lengths are taken into account, "
        "and its pass rates where it has a column pass_rate (default: none)",
    )
    add("--reward", help="class of lightning_grpo.rewards, or dotted path of your own function (default: the task's)")
    add(
        "--budget_hours",
        type=float,
        metavar="HOURS",
        help="hours on the clock; decides the number of steps (default: 200 optimizer steps)",
    )
    add("--preset", default="evidence", help="evidence, or baseline for the fixed baseline values (default: evidence)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        dest="pins",
        help=f"fix an option and plan the rest around it; may be repeated. Options: {', '.join(PINNABLE)}",
    )
    add("--explain", action="store_true", help="print a table of choices, memory and time instead of the YAML")
    add("--plot", metavar="FILE", help="also draw memory and time into FILE.png and FILE.svg")
    add(
        "--measure",
        action="store_true",
        help="run two real steps with the planned shapes on this machine, and use "
        "what they show in this plan and the next ones (default: off)",
    )
    add(
        "--calibration",
        metavar="FILE",
        help="where measurements are kept (default: lightning_grpo/calibration.json in the user's cache folder)",
    )
    return out


def parse_pins(texts: Sequence[str]) -> dict[str, Any]:
    """``["beta=0.05"]`` to ``{"beta": 0.05}``.

    Raises:
        ValueError: no equals sign, or two values for one option.
    """
    pins: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not value.strip():
            raise UserError(f"--set {text}: write OPTION=VALUE, for example --set num_generations=16")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(
                f"--set {text}: {value!r} is no plain value; write a number, true, false or a name"
            ) from error
        if isinstance(parsed, str):
            # YAML 1.1 takes 1e-5 for text.
            with contextlib.suppress(ValueError):
                parsed = float(parsed)
        if name in pins and pins[name] != parsed:
            raise UserError(f"--set {name} is given twice, as {pins[name]} and {parsed}; leave one out")
        pins[name] = parsed
    return pins


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; the exit status is 0, or 2 where the input is wrong or nothing fits."""
    arguments = parser().parse_args(argv)
    # after the options are read: torch and transformers take seconds to import
    from lightning_grpo.configure import calibration
    from lightning_grpo.configure.planner import plan
    from lightning_grpo.configure.render import draw, table, to_yaml

    file = Path(arguments.calibration) if arguments.calibration else None
    try:
        choose = partial(
            plan,
            task=arguments.task,
            model=arguments.model,
            gpu=arguments.gpu,
            num_gpus=arguments.num_gpus,
            lora=arguments.lora,
            prompts=arguments.prompts,
            reward=arguments.reward,
            budget_hours=arguments.budget_hours,
            pins=parse_pins(arguments.pins),
            preset=arguments.preset,
            calibration=file,
        )
        made = choose()
        if arguments.measure:
            efficiency, measured = calibration.measure(made.workload, made.hardware)
            where = calibration.save(made.workload, made.hardware, efficiency, file)
            print(
                f"measured: {measured.micro_batch_seconds:.3f} s a micro-batch, {measured.optimizer_seconds:.3f} s an "
                f"optimizer step, peak {measured.peak_bytes / GiB:.2f} GiB in the update; kept in {where}",
                file=sys.stderr,
            )
            made = choose()
        if arguments.plot:
            files = draw(made, Path(arguments.plot))
            print(f"drawn: {', '.join(map(str, files))}", file=sys.stderr)
    except ValueError as error:
        print(f"lightning-grpo configure: {error}", file=sys.stderr)
        return 2
    sys.stdout.write(table(made) if arguments.explain else to_yaml(made))
    return 0
