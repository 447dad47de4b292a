"""What vLLM changes in the trainer's process is undone outside `isolate_vllm`. The test needs no vLLM."""

import os
import random

import pytest
import torch

from lightning_grpo.rollout.vllm import isolation
from lightning_grpo.rollout.vllm.callback import _holds_more_than_weights
from lightning_grpo.rollout.vllm.engine import _explained
from lightning_grpo.rollout.vllm.isolation import isolate_vllm


@pytest.fixture(autouse=True)
def nothing_kept_for_vllms_next_turn(monkeypatch):
    for name, empty in (("_vllm_functions", {}), ("_vllm_environment", {}), ("_vllm_precision", [])):
        monkeypatch.setattr(isolation, name, empty)


@pytest.fixture
def precision():
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def products():
    backends = torch.backends
    return (
        torch.get_float32_matmul_precision(),
        backends.cuda.matmul.fp32_precision,
        backends.mkldnn.matmul.fp32_precision,
    )


def test_the_precision_of_products_is_the_trainers_outside_and_vllms_inside(precision):
    for trainers in ("high", "medium", "highest"):
        torch.set_float32_matmul_precision(trainers)
        before = products()
        with isolate_vllm():
            torch.set_float32_matmul_precision("medium")
        assert products() == before
        with isolate_vllm() as isolated:
            assert torch.get_float32_matmul_precision() == "medium"
            with isolated.suspended():
                assert products() == before
            assert torch.get_float32_matmul_precision() == "medium"
        assert products() == before


def test_a_callback_finds_the_trainers_process_and_may_change_it(monkeypatch):
    monkeypatch.setenv("TRAINERS", "before")
    torch.manual_seed(0)
    expected = [torch.rand(1).item() for _ in range(3)]
    torch.manual_seed(0)
    drawn = [torch.rand(1).item()]
    with isolate_vllm() as isolated:
        torch.manual_seed(5)
        random.seed(5)
        os.environ |= {"TRAINERS": "vLLM's", "VLLMS": "own"}
        with isolated.suspended():
            drawn.append(torch.rand(1).item())
            assert os.environ["TRAINERS"] == "before" and "VLLMS" not in os.environ
            os.environ["LEFT_BY_THE_CALLBACK"] = "yes"
        assert os.environ["TRAINERS"] == "vLLM's" and os.environ["VLLMS"] == "own"
    drawn.append(torch.rand(1).item())
    assert drawn == expected
    assert os.environ.pop("LEFT_BY_THE_CALLBACK") == "yes"
    assert os.environ["TRAINERS"] == "before" and "VLLMS" not in os.environ


def test_an_error_in_a_callback_leaves_the_trainers_process():
    state = torch.get_rng_state()
    with pytest.raises(KeyError), isolate_vllm() as isolated:
        torch.manual_seed(5)
        with isolated.suspended():
            raise KeyError
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("text", "settings", "advice"),
    [
        (
            "Free memory on device cuda:0 (10.1/79.2 GiB) on startup is less than desired GPU memory utilization "
            "(0.3, 23.8 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
            {"gpu_memory_utilization": 0.3},
            r"gpu_memory_utilization=0.3.*GiB.*Lower gpu_memory_utilization, or stop other processes on this GPU",
        ),
        (
            "No available memory for the cache blocks. Try increasing `gpu_memory_utilization`",
            {"gpu_memory_utilization": 0.1},
            "Raise gpu_memory_utilization, or lower max_num_seqs",
        ),
        (
            "To serve at least one request with the model's max seq len (4096), (2.0 GiB KV cache is needed, which is "
            "larger than the available KV cache memory (1.0 GiB).",
            {"kv_cache_memory_bytes": 1 << 30, "max_model_len": 4096},
            "Raise kv_cache_memory_bytes, or lower max_num_seqs or max_completion_length",
        ),
        ("CUDA out of memory. Tried to allocate 2 GiB.", {}, "Lower gpu_memory_utilization, max_num_seqs"),
        ("CUDA out of memory.", {"kv_cache_memory_bytes": 1 << 30}, "Lower kv_cache_memory_bytes, max_num_seqs"),
    ],
)
def test_an_engine_that_does_not_fit_says_which_option_to_turn(text, settings, advice, tmp_path):
    error = _explained(ValueError(text), settings, tmp_path / "log")
    assert isinstance(error, MemoryError)
    with pytest.raises(MemoryError, match=advice):
        raise error


def test_what_a_deep_sleep_would_lose_is_known():
    assert not _holds_more_than_weights({"kv_cache_dtype": "auto", "quantization": None})
    for settings in ({"quantization": "fp8"}, {"kv_cache_dtype": "fp8"}, {"speculative_config": {"method": "eagle"}}):
        assert _holds_more_than_weights(settings)
