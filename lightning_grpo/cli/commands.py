"""The subcommands fit, validate, test and predict, built on LightningCLI."""

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
from lightning_grpo.diagnosis.callback import Diagnosis
from lightning_grpo.errors import ReportedError, UserError
from lightning_grpo.export.callback import Export
from lightning_grpo.module import GRPOModule
from lightning_grpo.monitor.checkpoint import Checkpoint
from lightning_grpo.monitor.checkpoint_files import require_checkpoint_file
from lightning_grpo.monitor.checkpoint_folder import newest
from lightning_grpo.monitor.stop import StopOnSignal
from lightning_grpo.monitor.terminal import RunSummary, StepProgressBar, TerminalHandler, run_folder
from lightning_grpo.processor import keep_threads_to_cores
from lightning_grpo.record import Record
from lightning_grpo.report.callback import Report
from lightning_grpo.rollout import RolloutCallback
from lightning_grpo.trainer import GRPOTrainer, resolved

DESCRIPTION = """Group Relative Policy Optimization: fit trains a policy, validate and test sample held-out prompts and
report their rewards, predict writes their completions to a file. lightning-grpo --help lists all subcommands."""


class GRPOCommand(LightningCLI):
    """LightningCLI with an engine, and with checkpoints, loggers and a progress bar for GRPO."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The given subcommand, or all of them if none is given. Building the parser of each one takes long."""
        known = LightningCLI.subcommands()
        return {name: known[name] for name in GRPOCommand.asked if name in known} or known

    asked: ClassVar[list[str]] = []
    """The first argument of the command line."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add callbacks that stay whatever ``trainer.callbacks`` holds: ``prediction``, ``rollout``, ``checkpoint``,
        ``record``, ``export``, ``report``, ``diagnosis``."""
        add_short_help(parser)
        parser.add_lightning_class_args(Prediction, "prediction")
        parser.add_lightning_class_args(RolloutCallback, "rollout", subclass_mode=True, required=False)
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.add_lightning_class_args(Record, "record")
        parser.add_lightning_class_args(Export, "export")
        parser.add_lightning_class_args(Report, "report")
        parser.add_lightning_class_args(Diagnosis, "diagnosis")
        parser.set_defaults(
            {
                "model": {"class_path": "lightning_grpo.GRPOModule"},
                "data": {"class_path": "lightning_grpo.PromptDataModule"},
                "trainer.log_every_n_steps": 1,
                "trainer.default_root_dir": "runs",
            }
        )

    def _parse_ckpt_path(self) -> None:
        """Do nothing. Lightning would read the whole checkpoint to look for hyperparameters, and there are none."""

    def _set_seed(self) -> None:
        check_seed(self._get(self.config, "seed_everything"))
        super()._set_seed()

    def before_instantiate_classes(self) -> None:
        """Check options before anything is built, resolve ``trainer.precision: auto``, and choose the log folder.

        Without a configured logger, logs are written as CSV and for TensorBoard to the next free ``logs/version_N``.
        """
        trainer = self._get(self.config, "trainer")
        check_no_nan(self.config[self.subcommand].as_dict())
        check_trainer_options(trainer.as_dict())
        # resolved here, so that the saved config.yaml contains the precision that is used
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
        """Check that the checkpoint exists. Only fit accepts ``last`` without one: it then starts a new run."""
        path = self._get(self.config, "ckpt_path")
        trainer, checkpoint = self._get(self.config, "trainer"), self._get(self.config, "checkpoint")
        base = Path(checkpoint.dirpath or Path(trainer.default_root_dir) / "checkpoints")
        if path == "best":
            raise UserError("ckpt_path is best, which only a running Trainer knows; set a file, or last for the newest")
        if path == "last" and self.subcommand != "fit" and not (newest(base) / "last.ckpt").exists():
            raise UserError(f"ckpt_path is last, but {base} has no checkpoint; set a file, or remove ckpt_path")
        if path not in (None, "last", "hpc") and "://" not in path:
            require_checkpoint_file(path)

    def instantiate_classes(self) -> None:
        """Build the configured objects.

        Raises:
            UserError: if Lightning rejects an option, or if a configured class needs a package that is not installed.
        """
        try:
            super().instantiate_classes()
        except Exception as error:
            chain = list(_causes(error))
            if missing := next((e for e in chain if isinstance(e, ModuleNotFoundError)), None):
                reported = next((str(e) for e in chain if isinstance(e, ReportedError)), None)
                unknown = f"a package of the configuration is not installed: {_one_line(missing)}"
                raise UserError(reported or unknown) from error
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
        # these print the next command and the path of the report, below the summary
        last = [callback for callback in callbacks if isinstance(callback, Export | Report)]
        others = [callback for callback in callbacks if not isinstance(callback, Export | Report)]
        callbacks = [StopOnSignal(), *others, RunSummary(), *last]
        try:
            return super()._instantiate_trainer(config, callbacks)
        except (ValueError, TypeError, RuntimeError) as error:  # only options of the trainer can cause it here
            if isinstance(error, ReportedError):
                raise
            raise UserError(f"trainer: {_one_line(error)}") from error

    def before_validate(self) -> None:
        """Check that there are held-out prompts."""
        self._require_held_out("limit_val_batches")

    def before_test(self) -> None:
        """Check that there are held-out prompts."""
        self._require_held_out("limit_test_batches")

    def before_predict(self) -> None:
        """Check that there are held-out prompts."""
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
        """Write the completions of this rank to a JSON-lines file beside the logs."""
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
        """Write the configuration once, on the first rank."""
        self._folder = run_folder(trainer)  # computed on every rank, since it is broadcast
        super().setup(trainer, pl_module, stage)

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write config.yaml, or config-2.yaml, … if it exists."""
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
            f"trainer.default_root_dir is {root}, which is not writable ({error.strerror}); set another folder"
        ) from error


def run(args: list[str], command: type[GRPOCommand] = GRPOCommand) -> None:
    """Run the subcommand given in ``args``."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    log_to_terminal()
    # Lightning's recommendations of its other packages
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).addFilter(lambda record: "Tip: For seamless cloud" not in record.getMessage())
    keep_threads_to_cores()
    # Lightning's use of torch, and its advice about metrics that are not reduced over ranks (these already are)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    warnings.filterwarnings("ignore", message=".*It is recommended to use `self.log")
    # a resumed run writes to the folder of its checkpoints, and `main` passes args
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended to run from within Python")
    ShortHelpParser.files = read_config_files(args)
    GRPOCommand.asked = args[:1]
    command(
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
    """Print the log messages of this package on the first rank."""
    logger = logging.getLogger("lightning_grpo")
    logger.setLevel(logging.INFO if getattr(rank_zero_only, "rank", 0) == 0 else logging.WARNING)
    if not logger.handlers:
        logger.addHandler(TerminalHandler())
