"""fit, validate, test and predict, by LightningCLI."""

import itertools
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

from jsonargparse import Namespace, set_parsing_settings
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.callbacks.progress.progress_bar import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import lightning_grpo.rewards  # noqa: F401  their bare class names resolve once they are imported
from lightning_grpo.cli.parser_errors import read_config_files
from lightning_grpo.cli.short_help import ShortHelpParser, add_short_help
from lightning_grpo.cli.trainer_options import check_no_nan, check_seed, check_trainer_options
from lightning_grpo.configure.callback import Prediction
from lightning_grpo.data import PromptDataModule
from lightning_grpo.errors import ReportedError, UserError
from lightning_grpo.export.callback import Export
from lightning_grpo.module import GRPOModule
from lightning_grpo.monitor.checkpoint import Checkpoint
from lightning_grpo.monitor.checkpoint_files import require_checkpoint_file
from lightning_grpo.monitor.checkpoint_folder import newest
from lightning_grpo.monitor.stop import StopOnSignal
from lightning_grpo.monitor.terminal import RunSummary, StepProgressBar, TerminalHandler, run_folder
from lightning_grpo.processor import keep_threads_to_cores
from lightning_grpo.rollout import RolloutCallback
from lightning_grpo.trainer import GRPOTrainer, resolved

DESCRIPTION = """Group Relative Policy Optimization: fit trains a policy, validate and test sample and judge held-out
prompts, predict writes the completions down, configure chooses hyperparameters for a task, a model and a GPU and
predicts memory, time and cost (lightning-grpo configure --help)."""


class GRPOCommand(LightningCLI):
    """LightningCLI with an engine, checkpoints, loggers and a progress bar that know GRPO."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The subcommand on the command line, or all for the help on them: to build a parser takes long."""
        known = LightningCLI.subcommands()
        return {name: known[name] for name in GRPOCommand.asked if name in known} or known

    asked: ClassVar[list[str]] = []
    """What the command line begins with."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add callbacks that stay whatever ``trainer.callbacks`` holds: ``prediction``, ``rollout``, ``checkpoint``,
        ``export``."""
        add_short_help(parser)
        parser.add_lightning_class_args(Prediction, "prediction")
        parser.add_lightning_class_args(RolloutCallback, "rollout", subclass_mode=True, required=False)
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.add_lightning_class_args(Export, "export")
        parser.set_defaults(
            {
                "model": {"class_path": "lightning_grpo.GRPOModule"},
                "data": {"class_path": "lightning_grpo.PromptDataModule"},
                "trainer.log_every_n_steps": 1,
                "trainer.default_root_dir": "runs",
            }
        )

    def _parse_ckpt_path(self) -> None:
        """Modules here save no hyperparameters: Lightning would read the whole file to look for some."""

    def _set_seed(self) -> None:
        check_seed(self._get(self.config, "seed_everything"))
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Check what can be checked before anything is built, settle the precision, and choose where results go.

        Logs go to CSV and TensorBoard in the next free ``logs/version_N`` if no logger was asked for.
        """
        trainer = self._get(self.config, "trainer")
        check_no_nan(self.config[self.subcommand].as_dict())
        check_trainer_options(trainer.as_dict())
        # here already, so that the saved config.yaml has what was used
        trainer.precision = resolved(trainer.precision, trainer.accelerator)
        self._check_ckpt_path()
        root = Path(trainer.default_root_dir)
        require_folder(root)
        if trainer.logger in (None, True):
            numbers = (path.name.removeprefix("version_") for path in root.glob("logs/version_*"))
            taken = [int(number) for number in numbers if number.isdecimal()]
            where = {"save_dir": str(root), "name": "logs", "version": max(taken, default=-1) + 1}
            trainer.logger = [
                Namespace(class_path=f"lightning.pytorch.loggers.{kind}", init_args=Namespace(where))
                for kind in ("CSVLogger", "TensorBoardLogger")
            ]

        for logger in trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]:
            settings = logger.get("init_args") if isinstance(logger, Namespace) else None
            if settings is not None and settings.get("save_dir", "") in (None, "."):  # such as WandbLogger's default
                settings["save_dir"] = str(root)

    def _check_ckpt_path(self) -> None:
        """``last`` without a checkpoint starts a run, as the first of many restarts does, but evaluates nothing."""
        path = self._get(self.config, "ckpt_path")
        trainer, checkpoint = self._get(self.config, "trainer"), self._get(self.config, "checkpoint")
        base = Path(checkpoint.dirpath or Path(trainer.default_root_dir) / "checkpoints")
        if path == "best":
            raise UserError("ckpt_path is best, which is known only within a run; name a file, or last for the newest")
        if path == "last" and self.subcommand != "fit" and not (newest(base) / "last.ckpt").exists():
            raise UserError(f"ckpt_path is last, but {base} has no checkpoint; name a file, or leave it out")
        if path not in (None, "last", "hpc") and "://" not in path:
            require_checkpoint_file(path)

    def instantiate_classes(self) -> None:
        """Build what was configured.

        Raises:
            UserError: for what Lightning refuses, and for packages that a chosen class needs and that are missing.
        """
        try:
            super().instantiate_classes()
        except Exception as error:
            chain = list(_causes(error))
            if missing := next((e for e in chain if isinstance(e, ModuleNotFoundError)), None):
                raise UserError(f"the configuration needs a package that is missing: {_one_line(missing)}") from error
            if refused := next((e for e in chain if isinstance(e, MisconfigurationException)), None):
                raise UserError(f"trainer: {_one_line(refused)}") from error
            raise

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        callbacks = [callback for callback in callbacks if callback is not None]
        given = config.get("callbacks") or []
        given = given if isinstance(given, list) else [given]
        if config.get("enable_progress_bar") is not False and not any(isinstance(c, ProgressBar) for c in given):
            callbacks.append(StepProgressBar())
        if config.get("enable_checkpointing") is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]
        # Export prints the next command, below the summary
        exports = [callback for callback in callbacks if isinstance(callback, Export)]
        others = [callback for callback in callbacks if not isinstance(callback, Export)]
        callbacks = [StopOnSignal(), *others, RunSummary(), *exports]
        try:
            return super()._instantiate_trainer(config, callbacks)
        except (ValueError, TypeError, RuntimeError) as error:  # nothing but the trainer's options is at work here
            if isinstance(error, ReportedError):
                raise
            raise UserError(f"trainer: {_one_line(error)}") from error

    def before_validate(self) -> None:
        """Refuse to evaluate nothing."""
        self._require_held_out("limit_val_batches")

    def before_test(self) -> None:
        """Refuse to evaluate nothing."""
        self._require_held_out("limit_test_batches")

    def before_predict(self) -> None:
        """Refuse to predict nothing."""
        self._require_held_out("limit_predict_batches")

    def _require_held_out(self, limit: str) -> None:
        if (value := getattr(self.trainer, limit)) == 0:
            raise UserError(f"trainer.{limit} is {value}: {self.subcommand} has nothing to do; set 1.0")
        data = self.datamodule
        if isinstance(data, PromptDataModule) and not data.validation_size and data.validation_source is None:
            raise UserError(
                f"no prompts are held out, so {self.subcommand} has nothing to do; set data.validation_size, or "
                "data.validation_source"
            )

    def after_predict(self) -> None:
        """Write this rank's completions beside the logs, one a line."""
        path = run_folder(self.trainer) / f"predictions-{self.trainer.global_rank}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            for batch in self.trainer.predict_loop.predictions:
                for record in batch:
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
        print(f"completions: {path}")


