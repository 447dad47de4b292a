"""``lightning-grpo configure``: a plan on the command line."""

import argparse
import contextlib
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from lightning_grpo.configure.overrides import OVERRIDABLE
from lightning_grpo.configure.recommendations import TASKS
from lightning_grpo.devices import GPUS, GiB
from lightning_grpo.errors import UserError


def parser() -> argparse.ArgumentParser:
    """Return the parser of all options."""
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
    add("--revision", help="branch, tag or commit of the model on the hub (default: the main branch)")
    add(
        "--gpu",
        default=None,
        help=f"{', '.join(GPUS)}, cpu, or gigabytes of memory such as 24 (default: the device of this machine)",
    )
    add("--num_gpus", type=int, default=1, help="number of devices, with one rank on each (default: 1)")
    add("--lora", action="store_true", help="train adapters instead of all weights (default: off)")
    add(
        "--prompts",
        metavar="SOURCE",
        help=".jsonl, .json, .csv, .parquet or .arrow file, or another data set as for data.source, with a column "
        "prompt; the plan takes its lengths into account, and its pass rates if it has a column pass_rate (default: "
        "none)",
    )
    add(
        "--columns",
        action="append",
        default=[],
        metavar="NAME=COLUMN",
        help="column of the prompts to use as NAME, as data.columns (for example prompt=question); can be repeated",
    )
    add(
        "--reward",
        help="class in lightning_grpo.rewards, or dotted path of your own function (default: the task's)",
    )
    add(
        "--budget_hours",
        type=float,
        metavar="HOURS",
        help="wall-clock hours, which determine the number of steps (default: 200 optimizer steps)",
    )
    add(
        "--preset",
        default="recommended",
        help="recommended, or baseline for the fixed values of the baseline presets (default: recommended)",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="OPTION=VALUE",
        dest="overrides",
        help=f"fix an option and plan the rest around it; can be repeated. Options: {', '.join(OVERRIDABLE)}",
    )
    add("--explain", action="store_true", help="print a table of choices, memory and time instead of the YAML")
    add("--plot", metavar="FILE", help="also plot memory and time as FILE.png and FILE.svg")
    add(
        "--measure",
        action="store_true",
        help="run two steps with the planned shapes on this machine, and use the measurements in this and later "
        "plans (default: off)",
    )
    add(
        "--calibration",
        metavar="FILE",
        help="file with measurements (default: lightning_grpo/calibration.json in the user's cache folder)",
    )
    return out


def parse_overrides(texts: Sequence[str]) -> dict[str, Any]:
    """``["beta=0.05"]`` to ``{"beta": 0.05}``.

    Raises:
        UserError: there is no equals sign, or an option has two values.
    """
    overrides: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not value.strip():
            raise UserError(f"--set {text}: write OPTION=VALUE, for example --set num_generations=16")
        try:
            parsed = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise UserError(
                f"--set {text}: {value!r} is not a plain value; write a number, true, false or a name"
            ) from error
        if isinstance(parsed, str):
            # YAML 1.1 reads 1e-5 as text
            with contextlib.suppress(ValueError):
                parsed = float(parsed)
        if name in overrides and overrides[name] != parsed:
            raise UserError(f"--set {name} is given twice, as {overrides[name]} and {parsed}; remove one")
        overrides[name] = parsed
    return overrides


def parse_columns(texts: Sequence[str]) -> dict[str, str]:
    """``["prompt=question"]`` to ``{"prompt": "question"}``.

    Raises:
        UserError: a name or a column is missing.
    """
    pairs = [text.partition("=") for text in texts]
    for text, (name, _, column) in zip(texts, pairs, strict=True):
        if not name or not column:
            raise UserError(f"--columns {text}: write NAME=COLUMN, for example --columns prompt=question")
    return {name: column for name, _, column in pairs}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status: 0, or 2 if the input is wrong or no plan fits."""
    arguments = parser().parse_args(argv)
    # torch and transformers take seconds to import, so --help does without them
    from lightning_grpo.configure import calibration
    from lightning_grpo.configure.planner import plan
    from lightning_grpo.configure.render import table, to_yaml

    file = Path(arguments.calibration) if arguments.calibration else None
    try:
        choose = partial(
            plan,
            task=arguments.task,
            model=arguments.model,
            revision=arguments.revision,
            gpu=arguments.gpu,
            num_gpus=arguments.num_gpus,
            lora=arguments.lora,
            prompts=arguments.prompts,
            columns=parse_columns(arguments.columns),
            reward=arguments.reward,
            budget_hours=arguments.budget_hours,
            overrides=parse_overrides(arguments.overrides),
            preset=arguments.preset,
            calibration=file,
        )
        chosen = choose()
        if arguments.measure:
            efficiency, measured = calibration.measure(chosen.workload, chosen.hardware)
            saved = calibration.save(chosen.workload, chosen.hardware, efficiency, file)
            print(
                f"measured: {measured.micro_batch_seconds:.3f} s per micro-batch, {measured.optimizer_seconds:.3f} s "
                f"per optimizer step, peak {measured.peak_bytes / GiB:.2f} GiB in the update; saved in {saved}",
                file=sys.stderr,
            )
            chosen = choose()
        if arguments.plot:
            from lightning_grpo.configure.plot import draw

            files = draw(chosen, Path(arguments.plot))
            print(f"plotted: {', '.join(map(str, files))}", file=sys.stderr)
    except ValueError as error:
        print(f"lightning-grpo configure: {error}", file=sys.stderr)
        return 2
    sys.stdout.write(table(chosen) if arguments.explain else to_yaml(chosen))
    return 0
