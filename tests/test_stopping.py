"""Signals while a run trains: it stops at a safe point with a checkpoint from which it goes on exactly."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fitting import checksum, data, fit, largest_difference, module, parameters
from lightning import Callback

from lightning_grpo.cli import farewell, resuming_command
from lightning_grpo.monitor.checkpoint import Checkpoint
from lightning_grpo.monitor.stop import StopOnSignal
from lightning_grpo.rewards import PrefixMatch
from lightning_grpo.stopping import Stopped, abandonable, stop_on_signals

ROOT = Path(__file__).parent.parent
STEPS = 4


class SignalAt(Callback):
    """Sends this process a signal at the n-th call of a hook."""

    def __init__(self, hook, n, signum=signal.SIGTERM):
        self.left, self.signum = n, signum
        setattr(self, hook, self.count)

    def count(self, *args):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), self.signum)


def train(root, model, *, callbacks=(), rewards=None, resume=None, **trainer):
    """Two rollouts, each of two optimizer steps of two micro-batches."""
    policy = module(model, rewards=rewards or [PrefixMatch(), checksum])
    record = fit(
        root, policy, data(), steps=STEPS, accumulate=2, ckpt_path=resume, enable_checkpointing=True,
        callbacks=[StopOnSignal(), Checkpoint(), *callbacks], **trainer,
    )  # fmt: skip
    return record, policy


@pytest.mark.parametrize(
    ("hook", "n"),
    [
        ("on_train_batch_start", 2),
        ("on_before_backward", 3),
        ("on_after_backward", 4),
        ("on_before_optimizer_step", 2),
        ("on_before_zero_grad", 2),
        ("on_train_batch_end", 6),
    ],
)
def test_a_stopped_run_goes_on_exactly(tmp_path, tiny_model_path, hook, n):
    whole, ended = train(tmp_path / "whole", tiny_model_path)
    with stop_on_signals(), pytest.raises(Stopped) as stop:
        train(tmp_path / "stopped", tiny_model_path, callbacks=[SignalAt(hook, n)])
    assert stop.value.exit_code == 143
    assert Path(stop.value.saved).resolve().parent == tmp_path / "stopped" / "checkpoints"
    resumed, policy = train(tmp_path / "stopped", tiny_model_path, resume="last")
    done = STEPS - len(resumed.steps)
    assert f"{done} optimizer steps" == stop.value.progress
    for name in ("loss", "reward", "grad_norm", "num_tokens"):
        assert resumed[name] == whole[name][done:], name
    assert largest_difference(parameters(policy), parameters(ended)) == 0


class Patience:
    """A reward that takes a minute over the n-th rollout, and sends itself a signal."""

    def __init__(self, rollouts):
        self.rollouts = rollouts

    def __call__(self, completion_ids, **columns):
        self.rollouts -= 1
        if self.rollouts == 0:
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            time.sleep(60)
        return checksum(completion_ids)


def test_a_rollout_is_broken_off(tmp_path, tiny_model_path):
    began = time.monotonic()
    with stop_on_signals(), pytest.raises(Stopped) as stop:
        train(tmp_path, tiny_model_path, rewards=[PrefixMatch(), Patience(2).__call__])
    assert time.monotonic() - began < 60
    assert (stop.value.exit_code, stop.value.progress) == (130, "2 optimizer steps")
    assert (tmp_path / "checkpoints" / "last.ckpt").resolve().name == "step-000002.ckpt"


def test_validation_is_left(tmp_path, tiny_model_path):
    settings = {"limit_val_batches": 1.0, "val_check_interval": 2, "num_sanity_val_steps": 0}
    with stop_on_signals(), pytest.raises(Stopped) as stop:
        fit(
            tmp_path, module(tiny_model_path), data(validation_size=4), steps=STEPS, accumulate=2,
            enable_checkpointing=True, callbacks=[StopOnSignal(), Checkpoint(), SignalAt("on_validation_start", 1)],
            **settings,
        )  # fmt: skip
    assert stop.value.progress == "1 optimizer steps"
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()


def test_before_training_nothing_is_saved(tmp_path, tiny_model_path):
    with stop_on_signals(), pytest.raises(Stopped) as stop:
        train(tmp_path, tiny_model_path, callbacks=[SignalAt("on_fit_start", 1, signal.SIGINT)])
    assert stop.value.progress is None
    assert not list(tmp_path.rglob("*.ckpt"))
    assert farewell(stop.value, []) == ["stopped by Ctrl-C before training began: nothing was changed"]


class InTheWay(Callback):
    """A folder where the file of a checkpoint would be written."""

    def on_train_start(self, trainer, *args):
        Path(trainer.default_root_dir, "checkpoints", ".step-000001.ckpt.part").mkdir()


def test_why_nothing_could_be_saved_is_said(tmp_path, tiny_model_path):
    with stop_on_signals(), pytest.raises(Stopped) as stop:
        train(tmp_path, tiny_model_path, callbacks=[SignalAt("on_train_batch_start", 3), InTheWay()])
    assert stop.value.saved is None
    (line,) = farewell(stop.value, [])
    assert line.startswith("stopped by SIGTERM after 1 optimizer steps, without a checkpoint: the checkpoint ")
    assert "could not be written" in line


def test_handlers_are_put_back_and_no_signal_is_taken_outside():
    before = signal.getsignal(signal.SIGTERM)
    with stop_on_signals():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before

    class Alone:
        world_size = 1

    with abandonable(Alone()):
        pass


def test_the_command_to_go_on():
    args = ["fit", "--config", "a b.yaml", "--ckpt_path", "old.ckpt", "--trainer.max_steps", "9"]
    expected = "lightning-grpo fit --config 'a b.yaml' --trainer.max_steps 9 --ckpt_path last"
    assert resuming_command(args) == expected
    assert resuming_command(["fit", "--ckpt_path=last"]) == "lightning-grpo fit --ckpt_path last"


# ── Real processes ────────────────────────────────────────────────────────────────────────────────────────────────

SLOW_REWARD = """
import time
from lightning_grpo.rewards import Reward

