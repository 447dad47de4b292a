"""Bad input on the command line ends with one line that names option or file, value, cause and remedy.

A row is what is wrong with a run that is otherwise `configs/smoke.yaml`, and what its message must contain. ``{tmp}``
in an option is the test's folder, where ``files`` are written first.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lightning_grpo.cli import main

ROOT = Path(__file__).parent.parent


@dataclass
class Row:
    name: str
    options: list[str]
    fragments: list[str]
    command: str = "fit"
    files: dict[str, bytes] = field(default_factory=dict)


TYPOS = [
    Row("in a model option", ["--model.num_generation", "4"], ["--model.num_generation", "--model.num_generations?"]),
    Row("in a group", ["--trainr.max_steps", "4"], ["--trainr.max_steps", "did you mean --trainer.max_steps?"]),
    Row("group left out", ["--num_generations", "4"], ["did you mean --model.num_generations?"]),
    Row(
        "ambiguous", ["--model.objective.epsilo", ".1"], ["--model.objective.epsilon or --model.objective.epsilon_high"]
    ),
    Row("in a class", ["--model.rewards", "[ExactMach]"], ["--model.rewards", "no class ExactMach", "ExactMatch"]),
    Row("rollout class", ["--rollout", "HFRolout"], ["--rollout", "no class HFRolout", "HFRollout"]),
    Row("value", ["--model.dtype", "int8"], ["--model.dtype is int8", "float32, bfloat16, float16"]),
    Row("no number", ["--trainer.max_steps", "many"], ["--trainer.max_steps is many", "an integer"]),
    Row("no module", ["--model", "mine.Nope"], ["--model is mine.Nope", "No module named 'mine'"]),
    Row("one reward", ["--model.rewards", "ExactMatch"], ["--model.rewards is ExactMatch", "set it to [ExactMatch]"]),
    Row("TRL's name", ["--learning_rate", "1e-6"], ["--learning_rate: no such", "did you mean --model.optimizer.lr?"]),
    Row("stray word", ["extra"], ["extra: unexpected argument"]),
    Row("value missing", ["--trainer.max_steps"], ["--trainer.max_steps", "expected one argument"]),
    Row("missing option", ["--data", "PromptDataModule", "--data.source=null"], ["data.source"]),
]

CONFIG_FILES = [
    Row("no such file", ["--config", "configs/smok.yaml"], ["configs/smok.yaml", "did you mean configs/smoke.yaml?"]),
    Row("a folder", ["--config", "{tmp}"], ["--config {tmp} is not a file"]),
    Row("not UTF-8", ["--config", "{tmp}/a.yaml"], ["a.yaml is not UTF-8", "0xff"], files={"a.yaml": b"\xff\xfea: 1"}),
    Row("not YAML", ["--config", "{tmp}/a.yaml"], ["a.yaml, line 1", "not valid YAML"], files={"a.yaml": b"a: ]"}),
    Row("a tab", ["--config", "{tmp}/a.yaml"], ["a.yaml, line 2"], files={"a.yaml": b"trainer:\n\tmax_steps: 1"}),
    Row("empty", ["--config", "{tmp}/a.yaml"], ["a.yaml is empty"], files={"a.yaml": b""}),
    Row("a list", ["--config", "{tmp}/a.yaml"], ["a.yaml is a list"], files={"a.yaml": b"- 1"}),
    Row(
        "an unknown option",
        ["--config", "{tmp}/a.yaml"],
        ["--model.num_generation in {tmp}/a.yaml", "did you mean --model.num_generations?"],
        files={"a.yaml": b"model: {init_args: {num_generation: 4}}"},
    ),
]

OPTIONS = [
    Row("one generation", ["--model.num_generations", "1"], ["num_generations is 1", "set 2 or more"]),
    Row("no prompts per rollout", ["--data.prompts_per_rollout", "0"], ["prompts_per_rollout is 0", "set 1 or more"]),
    Row("loss_type", ["--model.objective.loss_type", "ppo"], ["loss_type is 'ppo'"]),
    Row("seed", ["--seed_everything", "-1"], ["seed_everything is -1", "0 to 4294967295"]),
    Row("max_steps", ["--trainer.max_steps", "-5"], ["trainer.max_steps is -5", "-1 or more"]),
    Row("clipping", ["--trainer.gradient_clip_val", "-1"], ["trainer.gradient_clip_val is -1", "0 or more"]),
    Row("infinite clipping", ["--trainer.gradient_clip_val", ".inf"], ["trainer.gradient_clip_val is inf"]),
    Row("accumulation", ["--trainer.accumulate_grad_batches", "0"], ["trainer.accumulate_grad_batches is 0"]),
    Row("not a number", ["--model.sampling.temperature", ".nan"], ["sampling.temperature is nan"]),
    Row("negative rate", ["--model.optimizer.lr", "-1"], ["model.optimizer: Invalid learning rate: -1"]),
    Row("infinite rate", ["--model.optimizer.lr", ".inf"], ["model.optimizer.lr is inf", "finite"]),
    Row("schedule", ["--model.lr_schedule", "step"], ["lr_schedule is step", "set one of constant, linear, cosine"]),
    Row("schedule's class", ["--model.lr_schedule", "Cosin"], ["no class Cosin", "did you mean Cosine?"]),
    Row("accelerator", ["--trainer.accelerator", "gpuu"], ["accelerator", "gpuu"]),
    Row("devices", ["--trainer.devices", "0"], ["trainer: ", "devices"]),
    Row("no root", ["--trainer.default_root_dir", "/dev/null/runs"], ["default_root_dir is /dev/null/runs", "another"]),
    Row("save_top_k", ["--checkpoint.save_top_k", "-2"], ["checkpoint.save_top_k is -2", "-1"]),
    Row("minutes", ["--checkpoint.every_n_minutes", "0"], ["checkpoint.every_n_minutes is 0", "above 0"]),
    Row("nothing held out", [], ["predict has nothing to do", "data.validation_size"], command="predict"),
    Row("limit of 0", [], ["trainer.limit_val_batches is 0", "validate has nothing to do"], command="validate"),
]

CHECKPOINTS = [
    Row("none", ["--ckpt_path", "{tmp}/none.ckpt"], ["ckpt_path {tmp}/none.ckpt does not exist", "has no .ckpt file"]),
    Row("folder", ["--ckpt_path", "{tmp}"], ["ckpt_path {tmp} is a folder", "set it to a .ckpt file"]),
    Row("best", ["--ckpt_path", "best"], ["ckpt_path is best", "last"]),
    Row("no last", ["--ckpt_path", "last"], ["ckpt_path is last", "has no checkpoint"], command="test"),
    Row("empty", ["--ckpt_path", "{tmp}/a.ckpt"], ["a.ckpt is an empty file"], files={"a.ckpt": b""}),
    Row("noise", ["--ckpt_path", "{tmp}/a.ckpt"], ["a.ckpt can't be read"], files={"a.ckpt": bytes(range(256)) * 9}),
]

DATA: list[Row] = []

MODEL: list[Row] = []


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    # Lightning's log handler keeps the stderr of the first test
    monkeypatch.setattr("logging.raiseExceptions", False)


@pytest.mark.parametrize(
    "row", [*TYPOS, *CONFIG_FILES, *OPTIONS, *CHECKPOINTS, *DATA, *MODEL], ids=lambda row: row.name
)
def test_bad_input_ends_with_one_line(row, tmp_path, capsys):
    for name, content in row.files.items():
        (tmp_path / name).write_bytes(content)
    options = [option.replace("{tmp}", str(tmp_path)) for option in row.options]
    base = ["--config", str(ROOT / "configs/smoke.yaml"), "--trainer.default_root_dir", str(tmp_path / "runs")]
    with pytest.raises(SystemExit) as stop:
        main([row.command, *base, "--trainer.max_steps", "1", *options])
    assert stop.value.code in (1, 2)
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and err.rstrip().endswith(errors[0]), err
    assert "Traceback" not in err
    for fragment in row.fragments:
        assert fragment.replace("{tmp}", str(tmp_path)) in errors[0]


def test_the_extra_that_an_environment_needs_is_named(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "verifiers", None)
    environment = "{class_path: lightning_grpo.environments.VerifiersEnvironment, init_args: {name: game}}"
    root = ["--trainer.default_root_dir", str(tmp_path)]
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(ROOT / "configs" / "smoke.yaml"), "--model.environment", environment, *root])
    assert (
        "error: the environment 'game' needs verifiers, which is not installed; run pip install "
        "'lightning-grpo[verifiers]'"
    ) in capsys.readouterr().err
