"""Learning-rate schedules against those of transformers, and weight decay without norms and biases."""

from functools import partial

import pytest
import torch
from fitting import fit, module
from torch import nn
from torch.optim import SGD, AdamW, Rprop
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, get_scheduler

from lightning_grpo.errors import UserError
from lightning_grpo.monitor.checkpoint import Checkpoint
from lightning_grpo.training.optimizers import Optimization
from lightning_grpo.training.schedules import Cosine, Linear, Polynomial, Schedule, WarmupStableDecay, describe

STEPS = 20
LR = 1e-3
WSD = "warmup_stable_decay"


class Run:
    """What a schedule asks of a Trainer."""

    def __init__(self, steps: float) -> None:
        self.estimated_stepping_batches, self.max_steps, self.max_epochs, self.precision = steps, steps, -1, "32-true"


def rates(scheduler, optimizer) -> list[float]:
    found = []
    for _ in range(STEPS):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def ours(**options) -> list[float]:
    built = Optimization(partial(SGD, lr=LR), **options).configure([nn.Parameter(torch.zeros(1))], Run(STEPS))
    return rates(built["lr_scheduler"]["scheduler"], built["optimizer"])


def theirs(name: str, warmup: int, **options) -> list[float]:
    optimizer = SGD([nn.Parameter(torch.zeros(1))], lr=LR)
    return rates(get_scheduler(name, optimizer, warmup, STEPS, options), optimizer)


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize(
    ("schedule", "name", "options"),
    [
        ("constant", "constant_with_warmup", {}),
        ("linear", "linear", {}),
        ("cosine", "cosine", {}),
        (Cosine(minimum=0.1), "cosine_with_min_lr", {"min_lr_rate": 0.1}),
        (Linear(minimum=0.25), "polynomial", {"lr_end": 0.25 * LR}),
        ("polynomial", "polynomial", {"lr_end": 0.0}),
        (Polynomial(power=2, minimum=0.1), "polynomial", {"lr_end": 0.1 * LR, "power": 2.0}),
        (WarmupStableDecay(decay=6), WSD, {"num_decay_steps": 6}),
        (WarmupStableDecay(decay=6, shape="linear"), WSD, {"num_decay_steps": 6, "decay_type": "linear"}),
        (WarmupStableDecay(decay=6, shape="1-sqrt"), WSD, {"num_decay_steps": 6, "decay_type": "1-sqrt"}),
    ],
    ids=[
        "constant", "linear", "cosine", "minimum", "linear minimum", "polynomial", "power", "wsd", "wsd linear",
        "wsd sqrt",
    ],
)  # fmt: skip
def test_schedules_are_those_of_transformers(schedule, name, options, warmup):
    assert ours(lr_schedule=schedule, warmup_steps=warmup) == pytest.approx(theirs(name, warmup, **options), rel=1e-12)


def test_a_minimum_holds_at_the_end_of_a_decay():
    last = ours(lr_schedule=WarmupStableDecay(decay=10, minimum=0.2, shape="linear"))[-1]
    assert last == pytest.approx(LR * (0.2 + 0.8 * (1 - 9 / 10)))
    assert ours(lr_schedule=WarmupStableDecay(decay=0.5)) == ours(lr_schedule=WarmupStableDecay(decay=10))


@pytest.mark.parametrize("share", [0.05, 0.12, 0.5])
def test_a_warmup_below_one_is_a_share_as_in_transformers(share):
    steps = TrainingArguments(warmup_steps=share, use_cpu=True).get_warmup_steps(STEPS)
    assert ours(warmup_steps=share) == pytest.approx(theirs("constant_with_warmup", steps))


def test_a_share_needs_an_end():
    with pytest.raises(UserError, match=r"warmup_steps is 0.1, .* training has no end"):
        Optimization(SGD, warmup_steps=0.1).configure([nn.Parameter(torch.zeros(1))], Run(float("inf")))


class Halving(Schedule):
    """Halves the learning rate at each step."""

    needs_end = False

    def __call__(self, step: int, steps: int) -> float:
        return 0.5**step


def test_a_schedule_of_ones_own():
    assert ours(lr_schedule=Halving())[:3] == [LR, LR / 2, LR / 4]


def test_a_schedule_is_described_by_its_name_or_its_options():
    assert describe(Cosine()) == "cosine" and describe(WarmupStableDecay()) == WSD
    assert describe(Cosine(minimum=0.1)) == "Cosine(minimum=0.1)"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Optimization(SGD, lr_schedule="step"), "lr_schedule is 'step'; set one of constant"),
        (lambda: Optimization(SGD, warmup_steps=2.5), "warmup_steps is 2.5; set a whole number"),
        (lambda: WarmupStableDecay(decay=1.5), "lr_schedule.decay is 1.5; set a whole number"),
        (lambda: Optimization(Rprop, decay_norms_and_biases=False).check(), "Rprop has no weight decay"),
    ],
    ids=["name", "warmup", "decay", "optimizer"],
)
def test_what_cannot_be_is_refused(build, message):
    with pytest.raises(UserError, match=message):
        build()


def test_norms_and_biases_without_decay_are_those_of_transformers(untied_model_path):
    model = AutoModelForCausalLM.from_pretrained(untied_model_path)
    optimizer = Optimization(partial(AdamW, weight_decay=0.1), decay_norms_and_biases=False).build(model.parameters())
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, others = ({names[id(p)] for p in group["params"]} for group in optimizer.param_groups)
    assert decayed == set(Trainer.get_decay_parameter_names(None, model))
    assert decayed | others == set(names.values()) and any("bias" in name for name in others)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]


def run(root, model, *, steps, resume=None, **changes):
    policy = module(model, optimizer=partial(AdamW, lr=1e-3, weight_decay=0.1), **changes)
    checkpoint = Checkpoint(str(root), every_n_train_steps=1, save_top_k=-1)
    return fit(root, policy, steps=steps, ckpt_path=resume, callbacks=[checkpoint], enable_checkpointing=True)


def test_a_run_with_two_groups_and_a_decay_resumes(tmp_path, tiny_model_path):
    changes = {"decay_norms_and_biases": False, "lr_schedule": WarmupStableDecay(decay=2), "warmup_steps": 0.25}
    whole = run(tmp_path / "whole", tiny_model_path, steps=4, **changes)
    saved = str(tmp_path / "whole" / "step-000002.ckpt")
    resumed = run(tmp_path / "on", tiny_model_path, steps=4, resume=saved, **changes)
    for name in ("loss", "learning_rate", "grad_norm"):
        assert resumed[name] == whole[name][2:]
    with pytest.raises(UserError, match="decay_norms_and_biases is true, but the checkpoint's optimizer was built"):
        run(tmp_path / "other", tiny_model_path, steps=4, resume=saved)
