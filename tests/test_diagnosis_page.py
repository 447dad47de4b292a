"""The page about the diagnosis is that of the code, and its examples run."""

import re
from pathlib import Path

import yaml
from diagnosis_table import page
from histories import run
from jsonargparse import ArgumentParser

from lightning_grpo.diagnosis import Diagnosis
from lightning_grpo.diagnosis.rules import RULES

PAGE = Path(__file__).parents[1] / "docs" / "diagnosis.md"


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), re.DOTALL)


def test_the_page_is_current():
    assert PAGE.read_text() == page(), "run: python docs/diagnosis_table.py > docs/diagnosis.md"


def test_the_page_lists_every_rule():
    assert all(f"`{rule.name}`<br>" in page() for rule in RULES)
    assert all(rule.source for rule in RULES)


def test_the_pages_examples_run(tmp_path, monkeypatch):
    (code,) = snippets("python")
    (tmp_path / "mine.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    built_in, own = (build(text) for text in snippets("yaml"))
    (rule,) = [rule for rule in built_in.rules.rules if rule.name == "dead_groups"]
    assert rule.share == 0.5 and len(built_in.rules.rules) == len(RULES)
    findings, _ = run(30, rules=own.rules, changes={"completions/mean_length": 60.0}, at=15)
    assert [(finding.rule, finding.message) for finding in findings] == [
        ("short_answers", "completions have 60 tokens")
    ]


def build(text: str) -> Diagnosis:
    """The callback as the command line builds it."""
    parser = ArgumentParser()
    parser.add_class_arguments(Diagnosis, "diagnosis")
    return parser.instantiate_classes(parser.parse_object(yaml.safe_load(text))).diagnosis
