"""The diagnosis during training."""

import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from fitting import checksum, fit, module

from lightning_grpo.diagnosis import Diagnosis, Finding, History, Rule
from lightning_grpo.errors import RunError, UserError
from lightning_grpo.monitor.checkpoint import Checkpoint


class Always(Rule):
    """Finds something in every step, and names the longest completions."""

    name: ClassVar[str] = "always"
    severity: ClassVar[str] = "critical"

    def is_due(self, history: History) -> bool:
        return True

    def check(self, history: History) -> Finding | None:
        return self.finding(history, "a step was taken", evidence=["reward"], change={"model.num_generations": 8})

    def choose(self, rows):
        return sorted(rows, key=lambda row: len(row["completion_ids"]), reverse=True)


class Fails(Always):
    name: ClassVar[str] = "fails"

    def check(self, history: History) -> Finding | None:
        raise ValueError("a fault of the rule")


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "findings.jsonl").read_text().splitlines()]


def test_a_finding_is_reported_once_with_its_samples(tiny_model_path, tmp_path, caplog):
    diagnosis = Diagnosis(rules=[Always()])
    fit(tmp_path, module(tiny_model_path, rewards=[checksum]), callbacks=[diagnosis], steps=3, accumulate=2)
    (line,) = lines(tmp_path)
    assert line["rule"] == "always" and line["step"] == line["since"] == 1
    assert line["change"] == {"model.num_generations": 8}
    assert [row["step"] for row in line["samples"]] == [1] * 4
    # the first optimizer step is on the first two micro-batches of 8, which are the groups 0 to 3
    assert {row["group"] for row in line["samples"]} <= set(range(4))
    assert diagnosis.history.step == 3 and len(diagnosis.history.series("reward")) == 3
    (record,) = [r for r in caplog.records if "always" in r.message]
    assert len(record.message.splitlines()) <= 3 and "--model.num_generations 8" in record.message


def test_the_samples_are_those_of_the_step(tiny_model_path, tmp_path):
    """The second optimizer step has the groups 4 to 7, with rewards that average to the logged one."""
    seen = {}

    class Looks(Always):
        def check(self, history: History) -> Finding | None:
            seen[history.step] = history.samples(history.step), history.latest["reward"]
            return None

    fit(tmp_path, module(tiny_model_path, rewards=[checksum]), callbacks=[Diagnosis(rules=[Looks()])], accumulate=2)
    assert sorted({row["group"] for row in seen[2][0]}) == [4, 5, 6, 7]
    assert sorted({row["group"] for row in seen[3][0]}) == [0, 1, 2, 3]
    assert [rows[0]["rollout"] for rows, _ in seen.values()] == [0, 0, 1]
    for rows, reward in seen.values():
        assert sum(row["reward"] for row in rows) / len(rows) == pytest.approx(reward)
        assert len(rows) == 16 and rows[0]["index"] == 0


def test_a_rule_that_fails_is_reported_once_and_the_run_goes_on(tiny_model_path, tmp_path, caplog):
    record = fit(tmp_path, module(tiny_model_path), callbacks=[Diagnosis(rules=[Fails()])])
    assert len(record.steps) == 3
    assert [r.message for r in caplog.records if "fails" in r.message] == [
        "the diagnosis rule fails failed and is off: ValueError: a fault of the rule"
    ]


def test_halt_on_saves_a_checkpoint_and_stops(tiny_model_path, tmp_path):
    callbacks = [Diagnosis(rules=[Always()], halt_on="critical"), Checkpoint(str(tmp_path / "checkpoints"))]
    with pytest.raises(
        RunError, match=r"stopped after 1 optimizer steps, as diagnosis.halt_on is critical: a step was"
    ):
        fit(tmp_path, module(tiny_model_path), callbacks=callbacks, enable_checkpointing=True)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 1


def test_a_run_without_findings_writes_no_file(tiny_model_path, tmp_path):
    fit(tmp_path, module(tiny_model_path), callbacks=[Diagnosis(rules=[Always()], enabled=False)])
    assert not (tmp_path / "findings.jsonl").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"halt_on": "severe"}, "diagnosis.halt_on is 'severe'; set one of note, warning, critical, or null"),
        ({"ignore": ["dead"]}, "diagnosis.ignore names 'dead'; set names of rules: clipping, dead_groups"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        Diagnosis(**options)
