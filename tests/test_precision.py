"""Trainer precisions other than float32: what is computed in them, and what must not be."""

import copy
import math

import pytest
import torch
from fitting import checksum, data, fit, largest_difference, module, parameters
from lightning import Trainer
from lightning.pytorch.plugins import MixedPrecision

from lightning_grpo import GRPOModule
from lightning_grpo.objective import ObjectiveConfig


class Types(GRPOModule):
    """Keeps the dtypes of what the loss is given."""

    def compute_loss(self, logprobs, entropy, experience, **sizes):
        given = {**vars(experience), "logprobs": logprobs, "entropy": entropy}
        self.types = {name: x.dtype for name, x in given.items() if isinstance(x, torch.Tensor)}
        return super().compute_loss(logprobs, entropy, experience, **sizes)


def thirds(completions):
    """A mean that bfloat16 does not hold."""
    return [1 / 3, 2 / 3, 2 / 3, 2 / 3] * (len(completions) // 4)


def test_bf16_true_trains_in_bfloat16_and_sums_in_float32(tmp_path, tiny_model_path):
    objective = ObjectiveConfig(beta=0.1)
    policy = module(tiny_model_path, Types, rewards=[thirds], objective=objective)
    prompts = data(validation_size=8)
    settings = {"limit_val_batches": 1.0, "num_sanity_val_steps": 0, "precision": "bf16-true"}
    policy.validation_generations = 4
    record = fit(tmp_path, policy, prompts, steps=2, accumulate=2, val_check_interval=2, **settings)
    policy_types = {p.dtype for p in policy.policy.parameters()}
    assert policy_types == {torch.bfloat16} == {p.dtype for p in policy.scorer.reference.parameters()}
    floats = {name: dtype for name, dtype in policy.types.items() if dtype.is_floating_point}
    assert set(floats.values()) == {torch.float32}
    assert floats.keys() >= {"logprobs", "entropy", "old_logprobs", "ref_logprobs", "rollout_logprobs", "advantages"}
    first = record.steps[0]
    assert (first["kl"], first["ratio/min"], first["ratio/max"]) == (0, 1, 1)
    # the second step's gradient is of bfloat16's precision, and not that of other weights
    assert record["ratio/min"][1] < 1 < record["ratio/max"][1]
    assert max(record["sampling/sampling_logp_difference/max"]) < 0.1
    assert policy.held_out["val/reward"] == pytest.approx(7 / 12, abs=1e-6)


def test_bf16_true_moves_the_weights_as_float32_does(tmp_path, tiny_model_path):
    kept = []

    class Replay(GRPOModule):
        def rollout(self, batch):
            kept.append(kept[0] if kept else super().rollout(batch))
            return copy.copy(kept[0])

    moved = []
    for precision in ("32-true", "bf16-true"):
        policy = module(tiny_model_path, Replay, rewards=[checksum], optimizer=lambda p: torch.optim.SGD(p, lr=100.0))
        policy.configure_model()
        policy.policy.to(torch.bfloat16).float()  # the same weights for both
        start = parameters(policy)
        fit(tmp_path, policy, steps=1, precision=precision)
        moved.append(torch.cat([(value.float() - start[name]).flatten() for name, value in parameters(policy).items()]))
    assert torch.cosine_similarity(*moved, dim=0) > 0.999
    assert float(moved[1].norm()) == pytest.approx(float(moved[0].norm()), rel=0.02)


def test_rotary_frequencies_stay_in_float32(tmp_path, tiny_model_path):
    plain = module(tiny_model_path)
    plain.configure_model()
    policy = module(tiny_model_path, objective=ObjectiveConfig(beta=0.1))
    fit(tmp_path, policy, steps=1, precision="bf16-true")
    expected = dict(plain.policy.named_buffers())
    for model in (policy.policy, policy.scorer.reference):
        buffers = dict(model.named_buffers())
        assert buffers.keys() == expected.keys() != set()
        assert largest_difference(buffers, expected) == 0


def test_16_true_is_refused(tmp_path, tiny_model_path):
    with pytest.raises(ValueError, match=r"trainer.precision is 16-true: without loss scaling"):
        fit(tmp_path, module(tiny_model_path), precision="16-true")


@pytest.mark.parametrize(
    ("precision", "dtype", "lr", "warned"),
    [
        ("bf16-true", "float32", 1e-6, "bfloat16"),
        ("32-true", "bfloat16", 1e-6, "bfloat16"),
        ("bf16-true", "float32", 1e-4, None),
        ("bf16-mixed", "float32", 1e-6, None),
    ],
)
def test_small_steps_of_16_bit_parameters_are_warned_of(
    tmp_path, tiny_model_path, caplog, precision, dtype, lr, warned
):
    policy = module(tiny_model_path, dtype=dtype, optimizer=lambda p: torch.optim.AdamW(p, lr=lr))
    trainer = Trainer(
        accelerator="cpu", precision=precision, logger=False, enable_checkpointing=False, default_root_dir=tmp_path
    )  # fmt: skip
    policy.configure_model()
    trainer.strategy.connect(policy)
    policy.trainer = trainer
    trainer.precision_plugin.convert_module(policy)
    policy.configure_optimizers()
    assert ("lost to rounding" in caplog.text) == (warned is not None)
    assert warned is None or f"The trained parameters are {warned} and the learning rate is {lr:g}" in caplog.text


def test_a_nan_stops_a_run_with_scaled_gradients(tmp_path, tiny_model_path):
    class Broken(GRPOModule):
        def compute_loss(self, *args, **sizes):
            loss, metrics = super().compute_loss(*args, **sizes)
            return (loss * math.nan if self.trainer.global_step == 1 else loss), metrics

    with pytest.raises(FloatingPointError, match="the loss is nan at optimizer step 1"):
        fit(tmp_path, module(tiny_model_path, Broken, rewards=[checksum]), plugins=[MixedPrecision("16-mixed", "cpu")])


def test_a_gradient_that_no_scale_makes_finite_stops_the_run(tmp_path, tiny_model_path):
    class Broken(GRPOModule):
        def on_after_backward(self):
            self.policy.get_input_embeddings().weight.grad.fill_(math.inf)

    policy = module(tiny_model_path, Broken, rewards=[checksum])
    with pytest.raises(FloatingPointError, match=r"norm is inf at optimizer step 17, with the loss scaled by 0.5,"):
        fit(tmp_path, policy, steps=40, plugins=[MixedPrecision("16-mixed", "cpu")])
    assert largest_difference(parameters(policy), parameters_at_start(tiny_model_path)) == 0


def test_a_gradient_that_overflows_at_first_is_scaled_down(tmp_path, tiny_model_path):
    class Overflowing(GRPOModule):
        def on_after_backward(self):
            if self.trainer.precision_plugin.scaler.get_scale() > 2**13:
                self.policy.get_input_embeddings().weight.grad.fill_(math.inf)

    policy = module(tiny_model_path, Overflowing, rewards=[checksum])
    fit(tmp_path, policy, steps=5, plugins=[MixedPrecision("16-mixed", "cpu")])
    assert policy.trainer.precision_plugin.scaler.get_scale() == 2**13
    assert largest_difference(parameters(policy), parameters_at_start(tiny_model_path)) > 1e-4


def parameters_at_start(model):
    policy = module(model)
    policy.configure_model()
    return parameters(policy)
