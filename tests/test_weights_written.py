"""Whatever writes to the weights, the engine samples from those that are trained."""

import pytest
import torch
from engines import CopyRollout
from fitting import checksum, data, fit, module
from lightning import Callback
from lightning.pytorch.callbacks import EMAWeightAveraging

from lightning_grpo.policy.weights import write_counters


class Write(Callback):
    """Changes the policy's weights in one hook, by one way of writing."""

    def __init__(self, hook, write):
        self.write = write
        setattr(self, hook, self._turn)

    def _turn(self, trainer, pl_module, *args):
        if trainer.global_step == 1 and self.write is not None:
            self.write(pl_module.policy)
            self.write = None


def through_data(policy):
    for parameter in policy.parameters():
        parameter.data.mul_(1.1)


def in_place(policy):
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.mul_(1.1)


def replaced(policy):
    for parameter in policy.parameters():
        parameter.data = parameter.data * 1.1


def loaded(policy):
    policy.load_state_dict({name: value * 1.1 for name, value in policy.state_dict().items()})


def train(root, model, callbacks, steps, rollout=None):
    """One rollout per step and a validation after each.

    Returns the largest |Δ log-prob| between engine and trainer of each step, and the versions that were sent.
    """
    rollout = rollout or CopyRollout()
    policy = module(model, rewards=[checksum], optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    validation = {"limit_val_batches": 1.0, "num_sanity_val_steps": 0, "val_check_interval": 4}
    record = fit(
        root, policy, data(validation_size=4), steps=steps, callbacks=callbacks, rollout=rollout, **validation
    )  # fmt: skip
    sent = [call[1] for call in rollout.engine.calls if call[0] == "update"]
    return record["sampling/sampling_logp_difference/max"], sent


def test_averaged_weights_are_validated_and_not_trained_on(tmp_path, tiny_model_path):
    held = []

    class Look(Callback):
        def on_validation_batch_end(self, trainer, pl_module, *args):
            engine = dict(rollout.engine.policy.named_parameters())
            held.append(all(torch.equal(p, engine[name]) for name, p in pl_module.policy.named_parameters()))

    rollout = CopyRollout()
    differences, sent = train(tmp_path, tiny_model_path, [EMAWeightAveraging(decay=0.5), Look()], 4, rollout)
    assert held and all(held)
    assert max(differences) < 1e-5
    # the first average is the first step's weights; each later validation has other weights than the steps around it
    assert sent == [0, 1, 2, 2, 3, 3, 4]


@pytest.mark.parametrize("hook", ["on_validation_end", "on_train_batch_start"])
@pytest.mark.parametrize("write", [through_data, in_place, replaced, loaded])
def test_weights_that_a_callback_writes_reach_the_engine(tmp_path, tiny_model_path, hook, write):
    differences, _ = train(tmp_path, tiny_model_path, [Write(hook, write)], 2)
    assert len(differences) == 2 and max(differences) < 1e-5


def test_weights_that_nobody_wrote_to_are_sent_once(tmp_path, tiny_model_path):
    assert train(tmp_path, tiny_model_path, [], 3)[1] == [0, 1, 2, 3]


def test_write_counters_move_with_each_way_of_writing_that_torch_counts(tiny_model_path):
    policy = module(tiny_model_path)
    policy.configure_model()
    for write in (in_place, replaced, loaded):
        before = write_counters(policy.policy)
        assert before == write_counters(policy.policy)
        write(policy.policy)
        assert before != write_counters(policy.policy), write.__name__
