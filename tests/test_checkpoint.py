"""Checkpoint files: whole or not there, saved by time, in a folder that no other run uses."""

import os
import subprocess
import sys

import pytest
import torch
from fitting import data, fit, module

from lightning_grpo.errors import RunError, UserError
from lightning_grpo.monitor.checkpoint import Checkpoint
from lightning_grpo.monitor.checkpoint_files import CheckpointFiles, require_same_weights
from lightning_grpo.monitor.checkpoint_folder import FolderLock, family, newest, unused, user_of


def train(root, model, *, steps=1, resume=None, **settings):
    checkpoint = Checkpoint(**{"every_n_train_steps": 1} | settings)
    fit(
        root, module(model), data(), steps=steps, accumulate=2, ckpt_path=resume, callbacks=[checkpoint],
        enable_checkpointing=True,
    )  # fmt: skip
    return checkpoint


def own(**changes):
    return {"state_dict": {"w": torch.zeros(9)}, "pytorch-lightning_version": "2.6.6", "grpo": {"a": 1}} | changes


def test_a_full_disk_leaves_the_earlier_file_and_nothing_else(tmp_path, files_of_one_megabyte):
    path = tmp_path / "step-000001.ckpt"
    CheckpointFiles().save_checkpoint(own(), path)
    before = path.read_bytes()
    with pytest.raises(RunError, match=r"step-000001.ckpt could not be written: File too large"):
        CheckpointFiles().save_checkpoint(own(more=torch.zeros(2**20)), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    assert CheckpointFiles().load_checkpoint(path)["grpo"] == {"a": 1}


class Foreign:
    pass


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"w": torch.zeros(2)}, "contains only weights"),
        ([1, 2], "contains a list"),
        ({"state_dict": {}, "epoch": 1}, "was not saved by a run of lightning_grpo"),
        ({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, "it has no grpo"),
        ({"a": Foreign()}, "Python objects other than"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, content, named):
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match=named):
        CheckpointFiles().load_checkpoint(tmp_path / "a.ckpt")


@pytest.mark.parametrize("kept", [1, 100, 700, -1])
def test_a_truncated_file_is_refused(tmp_path, kept):
    path = tmp_path / "a.ckpt"
    torch.save(own(), path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match="can't be read: the file is incomplete"):
        CheckpointFiles().load_checkpoint(path)


def test_another_models_weights_are_refused():
    here = {"a": torch.zeros(2), "b": torch.zeros(3)}
    require_same_weights(here, dict(here))
    with pytest.raises(UserError, match="it lacks 1 tensors of this model, for example a"):
        require_same_weights(here, {"b": torch.zeros(3)})
    with pytest.raises(UserError, match="it has 1 tensors that this model lacks, for example c"):
        require_same_weights(here, here | {"c": torch.zeros(1)})
    with pytest.raises(UserError, match=r"b has shape \[4\] instead of \[3\]"):
        require_same_weights(here, here | {"b": torch.zeros(4)})


def test_a_fresh_run_leaves_the_folder_of_another_alone_and_last_is_the_newest(tmp_path, tiny_model_path):
    train(tmp_path, tiny_model_path)
    first = (tmp_path / "checkpoints" / "last.ckpt").read_bytes()
    train(tmp_path, tiny_model_path)
    assert (tmp_path / "checkpoints" / "last.ckpt").read_bytes() == first
    assert (tmp_path / "checkpoints-2" / "last.ckpt").exists()
    resumed = train(tmp_path, tiny_model_path, steps=2, resume="last")
    assert resumed.dirpath == str(tmp_path / "checkpoints-2")
    assert resumed.last_model_path.endswith("checkpoints-2/last.ckpt")
    resumed = train(tmp_path, tiny_model_path, steps=2, resume=str(tmp_path / "checkpoints" / "step-000001.ckpt"))
    assert resumed.dirpath == str(tmp_path / "checkpoints")
    assert not (tmp_path / "checkpoints-3").exists()
    assert not list(tmp_path.rglob(".lock"))


def test_folders(tmp_path):
    base = tmp_path / "checkpoints"
    assert (unused(base), newest(base)) == (base, base)
    for number, name in enumerate(["checkpoints", "checkpoints-2", "checkpoints-10", "checkpoints-x"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "last.ckpt").write_bytes(b"")
        os.utime(tmp_path / name / "last.ckpt", (number, number))
    assert [path.name for path in family(base)] == ["checkpoints", "checkpoints-2", "checkpoints-10"]
    assert unused(base).name == "checkpoints-11"
    assert newest(base).name == "checkpoints-10"


HOLDER = """
import sys
from pathlib import Path
from lightning_grpo.monitor.checkpoint_folder import FolderLock
lock = FolderLock(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_two_runs_in_one_folder_are_noticed_and_the_dead_are_not(tmp_path):
    folder = tmp_path / "checkpoints"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    assert user_of(folder).startswith(f"process {holder.pid} on ")
    with pytest.raises(UserError, match=rf"in use: process {holder.pid} on .*default_root_dir"):
        FolderLock(folder)
    assert unused(folder).name == "checkpoints-2"
    holder.kill()
    holder.communicate()
    assert (folder / ".lock").exists()
    assert user_of(folder) is None
    FolderLock(folder).release()
    assert not (folder / ".lock").exists()


def test_what_a_killed_run_left_half_written_is_removed(tmp_path):
    (tmp_path / ".step-000003.ckpt.part").write_bytes(b"half")
    FolderLock(tmp_path).release()
    assert not list(tmp_path.iterdir())


def test_time_alone_saves_too(tmp_path, tiny_model_path):
    train(tmp_path, tiny_model_path, steps=3, every_n_train_steps=0, every_n_minutes=1e-9, save_top_k=-1)
    saved = sorted(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
    assert saved == ["step-000001.ckpt", "step-000002.ckpt", "step-000003.ckpt"]


def test_of_checkpoints_that_are_not_among_the_best_the_newest_is_kept(tmp_path, tiny_model_path):
    settings = {"every_n_train_steps": 0, "every_n_minutes": 1e-9, "monitor": "reward"}
    train(tmp_path, tiny_model_path, steps=3, **settings)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["last.ckpt", "step-000003.ckpt"]
