"""What a processor multiplies fast, and what follows from it: precision, engine, its data type, threads."""

import logging
import os
import platform
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from fitting import data, fit, module
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_grpo import processor
from lightning_grpo.cli import main
from lightning_grpo.configure import Prediction
from lightning_grpo.configure.speed import slow_choices
from lightning_grpo.rollout import HFRollout, VLLMRollout, default_rollout
from lightning_grpo.trainer import GRPOTrainer, resolved

AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}
"""Have torch and oneDNN use what a processor without bfloat16 has."""

FAST = {torch.bfloat16: 4e11, torch.float32: 2e11, torch.float16: 1e9}
SLOW = {torch.bfloat16: 4e9, torch.float32: 1e11, torch.float16: 1e9}


@pytest.fixture
def rates(monkeypatch):
    """Takes the place of the measurement."""

    def use(of: dict[torch.dtype, float]) -> None:
        monkeypatch.setattr(processor, "product_rate", of.__getitem__)

    return use


def cpu_trainer(precision: str, **settings) -> L.Trainer:
    return GRPOTrainer(precision=precision, accelerator="cpu", devices=1, logger=False, **settings)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="its variables limit x86 processors only")
def test_without_bfloat16_instructions_float32_is_found_to_be_fast():
    code = "from lightning_grpo.processor import *; print(fast_dtype(), slowdown(torch.bfloat16) > 2)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | AVX2)
    assert found.stdout.split() == ["torch.float32", "True"]


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this processor has no AVX-512 BF16")
@pytest.mark.skipif("ONEDNN_MAX_CPU_ISA" in os.environ, reason="oneDNN is kept from using it")
def test_with_bfloat16_instructions_bfloat16_is_found_to_be_fast():
    assert processor.fast_dtype() == torch.bfloat16


def test_the_measurement_leaves_the_threads_as_they_were():
    processor.product_rate.cache_clear()
    before = torch.get_num_threads()
    assert processor.product_rate(torch.float32) > 0
    assert torch.get_num_threads() == before
    assert 1 <= processor.parallel_speedup() <= before


def test_bfloat16_must_gain_to_be_taken(rates):
    rates(FAST)
    assert processor.fast_dtype() == torch.bfloat16
    assert processor.slowdown(torch.bfloat16) == 1
    assert processor.slowdown(torch.float32) == 2
    rates(FAST | {torch.bfloat16: 2.2e11})
    assert processor.fast_dtype() == torch.float32


def test_auto_is_the_precision_that_the_processor_is_fast_in(rates):
    rates(FAST)
    assert cpu_trainer("auto").precision == "bf16-mixed"
    rates(SLOW)
    assert cpu_trainer("auto").precision == "32-true"
    assert cpu_trainer("bf16-mixed").precision == "bf16-mixed"
    assert cpu_trainer(None).precision == "32-true"


def test_auto_on_gpus_is_what_the_card_has(monkeypatch, rates):
    rates(SLOW)
    monkeypatch.setattr("lightning_grpo.trainer.CUDAAccelerator.is_available", lambda: True)
    for has, precision in ((True, "bf16-mixed"), (False, "16-mixed")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has)
        assert resolved("auto", "gpu") == resolved("auto", "auto") == precision
    assert resolved("auto", "cpu") == "32-true"


def test_config_yaml_has_the_precision_that_was_used(rates, tmp_path, monkeypatch):
    rates(FAST)
    monkeypatch.chdir(Path(__file__).parent.parent)
    options = ["--trainer.precision", "auto", "--trainer.max_steps", "1", "--trainer.default_root_dir", str(tmp_path)]
    main(["fit", "--config", "configs/smoke.yaml", "--trainer.enable_checkpointing", "false", *options])
    assert yaml.safe_load((tmp_path / "logs/version_0/config.yaml").read_text())["trainer"]["precision"] == "bf16-mixed"


