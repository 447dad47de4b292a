"""Batch arithmetic, the start-up summary, and the refusal with changes that fit."""

import re
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from pytest import mark, raises

from lightning_grpo.configure import (
    Workload,
    describe_run,
    find_gpu,
    find_model,
    predict_memory,
)
from lightning_grpo.configure.memory_savers import MEMORY_SAVERS, USABLE, changes_to_fit, fits, lowest_memory, usable
from lightning_grpo.training.batching import check_batch_arithmetic

NUMBERS = {"prompts_per_rollout": 6, "num_generations": 8, "micro_batch_size": 4}
sizes = st.integers(1, 48)


@given(sizes, st.integers(2, 16), sizes, sizes, st.integers(1, 4), st.integers(1, 4))
def test_arithmetic_accepts_exactly_what_divides_and_names_values_that_work(B, G, m, A, mu, ranks):
    numbers = {
        "prompts_per_rollout": B,
        "num_generations": G,
        "micro_batch_size": m,
        "accumulate_grad_batches": A,
        "num_iterations": mu,
        "ranks": ranks,
    }
    for _ in range(4):
        try:
            steps = check_batch_arithmetic(**numbers)
        except ValueError as error:
            option = re.match(r"\w+", str(error))[0]
            suggestions = [int(x) for x in re.findall(r"\d+", str(error).rpartition("set ")[2])]
            assert suggestions and numbers[option] not in suggestions
            numbers[option] = suggestions[0]
        else:
            break
    assert steps * m_of(numbers) * ranks == numbers["prompts_per_rollout"] * G * mu
    assert steps % numbers["accumulate_grad_batches"] == 0


def m_of(numbers: dict) -> int:
    return numbers["micro_batch_size"]


@mark.parametrize(
    ("changes", "message"),
    [
        ({"micro_batch_size": 0}, "micro_batch_size is 0; set 1 or more"),
        ({"micro_batch_size": 10}, "set micro_batch_size to 4 or 6 or 8 or 12"),
        ({"accumulate_grad_batches": 5}, "set accumulate_grad_batches to 2 or 3 or 4 or 6"),
        ({"ranks": 4}, "does not divide by 4 ranks; set 4 or 8"),
        ({"accumulate_grad_batches": 24, "num_iterations": 2}, "an optimizer step would span two passes"),
    ],
)
def test_arithmetic_errors_say_what_to_set(changes, message):
    with raises(ValueError, match=message):
        check_batch_arithmetic(**NUMBERS | changes)


def big(**changes) -> Workload:
    numbers = {
        "shape": find_model("Qwen/Qwen2.5-1.5B-Instruct"),
        "prompts_per_rollout": 16,
        "num_generations": 8,
        "micro_batch_size": 8,
        "accumulate_grad_batches": 16,
        "prompt_length": 512,
        "completion_length": 1024,
        "engine": "vllm",
        "engine_cache": 8e9,
    }
    return Workload(**numbers | changes)


def test_summary_has_the_identity_with_its_numbers_memory_and_time():
    text = describe_run(big(), find_gpu("h100"), max_steps=100)
    assert (
        "16 prompts × 8 generations = 128 completions per rollout = 8 (micro-batch) × 16 (accumulation) × 1 (ranks) × "
        "1 (optimizer steps)" in text
    )
    peak = float(re.search(r"predicted peak ([\d.]+) GiB", text)[1])
    assert abs(peak - predict_memory(big(), find_gpu("h100")).peak / 2**30) < 0.01
    assert "100 steps take" in text


def test_a_run_that_cannot_fit_is_refused_with_three_changes_that_do_fit():
    l4 = find_gpu("l4")
    with raises(ValueError, match="cannot fit L4 24 GB") as error:
        describe_run(big(), l4)
    assert str(error.value).count("\n  ") == 3
    ways = changes_to_fit(big(), l4)
    assert len(ways) == 3
    for run, savers in ways:
        assert savers
        assert predict_memory(run, l4).peak <= USABLE * l4.memory
        assert run.samples_per_update == big().samples_per_update


def test_refusal_can_be_turned_into_a_warning():
    assert "may not fit" in describe_run(big(), find_gpu("l4"), refuse=False)


def test_changes_leave_fixed_options_alone():
    ways = changes_to_fit(big(), find_gpu("a100-40"), {"gradient_checkpointing", "lora"})
    assert ways
    for run, _ in ways:
        assert not run.gradient_checkpointing
        assert not run.lora_rank


def test_what_fits_needs_no_change():
    w = replace(big(), micro_batch_size=2, accumulate_grad_batches=64)
    assert fits(predict_memory(w, find_gpu("h200")), find_gpu("h200"))
    assert changes_to_fit(w, find_gpu("h200")) == [(w, [])]


def test_a_refusal_names_the_lowest_peak_and_what_was_tried():
    w, t4 = big(shape=find_model("Qwen/Qwen2.5-32B-Instruct")), find_gpu("t4")
    with raises(ValueError, match="even with all changes that save memory") as error:
        describe_run(w, t4)
    lowest = predict_memory(lowest_memory(w, t4), t4)
    assert f"{lowest.peak_phase} needs {lowest.peak / 2**30:.1f} GiB of 14.8 GiB" in str(error.value)
    assert all(saver.name in str(error.value) for saver in usable(w, t4))
    # nothing that is left lowers it
    assert all(
        (run := saver.apply(lowest_memory(w, t4))) is None or predict_memory(run, t4).peak >= lowest.peak
        for saver in MEMORY_SAVERS
    )
