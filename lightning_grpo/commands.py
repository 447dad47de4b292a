"""fit, validate, test and predict, by LightningCLI."""

import json
import logging
import warnings
from pathlib import Path
from typing import Any

from jsonargparse import Namespace, set_parsing_settings
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.callbacks.progress.progress_bar import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

import lightning_grpo.rewards  # noqa: F401  their bare class names resolve once they are imported
from lightning_grpo.configure.callback import Prediction
from lightning_grpo.data import PromptDataModule
from lightning_grpo.module import GRPOModule
from lightning_grpo.monitor.checkpoint import Checkpoint
from lightning_grpo.monitor.terminal import RunSummary, StepProgressBar, TerminalHandler
from lightning_grpo.rollout import RolloutCallback

DESCRIPTION = """Group Relative Policy Optimization: fit trains a policy, validate and test sample and judge held-out
prompts, predict writes the completions down, configure chooses hyperparameters for a task, a model and a GPU and
predicts memory, time and cost (lightning-grpo configure --help)."""


class GRPOCommand(LightningCLI):
    """LightningCLI with an engine, checkpoints, loggers and a progress bar that know GRPO."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add callbacks that stay whatever ``trainer.callbacks`` holds: ``prediction``, ``rollout``, ``checkpoint``."""
        parser.add_lightning_class_args(Prediction, "prediction")
        parser.add_lightning_class_args(RolloutCallback, "rollout", subclass_mode=True, required=False)
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.set_defaults(
            {
                "model": {"class_path": "lightning_grpo.GRPOModule"},
                "data": {"class_path": "lightning_grpo.PromptDataModule"},
                "trainer.log_every_n_steps": 1,
                "trainer.default_root_dir": "runs",
            }
        )

    def before_instantiate_classes(self) -> None:
        """Log to CSV and TensorBoard in the next free ``logs/version_N`` where no logger was asked for."""
        trainer = self._get(self.config, "trainer")
        if trainer.logger in (None, True):
            root = Path(trainer.default_root_dir)
            taken = [int(p.name.removeprefix("version_")) for p in root.glob("logs/version_*")]
            where = {"save_dir": str(root), "name": "logs", "version": max(taken, default=-1) + 1}
            trainer.logger = [
                Namespace(class_path=f"lightning.pytorch.loggers.{kind}", init_args=Namespace(where))
                for kind in ("CSVLogger", "TensorBoardLogger")
            ]

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        callbacks = [callback for callback in callbacks if callback is not None]
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        if config.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in given):
            callbacks.append(StepProgressBar())
        if config.get("enable_checkpointing") is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]
        return super()._instantiate_trainer(config, [*callbacks, RunSummary()])

    def after_predict(self) -> None:
        """Write this rank's completions beside the logs, one a line."""
        path = Path(self.trainer.log_dir) / f"predictions-{self.trainer.global_rank}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for batch in self.trainer.predict_loop.predictions:
                for record in batch:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
        print(f"completions: {path}")


def run(args: list[str] | None) -> None:
    """Run the subcommand that ``args`` name; those of the process if None."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    log_to_terminal()
    # Lightning's own use of torch; and advice for metrics that are not reduced yet, which ours are
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    warnings.filterwarnings("ignore", message=".*It is recommended to use `self.log")
    GRPOCommand(
        GRPOModule,
        PromptDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        args=args,
        parser_kwargs={"description": DESCRIPTION, "default_env": True, "env_prefix": "LIGHTNING_GRPO"},
    )


def log_to_terminal() -> None:
    """Show what this package logs, on the first rank's terminal."""
    logger = logging.getLogger("lightning_grpo")
    logger.setLevel(logging.INFO if rank_zero_only.rank == 0 else logging.WARNING)
    if not logger.handlers:
        logger.addHandler(TerminalHandler())
