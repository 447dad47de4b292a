"""``lightning-grpo data inspect``: prompts as the model receives them, their lengths, and their problems."""

import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from lightning_grpo.cli.commands import GRPOCommand
from lightning_grpo.data import Prompt, PromptDataModule
from lightning_grpo.data.dataset import encoded, lengths
from lightning_grpo.errors import UserError
from lightning_grpo.module import GRPOModule
from lightning_grpo.record.show import escaped
from lightning_grpo.rewards.check import check_rows

UNLIMITED = 2**31 - 1
"""A limit of prompt lengths that no prompt exceeds, so that none is dropped."""
VALUE = 200
"""Number of characters of a column's value that are printed."""


class InspectCommand(GRPOCommand):
    """Reads the prompts of a configuration, and prints what is in them."""

    rows: ClassVar[int]
    has_rewards: ClassVar[bool]
    """Whether the configuration sets rewards."""

    def before_instantiate_classes(self) -> None:
        """Build neither a logger nor a folder."""
        self._get(self.config, "trainer").logger = False

    def _run_subcommand(self, subcommand: str) -> None:
        module, data = self.model, self.datamodule
        if not isinstance(module, GRPOModule) or not isinstance(data, PromptDataModule):
            raise UserError(
                "data inspect reads a PromptDataModule for a GRPOModule; set model and data to these classes"
            )
        limit = data.max_prompt_length or module.max_prompt_length
        data.max_prompt_length = UNLIMITED
        self.trainer.strategy.connect(module)
        data.trainer = self.trainer
        data.setup("validate")  # prints remarks as warnings
        train, held_out = data.prompts_to_check, data.validation
        for prompt in train[: self.rows]:
            show(prompt, module.tokenizer)
        print(length_line(train, limit))
        print(duplicate_line(train))
        if not self.has_rewards:
            return
        check_rows(module.rewards, train, module.environment)
        check_rows([*module.rewards, *module.eval_rewards], held_out, module.environment)
        print(f"rewards    {', '.join(module.reward_names)} can score all rows")


def show(prompt: Prompt, tokenizer: Any) -> None:
    """Print a prompt as rendered, and its columns. Only line breaks are printed as they are."""
    rendered = "\n".join(map(escaped, tokenizer.decode(prompt.ids).split("\n")))
    columns = "".join(f"\n{escaped(name)}: {_short(value)}" for name, value in prompt.columns.items())
    print(f"{escaped(prompt.place)}, {len(prompt.ids)} tokens")
    Console(file=sys.stdout, highlight=False).print(Panel(Text.assemble(rendered, (columns, "dim"))))


def _short(value: Any) -> str:
    text = escaped(value if isinstance(value, str) else repr(value))
    return text if len(text) <= VALUE else f"{text[: VALUE - 1]}…"


def length_line(prompts: Sequence[Prompt], limit: int) -> str:
    """Quantiles of the lengths, and the share above the limit."""
    tokens = lengths(prompts)
    points = " ".join(
        f"{name} {value:.0f}"
        for name, value in zip(
            ("min", "p10", "median", "p90", "p99", "max"),
            np.quantile(tokens, (0, 0.1, 0.5, 0.9, 0.99, 1), method="higher"),
            strict=True,
        )
    )
    over = int((tokens > limit).sum())
    return (
        f"tokens     {points}; {over} of {len(tokens)} prompts ({over / len(tokens):.1%}) exceed max_prompt_length = "
        f"{limit}" + (", and are dropped or refused (data.overlong)" if over else "")
    )


def duplicate_line(prompts: Sequence[Prompt]) -> str:
    """The number of prompts that occur before. Those that are also held out were dropped, with a warning."""
    counts = Counter(prompt.ids.tobytes() for prompt in encoded(prompts))
    repeated = sum(counts.values()) - len(counts)
    return f"duplicates {repeated} of {len(prompts)} training prompts repeat an earlier one"
