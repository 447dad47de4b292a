"""The diagnosis during training."""

import json
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from fitting import checksum, fit, module
from lightning import Callback
from lightning.pytorch.loggers import CSVLogger

from lightning_grpo.diagnosis import Diagnosis, Finding, History, Rule
from lightning_grpo.errors import NonFiniteError, RunError, UserError
from lightning_grpo.monitor.checkpoint import Checkpoint
from lightning_grpo.policy import load_tokenizer
from lightning_grpo.record.callback import Record


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


def run_until_nan(root: Path, policy, steps_before: int, breaks) -> tuple[NonFiniteError, dict]:
    """Train until ``breaks(policy)`` takes effect, and return the error and the saved batch."""

    class Break(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == steps_before and not hasattr(self, "done"):
                self.done = True
                breaks(pl_module)

    with pytest.raises(NonFiniteError) as raised:
        fit(root, policy, callbacks=[Break(), Diagnosis()], steps=4, accumulate=2)
    return raised.value, torch.load(root / f"nonfinite-step{steps_before + 1}.pt", weights_only=True)


def test_nan_in_a_gradient_names_the_weight_and_saves_the_batch(tiny_model_path, tmp_path):
    def breaks(policy):
        weight = policy.policy.model.layers[1].mlp.up_proj.weight
        weight.register_hook(lambda gradient: gradient * float("nan"))

    error, saved = run_until_nan(tmp_path, module(tiny_model_path, rewards=[checksum]), 2, breaks)
    assert saved["first"]["tensor"] == "the gradient of model.layers.1.mlp.up_proj.weight"
    assert len(saved["experience"]["completion_ids"]) == 16
    assert saved["metrics"]["grad_norm"] > 0
    (line,) = lines(tmp_path)
    assert (line["rule"], line["severity"], line["step"]) == ("nonfinite", "critical", 3)
    assert line["change"] == {"model.optimizer.lr": 3.3e-4, "trainer.gradient_clip_val": 1.0}
    # the row of the file is the completion that the finding names
    (sample,) = line["samples"]
    assert (sample["step"], sample["rollout"]) == (3, 1)
    assert sample["group"] * 4 + sample["index"] == saved["first"]["row"]
    assert f"the batch was saved to {tmp_path / 'nonfinite-step3.pt'}" in error.__notes__[0]


def test_nan_for_one_completion_names_it_and_the_layer(tiny_model_path, tmp_path):
    """Tokens of one letter have an infinite embedding."""
    seen = {}

    def breaks(policy):
        token = policy.tokenizer.convert_tokens_to_ids("q")

        def spoil(layer, inputs, output):
            is_bad = (seen["ids"] == token) if "ids" in seen else None
            return output if is_bad is None or is_bad.shape != output.shape[:2] else output.masked_fill(
                is_bad[..., None], float("inf")
            )  # fmt: skip

        embedding = policy.policy.model.embed_tokens
        embedding.register_forward_pre_hook(lambda layer, inputs: seen.update(ids=inputs[0]))
        embedding.register_forward_hook(spoil)

    _, saved = run_until_nan(tmp_path, module(tiny_model_path, rewards=[checksum]), 1, breaks)
    assert saved["first"]["tensor"] == "the output of model.embed_tokens"
    row = saved["first"]["row"]
    ids = torch.cat([saved["experience"]["prompt_ids"][row], saved["experience"]["completion_ids"][row]])
    assert load_tokenizer(tiny_model_path).convert_tokens_to_ids("q") in ids.tolist()


def test_a_resumed_run_remembers_its_start_and_what_was_reported(tiny_model_path, tmp_path):
    def train(steps: int, **options) -> Diagnosis:
        diagnosis = Diagnosis(rules=[Always()])
        callbacks = [Record(print_every=0), diagnosis, Checkpoint(str(tmp_path / "checkpoints"))]
        fit(tmp_path, module(tiny_model_path), callbacks=callbacks, steps=steps, enable_checkpointing=True,
            logger=CSVLogger(tmp_path, name="logs"), **options)  # fmt: skip
        return diagnosis

    first = train(3)
    second = train(5, ckpt_path="last")
    assert second.history.steps == [1, 2, 3, 4, 5]
    assert second.history.series("reward").values[:3] == pytest.approx(first.history.series("reward").values)
    assert [finding.rule for finding in first.findings] == ["always"] and second.findings == []