class Slow(Reward):
    def __call__(self, completions, **columns):
        try:
            print("scoring", flush=True)
            time.sleep(120)
        except BaseException:  # as careless code does
            print("caught", flush=True)
            time.sleep(120)
        return [0.0 for _ in completions]
"""


def start(root, *options):
    (root / "slow.py").write_text(SLOW_REWARD)
    command = [
        sys.executable, "-m", "lightning_grpo", "fit", "--config", str(ROOT / "configs/smoke.yaml"),
        "--model.model", str(ROOT / "configs/tiny"), "--trainer.default_root_dir", str(root),
        "--trainer.max_steps", "400", *options,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=root, env=environment,
        start_new_session=True,
    )  # fmt: skip


def wait_for(process, text):
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            return seen
    raise AssertionError(f"{text!r} did not come:\n{seen}")


@pytest.mark.slow
def test_ctrl_c_at_start_up_is_one_line(tmp_path):
    process = start(tmp_path)
    wait_for(process, "Seed set to")
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in rest and "stopped by Ctrl-C before training began" in rest


@pytest.mark.slow
def test_sigterm_saves_and_the_printed_command_goes_on(tmp_path):
    process = start(tmp_path)
    wait_for(process, "step 3/")
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 143
    assert "Traceback" not in rest and "checkpoint: checkpoints/step-0000" in rest
    assert "--ckpt_path last" in rest.splitlines()[-1]


@pytest.mark.slow
def test_a_second_ctrl_c_ends_at_once(tmp_path):
    process = start(tmp_path, "--model.rewards+=slow.Slow")
    wait_for(process, "scoring")
    process.send_signal(signal.SIGINT)
    wait_for(process, "caught")
    time.sleep(1.5)  # within a second it would count as the same
    process.send_signal(signal.SIGINT)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "ending immediately, without a checkpoint" in rest and "Traceback" not in rest


@pytest.mark.slow
def test_two_ranks_stop_together(tmp_path):
    options = ["--trainer.devices", "2", "--trainer.strategy", "ddp", "--model.micro_batch_size", "104"]
    process = start(tmp_path, *options)
    wait_for(process, "step 2/")
    process.send_signal(signal.SIGTERM)  # to the first rank alone, as schedulers may
    rest, _ = process.communicate(timeout=120)
    assert process.returncode == 143, rest
    assert "Traceback" not in rest and rest.count("resume with") == 1
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()
