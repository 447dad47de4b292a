"""SIGKILL, at the worst moments: what is on the disk then goes on exactly."""

import multiprocessing
import os
import signal

import pytest
from fitting import checksum, data, fit, largest_difference, module, parameters
from lightning import Callback

from lightning_grpo.monitor.checkpoint import Checkpoint

STEPS = 5
LLAMA = "transformers.models.llama.modeling_llama"


def kill_at(owner, name: str, n: int) -> None:
    """Make the n-th call of ``owner``'s ``name`` kill this process before anything is done."""
    original, calls = getattr(owner, name), []

    def replacement(*args, **kwargs):
        calls.append(args)
        if len(calls) == n:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, replacement)


class Hooks(Callback):
    """Something to kill at."""

    def on_after_backward(self, *args):
        """In an optimizer step."""

    def on_before_zero_grad(self, *args):
        """Where one begins or has just ended."""

    def on_train_batch_end(self, *args):
        """After a micro-batch."""


def train(root, model, name=None, n=0):
    """Two optimizer steps a rollout and two micro-batches a step; one checkpoint is kept."""
    hooks = Hooks()
    checkpoint = Checkpoint(str(root), every_n_train_steps=1, save_top_k=1)
    if name is not None:
        kill_at(os if hasattr(os, name) else hooks, name, n)
    resume = "last" if root.exists() and any(root.glob("*.ckpt")) else None
    policy = module(model, rewards=[checksum])
    record = fit(
        root, policy, data(), steps=STEPS, accumulate=2, ckpt_path=resume, callbacks=[hooks, checkpoint],
        enable_checkpointing=True,
    )  # fmt: skip
    return record, policy


@pytest.mark.slow
def test_a_run_killed_again_and_again_goes_on_exactly(tmp_path, tiny_model_path):
    whole, ended = train(tmp_path / "whole", tiny_model_path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["lightning_grpo.module", "lightning_grpo.monitor.checkpoint", LLAMA])
    root = tmp_path / "killed"
    # os.fsync: a file is written and has no name yet; symlink: it has, and is not the last; remove: an old one goes
    for name, n in [
        ("symlink", 1),
        ("on_after_backward", 4),
        ("symlink", 1),
        ("fsync", 2),
        ("remove", 1),
        ("on_train_batch_end", 2),
    ]:
        child = context.Process(target=train, args=(root, tiny_model_path, name, n))
        child.start()
        child.join(120)
        assert child.exitcode == -signal.SIGKILL, name
    record, policy = train(root, tiny_model_path)
    # nothing that had been saved was lost
    assert len(record.steps) == 1
    for name in ("loss", "reward", "grad_norm", "num_tokens"):
        assert record[name] == whole[name][-len(record.steps) :], name
    assert largest_difference(parameters(policy), parameters(ended)) == 0
