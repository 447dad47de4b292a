"""Calibration on the machine at hand, and prediction against reality in a real fit of a tiny model."""

import json
import logging
from dataclasses import replace
from types import SimpleNamespace

import lightning as L
import torch
from pytest import approx, fixture, mark, raises

from lightning_grpo import GRPOModule, PromptDataModule
from lightning_grpo.configure import (
    Efficiency,
    Prediction,
    Workload,
    calibration,
    find_gpu,
    find_model,
    plan,
    predict_cost,
    predict_memory,
)
from lightning_grpo.configure.callback import _with_engine
from lightning_grpo.configure.command import main
from lightning_grpo.configure.measure import Measured
from lightning_grpo.configure.memory_savers import LEVERS
from lightning_grpo.rewards import PrefixMatch
from lightning_grpo.rollout import HFRollout, VLLMProcessRollout, VLLMRollout, VLLMServerRollout


@fixture
def file(tmp_path):
    return tmp_path / "calibration.json"


def run(**changes) -> Workload:
    numbers = {
        "shape": find_model("SmolLM2-135M-Instruct"),
        "prompts_per_rollout": 2,
        "num_generations": 4,
        "micro_batch_size": 4,
        "accumulate_grad_batches": 2,
        "prompt_length": 64,
        "completion_length": 64,
        "mean_fill": 1.0,
    }
    return Workload(**numbers | changes)


def test_efficiencies_from_a_measurement_predict_that_measurement():
    cpu = replace(find_gpu("cpu"), flops=4e11, bandwidth=4e10)
    measured = Measured(micro_batch_seconds=2.0, optimizer_seconds=0.3, peak_bytes=0.0)
    found = calibration.from_update(run(), cpu, measured, Efficiency.assumed(cpu, "hf"))
    assert predict_cost(run(), cpu, found).seconds["update"] == approx(2 * 2.0 + 0.3, rel=0.01)
    assert found.source == "measured here"


def test_measurements_are_kept_per_device_precision_adapters_and_engine(file):
    cpu, learned = find_gpu("cpu"), replace(Efficiency.assumed(find_gpu("cpu"), "hf"), flops=0.123)
    calibration.save(run(), cpu, learned, file)
    assert calibration.load(run(), cpu, file) == learned
    assert calibration.load(run(precision="32-true"), cpu, file) is None
    assert calibration.load(run(), find_gpu("h100"), file) is None
    assert calibration.load(run(lora_rank=4), cpu, file) is None
    calibration.save(run(lora_rank=4), cpu, replace(learned, flops=0.2), file)
    assert calibration.load(run(), cpu, file) == learned
    pins = {"engine": "hf", "precision": "bf16-mixed"}
    made = plan(task="short_answer", model="SmolLM2-135M-Instruct", gpu="cpu", pins=pins, calibration=file)
    assert made.cost.efficiency == learned


def test_a_broken_calibration_is_an_error(file):
    file.write_text('{"a": {"speed": 1}}')
    with raises(ValueError, match="is no calibration"):
        calibration.load(run(), find_gpu("cpu"), file)


def test_measure_runs_and_the_next_plan_uses_it(file, tiny_model_path, capsys):
    arguments = ["--task", "short_answer", "--model", tiny_model_path, "--gpu", "cpu", "--calibration", str(file)]
    arguments += ["--set", "engine=hf", "--set", "max_prompt_length=16", "--set", "max_completion_length=16"]
    assert main([*arguments, "--measure"]) == 0
    printed = capsys.readouterr()
    assert "measured: " in printed.err
    assert "efficiencies measured here" in printed.out
    assert main(arguments) == 0
    assert "efficiencies measured here" in capsys.readouterr().out


def test_measuring_a_gpu_that_is_not_here_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with raises(ValueError, match="no GPU in this machine to measure H100"):
        calibration.measure(run(), find_gpu("h100"))


def fit(path, root, prediction, **changes) -> L.Trainer:
    module = GRPOModule(
        path,
        rewards=[PrefixMatch()],
        **{"num_generations": 4, "max_completion_length": 8, "max_prompt_length": 32, "micro_batch_size": 4} | changes,
    )
    data = PromptDataModule("letters", size=16, prompts_per_rollout=2)
    trainer = L.Trainer(
        max_steps=5,
        accumulate_grad_batches=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=root,
        callbacks=[prediction, HFRollout()],
    )
    trainer.fit(module, data)
    return trainer


def test_fit_is_described_compared_and_learned_from(tmp_path, file, tiny_model_path, caplog):
    prediction = Prediction(calibration=str(file))
    with caplog.at_level(logging.INFO, logger="lightning_grpo"):
        fit(tiny_model_path, tmp_path, prediction)
    assert "2 prompts × 4 generations = 8 completions a rollout = 4 (micro-batch) × 2 (accumulation)" in caplog.text
    assert "predicted → measured: generate" in caplog.text
    assert prediction.report in caplog.text
    assert set(prediction.peaks) == {"rollout", "update"}
    assert all(10e6 < peak < 1e11 for peak in prediction.peaks.values())
    (learned,) = json.loads(file.read_text()).values()
    assert learned["source"] == "measured here"
    # what was learned explains what was measured
    w = replace(prediction.workload, mean_fill=sum(prediction.lengths) / len(prediction.lengths) / 8)
    seconds = predict_cost(w, prediction.hardware, Efficiency(**learned)).seconds
    assert seconds["update"] == approx(sum(prediction.seconds["update"]) / len(prediction.seconds["update"]), rel=0.3)


