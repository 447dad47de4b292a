"""Micro-batches that are divided into passes have the gradient, metrics and log-probs of undivided ones."""

from types import MappingProxyType, SimpleNamespace

import pytest
import torch
from fitting import checksum, done, experience, fit, largest_difference, module, parameters
from hypothesis import given
from hypothesis import strategies as st
from launching import assert_two_ranks_succeed
from lightning.pytorch.plugins import MixedPrecision

from lightning_grpo import GRPOModule
from lightning_grpo.kernels import linear
from lightning_grpo.monitor.checkpoint import Checkpoint
from lightning_grpo.objective import ObjectiveConfig
from lightning_grpo.objective.presets import PRESETS
from lightning_grpo.policy.load import LoRA, load_policy
from lightning_grpo.rollout import Rollout
from lightning_grpo.training import passes
from lightning_grpo.training.scorer import Scorer
from lightning_grpo.training.work import Lengths

SGD = {"optimizer": lambda p: torch.optim.SGD(p, lr=0.1), "rewards": [checksum]}


@given(st.lists(st.integers(0, 9), min_size=12, max_size=12), st.integers(1, 60), st.booleans())
def test_every_completion_is_in_one_pass_within_the_limit(lengths, limit, share_prompt):
    rows = experience(lengths, [1.0] * 12, G=4)
    sequences = passes.divide(rows, limit, share_prompt=share_prompt)
    parts = [part for sequence in sequences for part in sequence]
    tokens = Lengths.of(rows, share_prompt=share_prompt).tokens
    assert sorted(row for part in parts for row in part) == list(range(12))
    assert all(tokens(part) <= limit for part in parts if len(part) > 1)
    owners = Lengths.of(rows, share_prompt=share_prompt).owners
    assert all(
        len({owners[row] for part in sequence for row in part}) == 1 for sequence in sequences if len(sequence) > 1
    )


def test_groups_stay_together_if_they_fit():
    rows = experience([3, 3, 3, 3, 9, 9, 9, 9], [1.0] * 8, G=4)
    assert passes.divide(rows, 24, share_prompt=True) == [[[4, 5], [6, 7]], [[0, 1, 2, 3]]]
    assert passes.divide(rows, 38, share_prompt=True) == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]


def trained(root, model, limit, kind=GRPOModule, *, accumulate=1, steps=1, trainer=MappingProxyType({}), **changes):
    """A run whose micro-batches are divided into passes of ``limit`` tokens, and the number of its forward passes."""
    policy = module(model, kind, micro_batch_size=32 // accumulate, micro_batch_tokens=limit, **SGD | changes)
    count = []
    logprobs = policy.scorer.logprobs
    policy.scorer.logprobs = lambda *args, **options: count.append(len(args[1])) or logprobs(*args, **options)
    record = fit(root, policy, steps=steps, accumulate=accumulate, **trainer)
    return policy, record, len(count)


class Coupled(GRPOModule):
    """A loss in which every completion's gradient depends on all completions."""

    def compute_loss(self, logprobs, entropy, experience, **sizes):
        loss, metrics = super().compute_loss(logprobs, entropy, experience, **sizes)
        return loss * logprobs.sum(1).mean().square() + entropy.std(), metrics


CASES = {
    "dr_grpo": {"objective": ObjectiveConfig()},
    "bnpo": {"objective": ObjectiveConfig(loss_type="bnpo", beta=0.0)},
    "with a KL": {"objective": ObjectiveConfig(beta=0.1)},
    "with an entropy bonus": {"objective": ObjectiveConfig(entropy_coef=0.1)},
    "of the highest entropies": {"objective": ObjectiveConfig(top_entropy_quantile=0.3)},
    "of one's own": {"kind": Coupled, "objective": ObjectiveConfig(entropy_coef=0.1)},
}


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_the_undivided_micro_batch(tmp_path, tiny_model_path, name):
    whole, one, undivided = trained(tmp_path, tiny_model_path, None, **CASES[name])
    cut, other, passed = trained(tmp_path, tiny_model_path, 40, **CASES[name])
    assert passed > 3 * undivided
    start = module(tiny_model_path)
    start.configure_model()
    moved = largest_difference(parameters(whole), parameters(start))
    assert largest_difference(parameters(whole), parameters(cut)) < 1e-4 * moved and moved > 1e-5
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-4, abs=1e-7)
    assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)


@pytest.mark.parametrize("loss_type", PRESETS)
def test_off_policy_updates_are_those_of_undivided_micro_batches(tmp_path, tiny_model_path, loss_type):
    """Two updates on one rollout, whose groups need several passes: the ratio is exactly 1 in the first."""
    options = {"num_iterations": 2, "steps": 2, "objective": ObjectiveConfig(loss_type=loss_type)}
    whole, one, _ = trained(tmp_path, tiny_model_path, None, **options)
    cut, other, _ = trained(tmp_path, tiny_model_path, 14, **options)
    assert other["ratio/min"][0] == other["ratio/max"][0] == 1
    assert (other["ratio/max"][1] > 1) is PRESETS[loss_type].surrogate.uses_ratio
    assert other.steps[0].keys() == one.steps[0].keys()
    differing = ("time", "step_time", "tokens_per_second", "memory", "mfu")
    for ours, theirs in zip(other.steps, one.steps, strict=True):
        for name in ours:
            if not name.startswith(differing):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5, nan_ok=True), name
    assert largest_difference(parameters(whole), parameters(cut)) < 1e-6


