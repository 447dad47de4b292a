"""The objectives page is that of the code, and its examples run."""

import re
from dataclasses import fields
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from objectives_table import OPTIONS, page

from lightning_grpo.objective import PRESETS, AdvantageConfig, ObjectiveConfig, Surrogate, policy_loss
from lightning_grpo.objective.advantages import ESTIMATORS

PAGE = Path(__file__).parents[1] / "docs" / "objectives.md"


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_page_is_current():
    assert PAGE.read_text() == page(), "run: python docs/objectives_table.py > docs/objectives.md"


def test_the_page_lists_every_name():
    for name in [*PRESETS, *ESTIMATORS]:
        assert f"| `{name}` |" in page()


def test_the_options_listed_are_the_objectives():
    assert OPTIONS.keys() <= {f.name for f in fields(ObjectiveConfig)}


def test_the_pages_examples_run(tmp_path, monkeypatch):
    (code,) = snippets("python")
    (tmp_path / "my_project.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    parser = ArgumentParser()
    parser.add_argument("--model.objective", type=ObjectiveConfig)
    parser.add_argument("--model.advantage", type=AdvantageConfig, default=AdvantageConfig())
    first, own = (parser.instantiate_classes(parser.parse_string(text)).model for text in snippets("yaml"))
    assert first.objective.loss_type == "dapo" and first.objective.rollout_correction.upper == 2.0
    assert first.advantage.estimator == "leave_one_out"
    assert isinstance(own.objective.surrogate, Surrogate) and own.objective.surrogate.power == 0.7
    loss, _ = policy_loss(
        ObjectiveConfig(loss_type="dapo", surrogate=own.objective.surrogate),
        logprobs=torch.zeros(1, 2),
        old_logprobs=torch.full((1, 2), -1.0),
        advantages=torch.ones(1),
        mask=torch.ones(1, 2),
    )
    torch.testing.assert_close(loss, -torch.tensor(0.7).exp())
