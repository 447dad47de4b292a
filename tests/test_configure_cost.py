"""The cost model: its formulas in cases that can be worked out by hand, and the zero-variance share."""

import random
from dataclasses import replace

from pytest import approx, mark

from lightning_grpo.configure import Efficiency, Workload, find_gpu, find_model, predict_cost, zero_variance_share
from lightning_grpo.configure.cost import alive_shares, decode_seconds, forward_flops, padded_length, pass_rate_grid
from lightning_grpo.configure.hardware import this_cpu


def run(**changes) -> Workload:
    numbers = {
        "shape": find_model("meta-llama/Llama-3.1-8B-Instruct"),
        "prompts_per_rollout": 32,
        "num_generations": 8,
        "micro_batch_size": 4,
        "accumulate_grad_batches": 64,
        "prompt_length": 256,
        "completion_length": 512,
        "mean_fill": 0.5,
        "engine": "vllm",
        "engine_sequences": 256,
    }
    return Workload(**numbers | changes)


PEAK = Efficiency(flops=1.0, bandwidth=1.0, token_overhead=0.0, spread=1.0, source="a test")


@mark.parametrize(
    ("p", "shares"), [(0.1, {4: 0.656, 8: 0.430, 16: 0.185, 32: 0.034}), (0.5, {2: 0.5, 4: 0.125}), (1.0, {8: 1.0})]
)
def test_zero_variance_share_has_the_known_values(p, shares):
    assert {G: round(zero_variance_share([p], G), 3) for G in shares} == shares


def test_zero_variance_share_is_what_sampling_gives():
    rates, G, rng = pass_rate_grid(0.4), 6, random.Random(0)
    equal = 0
    for _ in range(20_000):
        p = rng.choice(rates)
        equal += len({rng.random() < p for _ in range(G)}) == 1
    assert zero_variance_share(rates, G) == approx(equal / 20_000, abs=0.01)


@mark.parametrize("mean", [0.1, 0.4, 0.8])
def test_assumed_pass_rates_have_the_asked_mean(mean):
    rates = pass_rate_grid(mean)
    assert sum(rates) / len(rates) == approx(mean, abs=0.02)
    assert all(0 <= p <= 1 for p in rates)


@mark.parametrize("fill", [0.05, 0.3, 0.6, 0.95, 1.0])
def test_completions_still_going_average_to_the_mean_length(fill):
    shares = alive_shares(fill, points=2000)
    assert sum(shares) / len(shares) == approx(fill, rel=0.01)
    assert shares == sorted(shares, reverse=True)


def test_decoding_alone_is_bound_by_reading_weights_and_many_rows_by_arithmetic():
    w, a100 = run(), find_gpu("a100-40")
    weights = w.shape.trunk_linear + w.shape.head
    assert decode_seconds(w, a100, PEAK, 1, 0) == approx(2 * weights / a100.bandwidth)
    assert decode_seconds(w, a100, PEAK, 4096, 0) == approx(2 * weights * 4096 / a100.flops)


def test_forward_is_two_operations_a_weight_and_token_plus_attention():
    w = run(share_prompt=False, mean_fill=1.0)
    tokens = 256 + 512
    attention = 2 * 32 * 4096 * tokens**2
    assert forward_flops(w, find_gpu("a100-40")) == approx(2 * w.shape.trunk_linear * tokens + attention)


def test_a_cpu_computes_no_padding_and_shares_prompts_with_checkpointing():
    w = run(mean_fill=0.5, micro_batch_size=4, gradient_checkpointing=True)
    cpu, a100 = this_cpu(), find_gpu("a100-40")

    def flops(prompt, completion):
        tokens = prompt + completion
        return 2 * w.shape.trunk_linear * tokens + 2 * 32 * 4096 * (256 + completion) * tokens

    assert forward_flops(w, cpu) == approx(flops(256 / 4, 256))
    assert forward_flops(w, a100) == approx(flops(256, padded_length(w)))
    assert forward_flops(replace(w, share_prompt=False), cpu) == approx(flops(256, 256))