class SaveConfig(SaveConfigCallback):
    """Writes the whole configuration beside the logs, or into the root folder if the logger has no folder."""

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **kwargs: Any) -> None:
        super().__init__(parser, config, save_to_log_dir=False, **kwargs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it, once, on the first rank."""
        self._folder = run_folder(trainer)  # on every rank: it is broadcast
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Under the first name that is free."""
        self._folder.mkdir(parents=True, exist_ok=True)
        names = itertools.chain(["config.yaml"], (f"config-{n}.yaml" for n in itertools.count(2)))
        path = next(path for name in names if not (path := self._folder / name).exists())
        self.parser.save(self.config, str(path), skip_none=False, multifile=False)


def require_folder(root: Path) -> None:
    """Raise `UserError` unless results can be written under ``root``."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise UserError(
            f"trainer.default_root_dir is {root}, where nothing can be written ({error.strerror}); set another folder"
        ) from error


def run(args: list[str]) -> None:
    """Run the subcommand that ``args`` name."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    log_to_terminal()
    keep_threads_to_cores()
    # Lightning's own use of torch; and advice for metrics that are not reduced yet, which ours are
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    warnings.filterwarnings("ignore", message=".*It is recommended to use `self.log")
    # checkpoints of a resumed run stand in its folder; and args may come from `main`
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended to run from within Python")
    ShortHelpParser.files = read_config_files(args)
    GRPOCommand.asked = args[:1]
    GRPOCommand(
        GRPOModule,
        PromptDataModule,
        trainer_class=GRPOTrainer,
        save_config_callback=SaveConfig,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        args=args,
        parser_class=ShortHelpParser,
        parser_kwargs={
            "prog": "lightning-grpo",
            "description": DESCRIPTION,
            "default_env": True,
            "env_prefix": "LIGHTNING_GRPO",
        },
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def log_to_terminal() -> None:
    """Show what this package logs, on the first rank's terminal."""
    logger = logging.getLogger("lightning_grpo")
    logger.setLevel(logging.INFO if getattr(rank_zero_only, "rank", 0) == 0 else logging.WARNING)
    if not logger.handlers:
        logger.addHandler(TerminalHandler())
