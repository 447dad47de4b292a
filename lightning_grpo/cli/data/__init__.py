"""``lightning-grpo data``: look at prompts before a run."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    """The options."""
    out = argparse.ArgumentParser(
        prog="lightning-grpo data", description="Look at prompts before training on them.", allow_abbrev=False
    )
    commands = out.add_subparsers(dest="command", required=True, metavar="{inspect,pass-rate}")
    inspect = commands.add_parser(
        "inspect",
        allow_abbrev=False,
        usage="%(prog)s FILE|CONFIG [--model NAME] [--rows N] [--OPTION VALUE ...]",
        help="print rows as rendered, token lengths, and problems",
        description="Print prompts as the model receives them, their lengths in tokens, duplicates, what the rewards "
        "reject, and what is probably a mistake. Needs no GPU and loads no weights. The exit code is 1 if a row can't "
        "be used.",
        epilog="Example: lightning-grpo data inspect train.jsonl --model Qwen/Qwen2.5-0.5B-Instruct --data.chat true",
    )
    inspect.add_argument(
        "source",
        metavar="FILE|CONFIG",
        help="a configuration of fit (.yaml), or prompts as in data.source: a file, a pattern, a hub name, …",
    )
    inspect.add_argument("--model", metavar="NAME", help="folder or hub name of the model, unless CONFIG sets it")
    inspect.add_argument("--rows", type=_count, default=3, help="number of rows to print (default: 3)")
    rate = commands.add_parser(
        "pass-rate",
        allow_abbrev=False,
        usage="%(prog)s CONFIG [--samples K] [--rows N] [--out FILE] [--OPTION VALUE ...]",
        help="sample completions per prompt, write the pass rate of each, and report whether GRPO can learn from them",
        description="Sample K completions of training prompts with the current model, write each prompt with its pass "
        "rate, and report whether GRPO can learn from them: the share of groups whose rewards are expected to differ, "
        "for several group sizes.",
        epilog="Example: lightning-grpo data pass-rate my_run.yaml --samples 16 --rows 200",
    )
    rate.add_argument("source", metavar="CONFIG", help="a configuration of fit (.yaml)")
    rate.add_argument("--samples", type=_count, default=16, help="completions per prompt (default: 16)")
    rate.add_argument(
        "--rows", type=_count, default=200, help="number of training prompts, drawn at random (default: 200)"
    )
    rate.add_argument(
        "--out", type=Path, help="file to write, .jsonl or .parquet (default: pass_rates.jsonl beside the logs)"
    )
    for command in (inspect, rate):
        command.add_argument_group(
            "further options", "any option of fit, such as --data.chat true; lightning-grpo fit --help lists them"
        )
    return out


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count; set 1 or more")
    return value


def main(argv: Sequence[str]) -> None:
    """Run the command."""
    options, others = parser().parse_known_args(argv)
    # after the options are read: torch and transformers take seconds to import
    from lightning_grpo.cli.commands import run
    from lightning_grpo.errors import UserError

    is_config = Path(options.source).suffix in (".yaml", ".yml")
    if is_config and not Path(options.source).is_file():
        raise UserError(f"{options.source} is not a file; name a configuration of fit")
    args = ["predict", "--config", options.source] if is_config else ["predict", "--data.source", options.source]
    if options.command == "inspect":
        from lightning_grpo.cli.data.inspection import InspectCommand

        if not is_config and not options.model and not any(other.startswith("--model.model") for other in others):
            raise UserError(
                f"{options.source} is rendered and encoded for a model; set --model to its folder or hub name"
            )
        if options.model:
            args += ["--model.model", options.model]
        has_rewards = is_config or any(other.startswith("--model.rewards") for other in others)
        if not has_rewards:
            args += ["--model.rewards", "[lightning_grpo.rewards.ExactMatch]"]  # required, and not used
        InspectCommand.rows, InspectCommand.has_rewards = options.rows, has_rewards
        run(args + others, InspectCommand)
    else:
        from lightning_grpo.cli.data.pass_rate import PassRateCommand, check_file

        if not is_config:
            raise UserError(f"{options.source} is not a configuration of fit (.yaml), which pass-rate needs to sample")
        check_file(options.out)
        PassRateCommand.options = options
        run([*args, *others, "--model.validation_generations", str(options.samples)], PassRateCommand)
