"""One module or one trainer in several runs, and Lightning's ways of running a part of one."""

import pytest
import torch
from fitting import Record, checksum, data, fit, largest_difference, module, parameters
from lightning import Callback, Trainer
from lightning.pytorch.tuner import Tuner

from lightning_grpo import GRPOModule
from lightning_grpo.monitor.checkpoint import Checkpoint
from lightning_grpo.policy.load import LoRA
from lightning_grpo.rollout import HFRollout

LOGGED = ("loss", "reward", "num_tokens", "grad_norm")


def trainer(root, *callbacks, **options):
    settings = {
        "max_epochs": -1, "accumulate_grad_batches": 2, "limit_val_batches": 0, "logger": False,
        "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu", "default_root_dir": root,
    }  # fmt: skip
    return Trainer(**settings | options, callbacks=[HFRollout(), *callbacks])


class Fail(Callback):
    """Ends the run in the middle of an optimizer step, once."""

    def __init__(self, steps):
        self.steps = steps

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == self.steps:
            self.steps = -1
            raise InterruptedError


def test_a_second_run_with_the_module_begins_anew(tmp_path, tiny_model_path):
    """With weights put back, it is the first run again, wherever that one stopped."""
    policy = module(tiny_model_path, rewards=[checksum])
    policy.configure_model()
    start = {name: value.clone() for name, value in policy.state_dict().items()}
    runs = []
    for steps, callback in ((3, []), (3, []), (100, [Fail(1)]), (3, [])):
        policy.load_state_dict(start)
        if callback:
            with pytest.raises(InterruptedError):
                fit(tmp_path, policy, steps=steps, accumulate=2, callbacks=callback)
        else:
            runs.append((fit(tmp_path, policy, steps=steps, accumulate=2).steps, parameters(policy)))
    first, second, third = ([[step[name] for step in steps] for name in LOGGED] for steps, _ in runs)
    assert first == second == third
    assert largest_difference(runs[0][1], runs[1][1]) == largest_difference(runs[0][1], runs[2][1]) == 0


def test_a_trainer_goes_on_where_its_run_was_broken_off(tmp_path, tiny_model_path):
    """Except for the optimizer, which is new; SGD has no state."""
    sgd = {"rewards": [checksum], "optimizer": lambda p: torch.optim.SGD(p, lr=1.0)}
    ended = module(tiny_model_path, **sgd)
    whole = fit(tmp_path, ended, steps=5, accumulate=2)
    record, policy = Record(), module(tiny_model_path, **sgd)
    twice, prompts = trainer(tmp_path, Fail(3), record, max_steps=5), data()
    with pytest.raises(InterruptedError):
        twice.fit(policy, prompts)
    record.steps.clear()
    twice.fit(policy, prompts)
    assert [record[name] for name in LOGGED] == [whole[name][3:] for name in LOGGED]
    assert largest_difference(parameters(policy), parameters(ended)) == 0


def test_a_trainer_takes_a_second_data_module(tmp_path, tiny_model_path):
    policy, runs = module(tiny_model_path), trainer(tmp_path, max_steps=3)
    runs.fit(policy, data())
    runs.fit_loop.epoch_loop.max_steps = 5
    runs.fit(policy, data(seed=2))
    assert runs.global_step == 5


def test_a_fast_run_takes_whole_optimizer_steps(tmp_path, tiny_model_path):
    runs = trainer(tmp_path, fast_dev_run=2)
    runs.fit(module(tiny_model_path), data())
    assert runs.global_step == 2


def test_what_cannot_work_is_refused_at_start(tmp_path, tiny_model_path):
    with pytest.raises(ValueError, match=r"overfit_batches is 2.* set data.size"):
        trainer(tmp_path, overfit_batches=2).fit(module(tiny_model_path), data())
    policy = module(tiny_model_path)
    policy.lr = 1e-3
    with pytest.raises(ValueError, match=r"no engine is attached.* lr_find"):
        Tuner(trainer(tmp_path)).lr_find(policy, datamodule=data())


@pytest.mark.parametrize("lora", [None, LoRA(rank=4)], ids=["whole", "lora"])
def test_a_checkpoint_loads_without_a_trainer(tmp_path, tiny_model_path, lora):
    policy = module(tiny_model_path, lora=lora)
    checkpoint = Checkpoint(str(tmp_path), every_n_train_steps=1)
    fit(tmp_path, policy, steps=1, accumulate=2, callbacks=[checkpoint], enable_checkpointing=True)
    loaded = GRPOModule.load_from_checkpoint(
        tmp_path / "last.ckpt", model=tiny_model_path, rewards=policy.rewards, lora=lora
    )
    assert largest_difference(parameters(loaded), parameters(policy)) == 0
    assert loaded.progress.experience is None