@pytest.mark.parametrize(
    ("precision", "strategy", "dtype", "measured", "installed", "kind", "reason"),
    [
        ("32-true", "auto", "float32", FAST, True, HFRollout, "in float32"),
        ("32-true", "auto", "bfloat16", FAST, True, VLLMRollout, "faster engine in bfloat16"),
        ("bf16-mixed", "auto", "float32", FAST, True, VLLMRollout, "faster engine in bfloat16"),
        ("bf16-mixed", "auto", "float32", FAST, False, HFRollout, "vLLM is not installed"),
        ("bf16-mixed", "auto", "float32", SLOW, True, HFRollout, "in bfloat16"),
        # a sharded policy can't sample by itself
        ("32-true", ModelParallelStrategy(), "float32", FAST, True, VLLMRollout, "a sharded policy"),
        ("bf16-mixed", ModelParallelStrategy(), "float32", SLOW, True, VLLMRollout, "a sharded policy"),
    ],
)
def test_the_engine_is_the_faster_one(
    precision, strategy, dtype, measured, installed, kind, reason, monkeypatch, rates, caplog, tiny_model_path
):
    rates(measured)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("lightning_grpo.rollout.default.vllm_version", lambda: "0.32.0" if installed else None)
    policy = module(tiny_model_path, dtype=dtype)
    with caplog.at_level(logging.INFO, logger="lightning_grpo"):
        assert type(default_rollout(cpu_trainer(precision, strategy=strategy), policy)) is kind
    assert reason in caplog.text


def test_on_gpus_the_engine_is_vllm(monkeypatch, tiny_model_path):
    monkeypatch.setattr("lightning_grpo.rollout.default.vllm_version", lambda: "0.32.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    trainer, policy = cpu_trainer("32-true"), module(tiny_model_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert type(default_rollout(trainer, policy)) is VLLMRollout


def test_an_engine_that_is_missing_is_said(monkeypatch, caplog, tiny_model_path):
    monkeypatch.setattr("lightning_grpo.rollout.default.vllm_version", lambda: None)
    default_rollout(cpu_trainer("bf16-mixed"), module(tiny_model_path))
    assert "vLLM is not installed" in caplog.text


@pytest.mark.vllm
@pytest.mark.parametrize(("precision", "dtype"), [("32-true", "float32"), ("bf16-mixed", "bfloat16")])
def test_vllm_computes_in_what_the_trainer_does(precision, dtype, tiny_model_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    rollout, given = VLLMRollout(), VLLMRollout(dtype="float16")
    for each in (rollout, given):
        each.setup(cpu_trainer(precision), module(tiny_model_path), "fit")
    assert rollout.engine_args["dtype"] == dtype
    assert given.engine_args["dtype"] == "float16"


def test_a_slow_choice_is_warned_of_with_its_factor_and_the_remedy(rates, monkeypatch, tiny_model_path):
    rates(SLOW)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    engine = VLLMRollout(dtype="float16")
    mixed = cpu_trainer("bf16-mixed", callbacks=[engine])
    assert slow_choices(mixed, module(tiny_model_path)) == [
        "trainer.precision is bf16-mixed, but matrix products take 25.0 times as long in bfloat16 as in float32 on "
        "this processor; set trainer.precision auto or 32-true",
        "rollout.dtype is float16, but matrix products take 100.0 times as long in float16 as in float32 on "
        "this processor; set rollout.dtype auto",
    ]
    plain = cpu_trainer("32-true", callbacks=[HFRollout()])
    (warning,) = slow_choices(plain, module(tiny_model_path, dtype="bfloat16"))
    assert warning.startswith("model.dtype is bfloat16") and warning.endswith("set model.dtype float32")
    assert not slow_choices(plain, module(tiny_model_path))
    rates(FAST)
    assert not slow_choices(cpu_trainer("bf16-mixed"), module(tiny_model_path))
    assert not slow_choices(plain, module(tiny_model_path))


def test_the_summary_says_what_is_fast_and_what_follows(tmp_path, tiny_model_path, caplog):
    with caplog.at_level(logging.INFO, logger="lightning_grpo"):
        policy, prediction = module(tiny_model_path), Prediction(calibration=str(tmp_path / "calibration.json"))
        fit(tmp_path, policy, data(), steps=1, callbacks=[prediction], precision="bf16-mixed")
    (line,) = [line for line in caplog.text.splitlines() if line.startswith("speed ")]
    assert line.endswith("computes in bfloat16, samples in bfloat16 with HFRollout")
    warned = "times as long in bfloat16" in caplog.text
    assert warned == (processor.slowdown(torch.bfloat16) >= processor.GAIN)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000"}, 1),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({}, 3),
    ],
)
def test_cores_are_no_more_than_the_containers_share(files, expected, tmp_path, monkeypatch):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(processor, "Path", lambda _: tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    assert processor.cores() == expected


@pytest.mark.parametrize(("asked", "threads"), [(None, 2), ("5", 5)])
def test_threads_are_kept_to_the_cores_unless_asked_for(asked, threads, monkeypatch):
    monkeypatch.setattr(processor, "cores", lambda: 2)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(5)
        processor.keep_threads_to_cores()
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
