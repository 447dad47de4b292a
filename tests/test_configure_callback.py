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
    GPUS,
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
from lightning_grpo.configure.memory_savers import MEMORY_SAVERS
from lightning_grpo.policy import LoRA, Pretrained
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
    overrides = {"engine": "hf", "precision": "bf16-mixed"}
    made = plan(task="short_answer", model="SmolLM2-135M-Instruct", gpu="cpu", overrides=overrides, calibration=file)
    assert made.cost.efficiency == learned


def test_a_broken_calibration_is_an_error(file):
    file.write_text('{"a": {"speed": 1}}')
    with raises(ValueError, match="is not a calibration file"):
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
    with raises(ValueError, match="this machine has no GPU, so H100"):
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


def test_fit_logs_the_prediction_and_compares_it(tmp_path, file, tiny_model_path, caplog):
    prediction = Prediction(calibration=str(file))
    with caplog.at_level(logging.INFO, logger="lightning_grpo"):
        fit(tiny_model_path, tmp_path, prediction)
    assert "2 prompts × 4 generations = 8 completions per rollout = 4 (micro-batch) × 2 (accumulation)" in caplog.text
    assert "predicted → measured: generate" in caplog.text
    assert prediction.report in caplog.text
    assert set(prediction.peaks) == {"rollout", "update"}
    assert all(10e6 < peak < 1e11 for peak in prediction.peaks.values())
    (learned,) = json.loads(file.read_text()).values()
    assert learned["source"] == "measured here"


def test_the_trained_parameters_are_counted_in_the_policy(tmp_path, file, tiny_model_path):
    prediction = Prediction(calibration=str(file))
    lora = LoRA(rank=4, rank_pattern={"q_proj": 8}, use_dora=True, exclude_modules=["up_proj"])
    trainer = fit(tiny_model_path, tmp_path, prediction, lora=lora)
    trained = sum(p.numel() for p in trainer.lightning_module.parameters() if p.requires_grad)
    assert prediction.workload.trained == trained != prediction.workload.shape.lora_params(4)


SECONDS = {"sync": [0.0] * 3, "rollout": [5.0] * 3, "reward": [0.1] * 3, "score": [0.0] * 3, "update": [8.0] * 3}


def compared(file, *, efficiency=None, seconds=SECONDS, **changes) -> tuple[Prediction, Efficiency]:
    """A prediction after a run with these times, and what the run adds to the calibration file."""
    prediction = Prediction(calibration=str(file))
    prediction.hardware, prediction.workload = CPU, run(**changes)
    prediction.efficiency = efficiency or Efficiency.assumed(CPU, "hf")
    prediction.seconds = seconds
    prediction.compare()
    return prediction, calibration.load(prediction.workload, CPU, file)


CPU = replace(GPUS["l4"], name="CPU", device="cpu", flops=4e11, flops_fp32=2e11, bandwidth=4e10)


def test_the_learned_efficiency_predicts_the_measured_times(file):
    prediction, learned = compared(file)
    seconds = predict_cost(prediction.workload, CPU, learned).seconds
    assert (seconds["generate"], seconds["update"]) == (approx(5), approx(8))
    assert learned.source == "measured here"
    # the same times again change nothing
    assert compared(file, efficiency=learned)[1] == replace(
        learned, generate_factor=approx(learned.generate_factor), update_factor=approx(learned.update_factor)
    )


def test_a_slow_run_changes_what_was_learned_only_by_half(file):
    _, learned = compared(file)
    # a single slow step has no effect
    once = compared(file, efficiency=learned, seconds=SECONDS | {"update": [8.0, 800.0, 8.0]})[1]
    assert once.update_factor == approx(learned.update_factor)
    # on a logarithmic scale
    always = compared(file, efficiency=learned, seconds=SECONDS | {"update": [800.0] * 3})[1]
    assert always.update_factor == approx(10 * learned.update_factor)
    assert always.generate_factor == approx(learned.generate_factor)


def test_the_time_of_sampling_during_the_update_is_not_learned(file):
    before = Efficiency.assumed(CPU, "hf")
    prediction, learned = compared(file, rollout_ahead=True, seconds=SECONDS | {"rollout": [1e-6] * 3})
    assert "generate" not in prediction.report
    assert learned.generate_factor == before.generate_factor


def test_the_record_has_the_predicted_figures_per_optimizer_step(file):
    prediction, _ = compared(file, micro_batch_size=2, accumulate_grad_batches=2)
    prediction.max_steps = 10
    record = json.loads(json.dumps(prediction.record()))
    cost, memory = predict_cost(prediction.workload, CPU), predict_memory(prediction.workload, CPU)
    assert record["updates_per_rollout"] == 2
    assert record["step_seconds"]["rollout"] == approx(cost.seconds["generate"] / 2)
    assert record["step_seconds"]["update"] == approx(cost.seconds["update"] / 2)
    assert record["total_seconds"] == approx(5 * cost.total)
    assert record["memory_gib"]["rollout"] == approx(memory.total("generate") / 2**30)
    assert record["peak_gib"] == approx(memory.peak / 2**30)


def test_there_is_no_record_before_the_start_or_without_figures(file):
    assert Prediction(calibration=str(file)).record() is None
    prediction, _ = compared(file)
    assert prediction.record()["total_seconds"] is None
    prediction.compares = False
    assert prediction.record() is None


def test_fit_refuses_what_cannot_fit(tmp_path, tiny_model_path, monkeypatch):
    tiny = replace(find_gpu("cpu"), memory=1e6)
    monkeypatch.setattr("lightning_grpo.configure.callback.this_machine", lambda: tiny)
    with raises(ValueError, match="this run cannot fit CPU"):
        fit(tiny_model_path, tmp_path, Prediction())


@mark.parametrize(("option", "value"), [("tolerance", 0.0), ("after", 0)])
def test_bad_options_are_named(option, value):
    with raises(ValueError, match=f"prediction.{option} is {value}; set"):
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
        assert all(saver.apply(w) is None for saver in MEMORY_SAVERS if saver.name in ("engine sleep", "split engine"))


def test_the_cache_of_an_engine_on_a_cpu_is_the_one_that_it_allocates(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shape = find_model("SmolLM2-135M-Instruct")
    module = SimpleNamespace(
        model_path=shape.name,
        pretrained=Pretrained(name=shape.name),
        max_prompt_length=64,
        max_completion_length=64,
        policy=SimpleNamespace(config=shape.config),
    )
    trainer = SimpleNamespace(callbacks=[VLLMRollout(max_num_seqs=4)], lightning_module=module)
    w = _with_engine(run(), trainer, find_gpu("cpu"))
    assert w.engine_cache == 4 * 2 * shape.cache_bytes * (129 + 128)
