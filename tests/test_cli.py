"""The command line as a person uses it."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from lightning_grpo.cli import main
from lightning_grpo.training.batching import check_batch_arithmetic

ROOT = Path(__file__).parent.parent
CONSOLE_SCRIPT = str(Path(sys.executable).parent / "lightning-grpo")
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def smoke(root: Path, *options: str) -> list[str]:
    return [
        "fit", "--config", str(ROOT / "configs/smoke.yaml"), "--trainer.default_root_dir", str(root),
        "--trainer.max_steps", "2",
        *options,
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("command", [["-m", "lightning_grpo"], [CONSOLE_SCRIPT]])
def test_module_and_console_script(command):
    prefix = [sys.executable] if command[0] == "-m" else []
    done = subprocess.run([*prefix, *command, "--help"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    for name in ("fit", "validate", "test", "predict", "configure"):
        assert name in done.stdout


def test_fit_writes_metrics_config_and_checkpoint(tmp_path, capsys):
    options = ["--data.validation_size", "2", "--data.size", "30", "--trainer.limit_val_batches", "1.0"]
    main(smoke(tmp_path, *options))
    out = capsys.readouterr().out
    logs = tmp_path / "logs" / "version_0"
    header = (logs / "metrics.csv").read_text().splitlines()[0].split(",")
    assert "reward" in header and "frac_reward_zero_std" in header
    config = yaml.safe_load((logs / "config.yaml").read_text())
    assert config["model"]["init_args"]["num_generations"] == 16
    assert list(logs.glob("events.out.tfevents.*"))
    assert (tmp_path / "checkpoints" / "last.ckpt").exists()
    assert f"checkpoint: {tmp_path}/checkpoints/last.ckpt" in out
    assert str(logs) in out
    # a second start keeps the first one's logs and finds its checkpoint
    main(smoke(tmp_path, *options, "--trainer.max_steps", "3", "--ckpt_path", "last"))
    rows = csv.DictReader((tmp_path / "logs" / "version_1" / "metrics.csv").open())
    assert len([row for row in rows if row["reward"]]) == 1
    assert (logs / "metrics.csv").exists()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_every_config_composes(config, capsys):
    """Whole configurations alone, overlays on base.yaml; batches must divide in all of them."""
    whole = ("base", "smoke", "quickstart", "calculator", "guess")
    base = [] if config.stem in whole else ["--config", "configs/base.yaml"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *base, "--config", str(config), "--print_config"])
    assert stop.value.code in (0, None)
    composed = yaml.safe_load(capsys.readouterr().out)
    model, data = composed["model"]["init_args"], composed["data"]["init_args"]
    check_batch_arithmetic(
        prompts_per_rollout=data["prompts_per_rollout"],
        num_generations=model["num_generations"],
        micro_batch_size=model["micro_batch_size"],
        accumulate_grad_batches=composed["trainer"]["accumulate_grad_batches"],
    )
    assert_holds(composed, yaml.safe_load(config.read_text()))


def assert_holds(composed, asked):
    """Everything the overlay says is in the composition."""
    if isinstance(asked, dict):
        for key in asked:
            assert_holds(composed[key], asked[key])
    elif not isinstance(asked, list):
        assert composed == asked


def test_environment_variables_stand_below_files_and_flags(monkeypatch, capsys):
    monkeypatch.setenv("LIGHTNING_GRPO_FIT__TRAINER__GRADIENT_CLIP_ALGORITHM", "value")
    monkeypatch.setenv("LIGHTNING_GRPO_FIT__TRAINER__MAX_STEPS", "77")
    with pytest.raises(SystemExit):
        main(["fit", "--config", "configs/smoke.yaml", "--print_config"])
    trainer = yaml.safe_load(capsys.readouterr().out)["trainer"]
    assert trainer["gradient_clip_algorithm"] == "value"
    assert trainer["max_steps"] == 80


SUBCLASS = '''
from lightning_grpo import GRPOModule
from lightning_grpo.rewards import Reward

class Shout(Reward):
    """One for every capital letter."""
    def __call__(self, completions, **columns):
        return [float(c.isupper()) for c in completions]

class Halved(GRPOModule):
    """Advantages times a factor.

    Args:
        factor: of the advantages.
    """
    def __init__(self, *args, factor: float = 0.5, **kwargs):
        super().__init__(*args, **kwargs)
        self.factor = factor

    def compute_advantages(self, rewards, rollout):
        return self.factor * super().compute_advantages(rewards, rollout)
'''


def test_a_subclass_in_its_own_file_is_driven_from_yaml(tmp_path):
    (tmp_path / "mine.py").write_text(SUBCLASS)
    overlay = {
        "model": {"class_path": "mine.Halved", "init_args": {"factor": 0.25, "model": str(ROOT / "configs/tiny")}}
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(overlay))
    done = subprocess.run(
        [CONSOLE_SCRIPT, *smoke(tmp_path, "--config", "mine.yaml", "--model.rewards+=mine.Shout")],
        capture_output=True, text=True, timeout=120, cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    config = yaml.safe_load((tmp_path / "logs" / "version_0" / "config.yaml").read_text())
    assert config["model"]["class_path"] == "mine.Halved"
    assert config["model"]["init_args"]["factor"] == 0.25
    assert "rewards/shout/mean" in (tmp_path / "logs" / "version_0" / "metrics.csv").read_text()


def test_predict_writes_completions(tmp_path):
    main([
        "predict", "--config", "configs/smoke.yaml", "--trainer.default_root_dir", str(tmp_path),
        "--data.validation_size", "3", "--data.size", "30", "--model.validation_generations", "2",
    ])  # fmt: skip
    lines = next(tmp_path.glob("logs/version_*/predictions-0.jsonl")).read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert len(records) == 6
    assert records[0].keys() == {"prompt", "completion", "rewards", "truncated"}
    assert records[0]["prompt"] == records[1]["prompt"] != records[2]["prompt"]


@pytest.mark.parametrize("command", ["validate", "test"])
def test_validate_and_test(tmp_path, capsys, command):
    main([
        command, "--config", "configs/smoke.yaml", "--trainer.default_root_dir", str(tmp_path),
        "--trainer.limit_val_batches", "1.0", "--data.validation_size", "3", "--data.size", "30",
    ])  # fmt: skip
    assert f"{'val' if command == 'validate' else 'test'}/pass@1" in capsys.readouterr().out


def test_what_fit_exports_is_validated_as_the_checkpoint_is(tmp_path, capsys):
    held_out = ["--trainer.limit_val_batches", "1.0", "--data.validation_size", "2", "--data.size", "30"]
    main(smoke(tmp_path, *held_out, "--trainer.limit_val_batches", "0"))
    policies = {
        "checkpoint": ["--ckpt_path", f"{tmp_path}/checkpoints/last.ckpt"],
        "folder": ["--model.model", f"{tmp_path}/checkpoints/last", "--model.from_scratch", "false"],
    }
    figures = {}
    for name, policy in policies.items():
        root = ["--trainer.default_root_dir", str(tmp_path / name)]
        main(["validate", "--config", "configs/smoke.yaml", *root, *held_out, *policy])
        (row,) = csv.DictReader((tmp_path / name / "logs" / "version_0" / "metrics.csv").open())
        figures[name] = {key: float(value) for key, value in row.items() if "completions/" in key or "reward" in key}
    assert figures["folder"] == figures["checkpoint"] and len(figures["folder"]) > 5


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--model.num_generation", "4"], "num_generation"),
        (["--model.num_generations", "1"], "num_generations is 1"),
        (["--model.objective.loss_type", "ppo"], "loss_type is 'ppo'"),
        (["--model.dtype", "int8"], "int8"),
        (["--model.rewards", "[NoSuchReward]"], "NoSuchReward"),
        (["--data.prompts_per_rollout", "0"], "prompts_per_rollout is 0"),
    ],
)
def test_wrong_options_end_with_a_message(capsys, options, named):
    with pytest.raises(SystemExit) as stop:
        main([*smoke(Path("unused")), *options])
    assert stop.value.code not in (0, None)
    assert named in capsys.readouterr().err


def test_rare_trainer_options_have_a_help_of_their_own(capsys):
    texts = {}
    for option in ("--help", "--trainer.help"):
        with pytest.raises(SystemExit) as stop:
            main(["fit", option])
        assert stop.value.code in (0, None)
        texts[option] = capsys.readouterr().out
    for text in texts.values():
        assert "--trainer.max_steps" in text
    assert "--checkpoint.every_n_minutes" in texts["--help"]
    assert "--trainer.sync_batchnorm" not in texts["--help"]
    assert "--trainer.sync_batchnorm" in texts["--trainer.help"]


def test_a_logger_without_a_folder_and_a_foreign_one(tmp_path):
    (tmp_path / "logs" / "version_x").mkdir(parents=True)
    for number in range(2):
        main(smoke(tmp_path, "--trainer.logger", "lightning.pytorch.loggers.logger.DummyLogger"))
        assert (tmp_path / ("config.yaml", "config-2.yaml")[number]).exists()
    main(smoke(tmp_path))
    assert (tmp_path / "logs" / "version_0" / "config.yaml").exists()
