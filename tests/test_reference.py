"""A reference that follows the policy, against its closed form, and through a resume."""

import pytest
import torch
from fitting import checksum, fit, module
from lightning import Callback

from lightning_grpo.errors import UserError
from lightning_grpo.monitor.checkpoint import Checkpoint
from lightning_grpo.objective import ObjectiveConfig
from lightning_grpo.policy.load import LoRA
from lightning_grpo.training.reference import ReferenceRefresh


class Weights(Callback):
    """Keeps the policy's weights after each optimizer step."""

    def on_train_start(self, trainer, pl_module):
        self.steps = [self.weights(pl_module)]

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step == len(self.steps):
            self.steps.append(self.weights(pl_module))

    def weights(self, pl_module):
        return [p.detach().clone() for p in pl_module.policy.parameters()]


def policy(model, **changes):
    return module(model, **{"objective": ObjectiveConfig(beta=0.1), "rewards": [checksum]} | changes)


@pytest.mark.parametrize("mixing", [0.6, 1.0])
def test_the_reference_moves_by_its_share_every_few_steps(tmp_path, tiny_model_path, mixing):
    weights, trained = Weights(), policy(tiny_model_path)
    record = fit(tmp_path, trained, steps=5, callbacks=[ReferenceRefresh(mixing=mixing, every_n_steps=2), weights])
    expected = weights.steps[0]
    for step in (2, 4):
        expected = [(1 - mixing) * old + mixing * new for old, new in zip(expected, weights.steps[step], strict=True)]
    for reference, value in zip(trained.scorer.reference.parameters(), expected, strict=True):
        torch.testing.assert_close(reference, value)
    # the reference is the policy at first, and with mixing 1 after each refresh again
    assert record["kl"][0] == 0 and record["kl"][1] > 0
    assert (record["kl"][2] == 0) is (mixing == 1)


def test_a_run_resumes_with_its_reference(tmp_path, tiny_model_path):
    def run(name, resume=None):
        checkpoint = Checkpoint(str(tmp_path / name), every_n_train_steps=1, save_top_k=-1)
        callbacks = [ReferenceRefresh(every_n_steps=2), checkpoint]
        trained = policy(tiny_model_path)
        record = fit(
            tmp_path, trained, steps=5, ckpt_path=resume, callbacks=callbacks, enable_checkpointing=True
        )  # fmt: skip
        return record, list(trained.scorer.reference.parameters())

    whole, reference = run("whole")
    for step in (1, 2, 3):
        resumed, again = run(f"on-{step}", str(tmp_path / "whole" / f"step-{step:06d}.ckpt"))
        assert resumed["loss"] == whole["loss"][step:] and resumed["kl"] == whole["kl"][step:]
        assert all(torch.equal(one, other) for one, other in zip(reference, again, strict=True))


def test_a_refresh_that_a_stop_prevented_follows_at_the_resume(tiny_model_path):
    refresh = ReferenceRefresh(mixing=1.0, every_n_steps=2)
    trained = policy(tiny_model_path)
    trained.configure_model()
    refresh._module = trained
    refresh.load_state_dict(refresh.state_dict() | {"refreshed_at": 2})
    with torch.no_grad():
        for p in trained.policy.parameters():
            p.add_(1.0)
    pairs = list(zip(trained.scorer.reference.parameters(), trained.policy.parameters(), strict=True))
    refresh._refresh_if_due(2)
    assert not any(torch.equal(*pair) for pair in pairs)
    refresh._refresh_if_due(4)
    assert all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": ObjectiveConfig()}, "objective.beta is 0"),
        ({"lora": LoRA(rank=2)}, "with lora it is the policy without its adapter; remove"),
    ],
    ids=["no reference", "lora"],
)
def test_a_module_without_a_reference_of_its_own_is_refused(tmp_path, tiny_model_path, changes, message):
    with pytest.raises(UserError, match=message):
        fit(tmp_path, policy(tiny_model_path, **changes), callbacks=[ReferenceRefresh()])