def test_the_known_coefficient_is_used_in_every_pass(tmp_path, tiny_model_path, monkeypatch):
    used = []
    multiple = linear._multiple
    monkeypatch.setattr(linear, "_multiple", lambda *c: used.append(multiple(*c)) or used[-1])
    _, _, passed = trained(tmp_path, tiny_model_path, 40, objective=ObjectiveConfig(beta=0.0), accumulate=2)
    assert len(used) == passed and None not in used


@pytest.mark.parametrize("limit", [40, 14], ids=["several groups", "part of a group"])
def test_dropout_of_a_pass_is_that_of_its_score(tmp_path, tiny_model_path, limit):
    """Adapters with dropout: the first ratio is 1 only if scoring dropped the same units."""
    lora = {"lora": LoRA(rank=4, dropout=0.5), "num_iterations": 2, "steps": 2}
    _, record, _ = trained(tmp_path, tiny_model_path, limit, **lora)
    assert record["ratio/min"][0] == record["ratio/max"][0] == 1 and record["ratio/max"][1] > 1.001


def test_the_gradient_of_each_pass_is_scaled_in_half_precision(tmp_path, tiny_model_path):
    def run(limit):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        return trained(
            tmp_path, tiny_model_path, limit, trainer={"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]}
        )

    whole, one, _ = run(None)
    cut, other, passed = run(40)
    assert passed > 3
    assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-2)
    assert largest_difference(parameters(whole), parameters(cut)) < 1e-4


def test_a_run_with_passes_resumes_exactly(tmp_path, tiny_model_path):
    def run(root, resume=None):
        checkpoint = Checkpoint(str(root), every_n_train_steps=1, save_top_k=-1)
        trainer = {"callbacks": [checkpoint], "ckpt_path": resume, "enable_checkpointing": True}
        options = {"num_iterations": 2, "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3)}
        return trained(root, tiny_model_path, 40, accumulate=2, steps=4, trainer=trainer, **options)

    whole, record, _ = run(tmp_path / "whole")
    for step in (1, 2, 3):
        other, resumed, _ = run(tmp_path / f"from-{step}", str(tmp_path / "whole" / f"step-{step:06d}.ckpt"))
        assert resumed["loss"] == record["loss"][step:]
        assert largest_difference(parameters(other), parameters(whole)) == 0


@pytest.mark.slow
def test_two_ranks_run_passes_together(tmp_path, tiny_model_path):
    """Replicated and sharded weights are trained alike; sharded ones with as many passes on both ranks."""
    assert_two_ranks_succeed("tests/passes_on_ranks.py", str(tmp_path), tiny_model_path)


def passes_of_a_large_group(model, limit):
    """The gradients of eight completions of a prompt of 12 tokens, and the shape of each forward pass of the model."""
    torch.manual_seed(0)
    rows = Rollout.collate(
        [list(range(8, 20))], [[done(*range(20, 21 + n)) for n in (3, 0, 5, 2, 6, 1, 4, 0)]], pad_id=0
    )
    coefficient = torch.randn(rows.completion_mask.shape)
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("cpu")), global_rank=0)
    scorer = Scorer(temperature=0.7, share_prompt=True, seed=0, limit=limit)
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda module, args, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    model.zero_grad()
    with torch.no_grad():
        sequences = scorer.divide(model, rows, trainer)
        scores = {row: x for part, (logprobs, _) in scorer.passes(model, rows, sequences, trainer, 0, 0)
                  for row, x in zip(part, logprobs, strict=True)}  # fmt: skip
    shapes.clear()
    for part, (logprobs, _) in scorer.passes(model, rows, sequences, trainer, 0, 0):
        assert all(torch.equal(x, scores[row]) for row, x in zip(part, logprobs, strict=True))
        (logprobs * coefficient[part, : logprobs.shape[1]]).sum().backward()
    hook.remove()
    return [p.grad.clone() for p in model.parameters()], shapes


def test_a_group_that_needs_several_passes_computes_its_prompt_once(tiny_model_path):
    model = load_policy(tiny_model_path)
    passes_of_a_large_group(model, None)  # the first call probes the model
    whole, _ = passes_of_a_large_group(model, None)
    cut, shapes = passes_of_a_large_group(model, 24)
    assert shapes[0] == (1, 12) and len(shapes) > 3 and all(width < 7 for _, width in shapes[1:])
    assert sum(count for count, _ in shapes[1:]) == 8
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * float(one.abs().max()))


def test_a_model_that_can_not_share_prompts_has_the_same_gradient(tiny_model_path, caplog):
    model = load_policy(tiny_model_path)
    whole, _ = passes_of_a_large_group(model, None)
    model.gradient_checkpointing_enable()
    cut, _ = passes_of_a_large_group(model.train(), 24)
    for one, other in zip(whole, cut, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * float(one.abs().max()))
    assert sum("instead of once per group: gradient checkpointing" in record.message for record in caplog.records) == 1