def test_a_disturbed_run_does_not_undo_what_was_learned(tmp_path, file, tiny_model_path):
    prediction = Prediction(calibration=str(file))
    fit(tiny_model_path, tmp_path, prediction)
    before = prediction.efficiency = calibration.load(prediction.workload, prediction.hardware, file)
    prediction.compare()
    undisturbed = calibration.load(prediction.workload, prediction.hardware, file)
    assert undisturbed.update_factor == approx(before.update_factor, rel=0.2) and undisturbed.source == "measured here"
    # one step of several: nothing changes
    median = sorted(prediction.seconds["update"])[1]
    prediction.seconds["update"] = [median, 100 * median, median]
    prediction.compare()
    assert calibration.load(prediction.workload, prediction.hardware, file).update_factor <= undisturbed.update_factor
    # all of them: half of it, in logarithms
    prediction.seconds = {name: [100 * value for value in values] for name, values in prediction.seconds.items()}
    prediction.efficiency = undisturbed
    prediction.compare()
    disturbed = calibration.load(prediction.workload, prediction.hardware, file)
    assert 5 < disturbed.update_factor / undisturbed.update_factor < 20


def test_sampling_beside_the_update_says_nothing_of_its_speed(tmp_path, file, tiny_model_path):
    prediction = Prediction(calibration=str(file))
    fit(tiny_model_path, tmp_path, prediction)
    before = prediction.efficiency = calibration.load(prediction.workload, prediction.hardware, file)
    prediction.workload = replace(prediction.workload, rollout_ahead=True)
    prediction.seconds["rollout"] = [1e-6] * 3
    prediction.compare()
    assert "generate" not in prediction.report
    assert calibration.load(prediction.workload, prediction.hardware, file).generate_factor == before.generate_factor


def test_fit_refuses_what_cannot_fit(tmp_path, tiny_model_path, monkeypatch):
    tiny = replace(find_gpu("cpu"), memory=1e6)
    monkeypatch.setattr("lightning_grpo.configure.callback.this_machine", lambda: tiny)
    with raises(ValueError, match="this run cannot fit CPU"):
        fit(tiny_model_path, tmp_path, Prediction())


@mark.parametrize(("option", "value"), [("tolerance", 0.0), ("after", 0)])
def test_bad_options_are_named(option, value):
    with raises(ValueError, match=f"{option} is {value}; set"):
        Prediction(**{option: value})


BYTES, ELSEWHERE = 10**9, {"CUDA_VISIBLE_DEVICES": "1"}


@mark.parametrize(
    ("rollout", "expected"),
    [
        (
            lambda: VLLMRollout(tensor_parallel_size=8, max_num_seqs=64, kv_cache_memory_bytes=BYTES),
            ("vllm", 8, 8, True),
        ),
        (lambda: VLLMProcessRollout(max_num_seqs=64, kv_cache_memory_bytes=BYTES), ("vllm", 1, 64, False)),
        (
            lambda: VLLMProcessRollout(environment=ELSEWHERE, transfer="tcp"),
            ("remote", 1, 128, True),
        ),
        (lambda: VLLMProcessRollout(tensor_parallel_size=2, transfer="tcp"), ("remote", 1, 128, True)),
        (lambda: VLLMServerRollout(["http://localhost:1"]), ("remote", 1, 128, True)),
        (lambda: HFRollout(max_num_seqs=16), ("hf", 1, 16, True)),
    ],
)
def test_the_engine_is_counted_where_and_as_it_is(rollout, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    w = _with_engine(run(), SimpleNamespace(callbacks=[rollout()]), find_gpu("h100"))
    assert (w.engine, w.engine_shards, w.engine_sequences, w.engine_sleep) == expected
    if w.engine == "vllm":
        assert w.engine_cache == BYTES
        weights = predict_memory(w, find_gpu("h100")).phases["generate"]["engine weights"]
        assert weights == 2 * w.shape.params / w.engine_shards
    if w.engine_process:
        assert all(lever.pull(w) is None for lever in LEVERS if lever.name in ("engine sleep", "split engine"))


def test_the_cache_of_an_engine_on_a_cpu_is_the_one_that_it_allocates(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shape = find_model("SmolLM2-135M-Instruct")
    module = SimpleNamespace(
        model_path=shape.name,
        max_prompt_length=64,
        max_completion_length=64,
        policy=SimpleNamespace(config=shape.config),
    )
    trainer = SimpleNamespace(callbacks=[VLLMRollout(max_num_seqs=4)], lightning_module=module)
    w = _with_engine(run(), trainer, find_gpu("cpu"))
    assert w.engine_cache == 4 * 2 * shape.cache_bytes * (129 + 128)
