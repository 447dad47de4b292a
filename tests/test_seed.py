"""One seed for the samples and the data of a run, unless a part is given its own."""

import pytest
import yaml
from fitting import checksum, fit, module

from lightning_grpo import PromptDataModule
from lightning_grpo.cli import main


def run(root, path, monkeypatch, seed, **own):
    monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))  # what seed_everything leaves behind
    prompts = PromptDataModule("letters", size=26, prompts_per_rollout=8, seed=own.get("data"))
    policy = module(path, rewards=[checksum], seed=own.get("model"))
    record = fit(root, policy, prompts, steps=2)
    return record["loss"], record["reward"], prompts._stream.rows


def test_the_seed_of_everything_reaches_samples_and_data(tmp_path, tiny_model_path, monkeypatch):
    zero, one = (run(tmp_path, tiny_model_path, monkeypatch, seed) for seed in (0, 1))
    assert one == run(tmp_path, tiny_model_path, monkeypatch, 1)
    assert all(mine != its for mine, its in zip(zero, one, strict=True))
    assert one == run(tmp_path, tiny_model_path, monkeypatch, 5, model=1, data=1)
    mixed = run(tmp_path, tiny_model_path, monkeypatch, 1, model=0)
    assert mixed[2] == one[2] and mixed[1] != one[1]


def test_without_any_seed_it_is_0(tiny_model_path, monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert module(tiny_model_path).seed == PromptDataModule("letters").seed == 0


@pytest.mark.parametrize(("options", "seeds"), [([], (3, 3)), (["--data.seed", "7"], (3, 7))])
def test_the_command_line_takes_one_seed_and_keeps_it(tmp_path, tiny_model_path, monkeypatch, options, seeds):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    seen = []

    def look(self, trainer, pl_module):
        seen.append((pl_module.seed, trainer.datamodule.seed))

    monkeypatch.setattr("lightning_grpo.rollout.HFRollout.on_fit_start", look)
    # the run ends before its first step: there is no engine
    with pytest.raises(SystemExit):
        main([
            "fit", "--seed_everything", "3", "--model.model", tiny_model_path, "--model.rewards", "[PrefixMatch]",
            "--model.max_prompt_length", "8", "--model.max_completion_length", "6", "--data.source", "letters",
            "--data.size", "26", "--rollout", "HFRollout", "--trainer.default_root_dir", str(tmp_path),
            "--trainer.accelerator", "cpu", "--trainer.max_steps", "1", *options,
        ])  # fmt: skip
    assert seen == [seeds]
    config = yaml.safe_load(next(tmp_path.glob("logs/*/config.yaml")).read_text())
    assert config["seed_everything"] == 3
    assert config["data"]["init_args"]["seed"] == (seeds[1] if options else None)
