"""``--help`` shows the trainer's options that most runs set; ``--trainer.help`` shows all of them."""

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
    """A parser whose help leaves out rare options of the trainer, and the environment variables, whose names follow
    from those of the options."""

    def format_help(self) -> str:  # type: ignore[override]  # no caller passes a formatter
        """The help as it is printed."""
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
            # options without help are left out of config.yaml too
            for action, text in rare:
                action.help = text


def without_variables(text: str) -> str:
    """jsonargparse's help without its ENV lines."""
    return re.sub(r"^  ENV: .*\n", "", text, flags=re.MULTILINE).replace("  ARG:   ", "  ")


class TrainerHelp(argparse.Action):
    """Prints the help of all options of the trainer."""

    def __init__(self, option_strings: list[str], **kwargs: Any) -> None:
        super().__init__(
            option_strings, dest=argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, help="Show all trainer options."
        )

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        """Print it and end."""
        formatter = parser._get_formatter()
        formatter.start_section("trainer options")
        formatter.add_arguments(action for action in parser._actions if action.dest.startswith("trainer."))
        formatter.end_section()
        print(without_variables(formatter.format_help()))
        parser.exit(0)


def add_short_help(parser: LightningArgumentParser) -> None:
    """Add ``--trainer.help``, and keep the list of all options out of the usage."""
    parser.usage = "%(prog)s [--config FILE] [--OPTION VALUE ...]"
    parser.add_argument("--trainer.help", action=TrainerHelp)