def test_a_row_costs_the_trunk_as_many_tokens_as_the_longest_of_its_micro_batch():
    assert padded_length(run(micro_batch_size=1)) == approx(256, rel=0.01)
    assert padded_length(run(micro_batch_size=64)) == approx(512, rel=0.01)
    rng, w = random.Random(0), run(micro_batch_size=4, mean_fill=0.3)
    lengths = alive_shares(0.3, points=512)
    longest = [max(sum(u < share for share in lengths) for u in (rng.random() for _ in range(4))) for _ in range(2000)]
    assert padded_length(w) == approx(sum(longest) / len(longest), rel=0.03)


def test_few_rows_reach_a_share_of_the_rate():
    w, a100 = run(), find_gpu("a100-40")
    half = replace(PEAK, decoding=0.5)
    assert decode_seconds(w, a100, half, 4096, 0) == approx(2 * decode_seconds(w, a100, PEAK, 4096, 0))
    assert predict_cost(w, a100, half).seconds["update"] == predict_cost(w, a100, PEAK).seconds["update"]


def test_each_option_costs_where_it_should():
    gpu = find_gpu("h100")
    seconds = lambda **changes: predict_cost(run(**changes), gpu).seconds
    base = seconds()
    assert base["score"] == 0
    assert seconds(beta=0.1)["score"] > 0
    assert seconds(beta=0.1, num_iterations=2)["score"] == approx(2 * seconds(beta=0.1)["score"])
    assert seconds(scores_before_advantages=True) == base | {"score": seconds(beta=0.1)["score"]}
    assert seconds(num_iterations=2)["update"] == approx(2 * base["update"])
    assert seconds(lora_rank=16, dtype="bfloat16")["update"] < 0.8 * base["update"]
    assert seconds(gradient_checkpointing=True)["update"] > 1.2 * base["update"]
    assert seconds(share_prompt=False)["update"] > base["update"]
    assert seconds(engine_sequences=64)["generate"] > base["generate"]
    assert seconds(mean_fill=0.9)["generate"] > base["generate"]
    assert seconds(engine="hf")["sync"] == 0 < base["sync"]


def test_ranks_share_the_work_and_groups_without_signal_raise_the_cost():
    gpu = find_gpu("h100")
    one, four = predict_cost(run(), gpu), predict_cost(run(ranks=4, accumulate_grad_batches=16), gpu)
    assert four.seconds["update"] == approx(one.seconds["update"] / 4, rel=0.05)
    assert four.generated_tokens == one.generated_tokens == 256 * 256
    wasteful = predict_cost(run(), gpu, pass_rates=[0.0, 0.5])
    assert wasteful.zero_variance == approx(0.5 + 0.5 * 2 * 0.5**8)
    assert wasteful.effective == approx(wasteful.total / (1 - wasteful.zero_variance))


def test_an_efficiency_scales_the_time_it_is_about():
    gpu = find_gpu("h100")
    slow = Efficiency(
        flops=0.4,
        bandwidth=0.7,
        token_overhead=0.003,
        update_factor=3.0,
        generate_factor=2.0,
        spread=1.3,
        source="here",
    )
    base, changed = predict_cost(run(), gpu), predict_cost(run(), gpu, slow)
    assert changed.seconds["update"] == approx(3 * base.seconds["update"])
    assert changed.seconds["generate"] == approx(2 * base.seconds["generate"])


def test_a_rollout_sampled_ahead_costs_what_outlasts_the_update():
    in_turn = predict_cost(run(), find_gpu("H100"), PEAK).seconds
    ahead = predict_cost(run(rollout_ahead=True), find_gpu("H100"), PEAK).seconds
    training = in_turn["score"] + in_turn["update"]
    assert ahead == in_turn | {"generate": max(0.0, in_turn["generate"] - training)}
    long = {"completion_length": 4096, "mean_fill": 1.0, "engine_sequences": 8}
    slow, hidden = (predict_cost(run(**long, rollout_ahead=a), find_gpu("H100"), PEAK).seconds for a in (False, True))
    assert 0 < hidden["generate"] == approx(slow["generate"] - slow["score"] - slow["update"])
