"""``--help`` lists the options of the trainer that most runs set, and ``--trainer.help`` lists all of them."""

import argparse
import re
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from lightning_grpo.cli.parser_errors import OneLineParser

COMMON = (
    *("accelerator", "devices", "num_nodes", "strategy", "precision", "default_root_dir", "logger", "callbacks"),
    *("max_steps", "max_epochs", "max_time", "accumulate_grad_batches", "gradient_clip_val"),
    *("limit_val_batches", "val_check_interval", "check_val_every_n_epoch"),
)


class ShortHelpParser(OneLineParser):
    """A parser whose help omits rare options of the trainer, and the environment variables, since their names follow
    from the options."""

    def format_help(self) -> str:  # type: ignore[override]  # no caller passes a formatter
        """Return the help text."""
        rare = [
            (action, action.help)
            for action in self._actions
            if action.dest.startswith("trainer.") and action.dest.removeprefix("trainer.") not in COMMON
        ]
        for action, _ in rare:
            action.help = argparse.SUPPRESS
        try:
            return without_variables(super().format_help())
        finally:
            # restored, since jsonargparse omits options without help from config.yaml
            for action, text in rare:
                action.help = text


def without_variables(text: str) -> str:
    """The help text of jsonargparse without its ENV lines."""
    return re.sub(r"^  ENV: .*\n", "", text, flags=re.MULTILINE).replace("  ARG:   ", "  ")


class TrainerHelp(argparse.Action):
    """Print the help of all options of the trainer."""

    def __init__(self, option_strings: list[str], **kwargs: Any) -> None:
        super().__init__(
            option_strings,
            dest=argparse.SUPPRESS,
            default=argparse.SUPPRESS,
            nargs=0,
            help="Show all trainer options and exit.",
        )

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        """Print the help and exit."""
        formatter = parser._get_formatter()
        formatter.start_section("trainer options")
        formatter.add_arguments(action for action in parser._actions if action.dest.startswith("trainer."))
        formatter.end_section()
        print(without_variables(formatter.format_help()))
        parser.exit(0)


def add_short_help(parser: LightningArgumentParser) -> None:
    """Add ``--trainer.help``, and shorten the usage line."""
    parser.usage = "%(prog)s [--config FILE] [--OPTION VALUE ...]"
    parser.add_argument("--trainer.help", action=TrainerHelp)
