"""Stop a run on a signal between two micro-batches, after saving a checkpoint to resume from."""

import logging

from lightning import LightningModule, Trainer
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn

from lightning_grpo import stopping
from lightning_grpo.monitor.checkpoint import save_now
from lightning_grpo.stopping import Stopped

log = logging.getLogger(__name__)


class StopOnSignal(Callback):
    """Stops training on Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 (see `lightning_grpo.stopping`).

    It must precede the callback that owns the engine, so that the checkpoint is saved before the engine is closed:
    schedulers give a run limited time to end.
    """

    def __init__(self) -> None:
        self._training = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forward signals to the ranks that this process has started."""
        launcher = trainer.strategy.launcher
        engines = (getattr(callback, "engine_args", None) or {} for callback in trainer.callbacks)
        stopping.forward_to(
            getattr(launcher, "procs", []),
            ranks_independent=isinstance(trainer.strategy, DDPStrategy)
            and all(settings.get("tensor_parallel_size", 1) == 1 for settings in engines),
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Defer signals from now on to the next micro-batch."""
        stopping.install()
        stopping.defer()
        self._training = True
        stopping.stop_if_asked(trainer)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handlers again, as Lightning has just installed its own."""
        stopping.install()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handlers again, as Lightning has just installed its own."""
        stopping.install()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handlers again, as Lightning has just installed its own."""
        stopping.install()

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the handlers again, as Lightning has just installed its own."""
        stopping.install()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Stop between two micro-batches if a signal has arrived."""
        stopping.stop_if_asked(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Training has ended, and `Checkpoint` saves the last step."""
        self._training = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the current step. All ranks call this together."""
        if not isinstance(exception, Stopped) or not self._training or trainer.state.fn != TrainerFn.FITTING:
            return
        self._training = False
        exception.progress = f"{trainer.global_step} optimizer steps"
        try:
            exception.saved = save_now(trainer)
        except Exception as error:  # reported together with the reason why the run ended
            exception.failure = error
        if (exception.saved or exception.failure) and _is_requeued(trainer, exception.signum):
            trainer._signal_connector._slurm_sigusr_handler_fn(exception.signum, None)


def _is_requeued(trainer: Trainer, signum: int) -> bool:
    """Whether SLURM sent the signal in order to requeue the job."""
    environment = trainer._accelerator_connector.cluster_environment
    is_slurm = isinstance(environment, SLURMEnvironment) and environment.auto_requeue
    return is_slurm and signum == environment.requeue_signal
