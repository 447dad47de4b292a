"""The objective's identities in float64, what may lie in padding, and each part against its formula."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
from reference import GivenWeight
from torch import Tensor

from lightning_grpo.metrics import Metric
from lightning_grpo.objective import (
    DPPO,
    GMPO,
    PRESETS,
    Clipped,
    ObjectiveConfig,
    RolloutCorrection,
    kl_divergence,
    kl_penalty,
    policy_loss,
)

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
N, T = 6, 9


def batch(seed: int = 0, drift: float = 0.3) -> dict[str, Tensor]:
    """N ragged completions whose masks have holes, as tool output leaves them; the last has no token at all."""
    g = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    mask = torch.arange(T) < torch.tensor([9, 4, 7, 1, 5, 0])[:, None]
    mask[0, 3:5] = False
    logprobs = -normal(N, T).abs()
    return {
        "logprobs": logprobs,
        "old_logprobs": logprobs + drift * normal(N, T),
        "ref_logprobs": logprobs + drift * normal(N, T),
        "rollout_logprobs": logprobs + drift * normal(N, T),
        "entropy": normal(N, T).abs(),
        "advantages": normal(N),
        "mask": mask,
    }


def grads(config: ObjectiveConfig, inputs: dict[str, Tensor], **options) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients with respect to log-probs and entropy."""
    logprobs, entropy = (inputs[name].clone().requires_grad_() for name in ("logprobs", "entropy"))
    loss, _ = policy_loss(config, **inputs | {"logprobs": logprobs, "entropy": entropy} | options)
    d_logprobs, d_entropy = torch.autograd.grad(loss, [logprobs, entropy], allow_unused=True)
    return loss.detach(), d_logprobs, torch.zeros_like(entropy) if d_entropy is None else d_entropy


def full(loss_type: str, **options) -> ObjectiveConfig:
    """A preset with everything switched on that it bears."""
    return ObjectiveConfig(
        **{"loss_type": loss_type, "beta": 0.1, "use_bias_correction_kl": True, "entropy_coef": 0.02}
        | {"max_completion_length": T, "rollout_correction": RolloutCorrection(lower=0.5, upper=1.5)}
        | {"off_policy_mask_threshold": 0.02}
        | options
    )


# ---- identities ----


@pytest.mark.parametrize("loss_type", [name for name in PRESETS if name not in ("gspo", "luspo", "gmpo")])
def test_on_policy_every_token_surrogate_has_reinforces_gradient(loss_type):
    inputs = batch() | {"old_logprobs": None, "rollout_logprobs": None}
    shared = {"beta": 0.0, "aggregation": "sequence_mean"}
    _, gradient, _ = grads(ObjectiveConfig(loss_type=loss_type, **shared), inputs)
    _, reinforce, _ = grads(ObjectiveConfig(loss_type="reinforce", **shared), inputs)
    torch.testing.assert_close(gradient, reinforce, **CLOSE)


@pytest.mark.parametrize("loss_type", ["gspo", "gmpo"])
def test_on_policy_sequence_surrogates_have_reinforces_gradient_too(loss_type):
    inputs = batch() | {"old_logprobs": None, "rollout_logprobs": None}
    _, gradient, _ = grads(ObjectiveConfig(loss_type=loss_type), inputs)
    _, reinforce, _ = grads(ObjectiveConfig(loss_type="reinforce", aggregation="sequence_mean"), inputs)
    torch.testing.assert_close(gradient, reinforce, **CLOSE)


def test_absent_old_logprobs_are_those_of_now():
    inputs = batch()
    for loss_type in PRESETS:
        config = full(loss_type)
        absent = grads(config, inputs | {"old_logprobs": None})
        torch.testing.assert_close(absent, grads(config, inputs | {"old_logprobs": inputs["logprobs"]}), **CLOSE)


def test_gspo_of_one_token_is_grpo():
    inputs = {name: x[:, :1] if x.dim() == 2 else x for name, x in batch().items()}
    clip = {"epsilon": 0.1, "epsilon_high": 0.2}
    gspo = grads(full("gspo", **clip), inputs)
    torch.testing.assert_close(gspo, grads(full("grpo", **clip), inputs), **CLOSE)


def test_gmpo_without_its_clip_is_gspo_without_its_clip():
    inputs = batch()
    gmpo = grads(full("gmpo", surrogate=GMPO(epsilon=1e6)), inputs)
    gspo = grads(full("gspo", surrogate=Clipped(epsilon=1e6)), inputs)
    torch.testing.assert_close(gmpo, gspo, **CLOSE)


def test_an_unbounded_clip_leaves_the_plain_ratio_and_so_does_dppo():
    inputs = batch()
    plain = grads(full("dapo", epsilon=1e6), inputs)
    torch.testing.assert_close(plain, grads(full("dppo", surrogate=DPPO(threshold=1.0)), inputs), **CLOSE)
    logprobs = inputs["logprobs"].clone().requires_grad_()
    ratio = (logprobs - inputs["old_logprobs"]).exp()
    expected = -(ratio * inputs["advantages"][:, None])[inputs["mask"]].mean()
    config = ObjectiveConfig(loss_type="dapo", epsilon=1e6)
    loss, gradient, _ = grads(config, inputs)
    torch.testing.assert_close(loss, expected.detach(), **CLOSE)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, logprobs)[0], **CLOSE)


def test_equal_lengths_make_all_aggregations_one():
    inputs = batch() | {"mask": torch.ones(N, T, dtype=torch.bool)}
    forms = [
        grads(full("grpo", aggregation=aggregation), inputs)
        for aggregation in ("sequence_mean", "global_tokens", "local_tokens", "constant")
    ]
    for form in forms[1:]:
        torch.testing.assert_close(form, forms[0], **CLOSE)


def test_sequence_sum_is_sequence_mean_times_length():
    inputs = batch() | {"mask": torch.ones(N, T, dtype=torch.bool)}
    by_sum, gradient, _ = grads(ObjectiveConfig(loss_type="luspo"), inputs)
    by_mean, smaller, _ = grads(ObjectiveConfig(loss_type="luspo", aggregation="sequence_mean"), inputs)
    torch.testing.assert_close((by_sum, gradient), (T * by_mean, T * smaller), **CLOSE)


def test_advantages_per_token_that_are_equal_are_advantages_per_completion():
    inputs = batch()
    spread = inputs | {"advantages": inputs["advantages"][:, None].expand(N, T)}
    for loss_type in PRESETS:
        torch.testing.assert_close(grads(full(loss_type), inputs), grads(full(loss_type), spread), **CLOSE)


def test_the_levels_of_the_rollout_weight():
    inputs = batch()
    mask, difference = inputs["mask"], (inputs["old_logprobs"] - inputs["rollout_logprobs"]) * inputs["mask"]
    count = mask.sum(1, keepdim=True).clamp(min=1)
    sums = {
        "token": difference,
        "sequence": difference.sum(1, keepdim=True),
        "geometric": (difference / count).sum(1, keepdim=True),
    }
    for loss_type, level in product(PRESETS, sums):
        config = full(loss_type, rollout_correction=RolloutCorrection(level=level, upper=None))
        given = replace(config, rollout_correction=GivenWeight(sums[level].exp()))
        torch.testing.assert_close(grads(config, inputs), grads(given, inputs), **CLOSE)


def test_vespo_takes_unbounded_weights_per_token_or_per_completion_alike():
    inputs = batch()
    token, sequence = (
        grads(full("vespo", rollout_correction=RolloutCorrection(level=level, upper=None)), inputs)
        for level in ("token", "sequence")
    )
    torch.testing.assert_close(token, sequence, **CLOSE)
    without = grads(full("vespo", rollout_correction=None), inputs)
    assert (token[1] - without[1]).abs().max() > 1e-3


# ---- parts against their formulas ----


def one(config: ObjectiveConfig, ratio: float, advantage: float) -> tuple[float, float]:
    """Loss and its derivative in log π for a single token of probability 1/2 before."""
    old = torch.tensor([[math.log(0.5)]], dtype=torch.float64)
    logprobs = (old + math.log(ratio)).requires_grad_()
    advantages = torch.tensor([advantage], dtype=torch.float64)
    loss, _ = policy_loss(
        config, logprobs=logprobs, old_logprobs=old, advantages=advantages, mask=torch.ones(1, 1, dtype=torch.bool)
    )
    return loss.item(), torch.autograd.grad(loss, logprobs)[0].item()


@pytest.mark.parametrize(
    ("options", "ratio", "advantage", "loss", "gradient"),
    [
        ({"loss_type": "dapo"}, 1.1, 2.0, -2.2, -2.2),
        ({"loss_type": "dapo"}, 1.5, 2.0, -2 * 1.28, 0.0),
        ({"loss_type": "dapo"}, 0.5, 2.0, -1.0, -1.0),
        ({"loss_type": "dapo"}, 0.5, -2.0, 2 * 0.8, 0.0),
        ({"loss_type": "dapo"}, 5.0, -2.0, 10.0, 10.0),
        ({"loss_type": "dapo", "delta": 4.0}, 5.0, -2.0, 8.0, 0.0),
        ({"loss_type": "dapo", "dual_clip": 3.0}, 5.0, -2.0, 6.0, 0.0),
        ({"loss_type": "dapo", "dual_clip": 3.0}, 2.0, -2.0, 4.0, 4.0),
        ({"loss_type": "dapo", "dual_clip": 3.0}, 5.0, 2.0, -2 * 1.28, 0.0),
        ({"loss_type": "cispo"}, 2.0, 3.0, 0.0, -6.0),
        ({"loss_type": "cispo", "epsilon_high": 1.5}, 2.0, 3.0, 0.0, -4.5),
        ({"loss_type": "reinforce"}, 2.0, 3.0, 0.0, -3.0),
        ({"loss_type": "gmpo"}, 2.0, 3.0, -3 * math.exp(0.4), 0.0),
        ({"loss_type": "gmpo"}, 0.5, 3.0, -1.5, -1.5),
        ({"loss_type": "gmpo"}, 0.5, -3.0, 3 * math.exp(-0.4), 0.0),
        ({"loss_type": "dppo"}, 1.3, 1.0, -1.3, -1.3),
        ({"loss_type": "dppo"}, 1.5, 1.0, 0.0, 0.0),
        ({"loss_type": "dppo"}, 1.5, -1.0, 1.5, 1.5),
        ({"loss_type": "dppo"}, 0.5, -1.0, 0.0, 0.0),
        ({"loss_type": "sapo"}, 2.0, 1.0, -4 / (1 + math.exp(-1)), -8 * math.exp(-1) / (1 + math.exp(-1)) ** 2),
        ({"loss_type": "vespo"}, 2.0, 1.0, 0.0, -4 * math.exp(-3)),
        ({"loss_type": "vespo"}, 2.0, -1.0, 0.0, 8 * math.exp(-2)),
    ],
)
def test_a_surrogate_by_hand(options, ratio, advantage, loss, gradient):
    # for surrogates in log π the loss itself is φ·A·log π, told by its gradient
    got_loss, got_gradient = one(ObjectiveConfig(**options), ratio, advantage)
    if options["loss_type"] in ("cispo", "reinforce", "vespo"):
        loss = gradient * math.log(0.5 * ratio)
    assert got_loss == pytest.approx(loss, abs=1e-10)
    assert got_gradient == pytest.approx(gradient, abs=1e-10)


def test_dppo_measures_its_trust_region_from_the_engine():
    config = ObjectiveConfig(loss_type="dppo", aggregation="sequence_sum")
    probability = torch.tensor([[0.6, 0.6, 0.6, 0.6]], dtype=torch.float64)
    engine = torch.tensor([[0.5, 0.3, 0.9, float("nan")]], dtype=torch.float64)
    for advantage, expected in ((1.0, [-1.0, 0.0, -1.0, -1.0]), (-1.0, [1.0, 1.0, 0.0, 1.0])):
        logprobs = probability.log().requires_grad_()
        loss, metrics = policy_loss(
            config,
            logprobs=logprobs,
            advantages=torch.tensor([advantage], dtype=torch.float64),
            mask=torch.ones(1, 4),
            rollout_logprobs=engine.log(),
        )
        assert torch.autograd.grad(loss, logprobs)[0].tolist() == [expected]
        assert metrics["clip_ratio/region_mean"].compute() == 0.25


@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3"])
def test_kl_estimators(estimator):
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    x = (q / p).log()
    expected = {"k1": -x, "abs": x.abs(), "k2": x**2 / 2, "k3": x.exp() - 1 - x}[estimator]
    value = kl_divergence(p.log(), q.log(), estimator)
    torch.testing.assert_close(value, expected, **CLOSE)
    if estimator in ("k1", "k3"):
        torch.testing.assert_close((p * value).sum(), (p * (p / q).log()).sum(), **CLOSE)


def test_kl_in_the_reward_is_the_sum_over_the_completion_and_leaves_the_loss():
    inputs = batch()
    mask = inputs["mask"]
    padded = inputs["ref_logprobs"].masked_fill(~mask, float("nan"))
    penalty = kl_penalty(inputs["logprobs"], padded, mask, beta=0.1)
    expected = 0.1 * ((inputs["logprobs"] - inputs["ref_logprobs"]) * mask).sum(1)
    torch.testing.assert_close(penalty, expected, **CLOSE)
    without = grads(ObjectiveConfig(loss_type="grpo", beta=0.0), inputs)
    in_reward = ObjectiveConfig(loss_type="grpo", beta=0.1, kl_placement="reward")
    torch.testing.assert_close(grads(in_reward, inputs | {"ref_logprobs": None}), without, **CLOSE)


def weights(correction: RolloutCorrection, difference: list[float]) -> list[float]:
    """The weights in force for one completion with these log π_old − log π_rollout, read off the gradient."""
    engine = torch.zeros(1, len(difference), dtype=torch.float64)
    old = torch.tensor([difference], dtype=torch.float64)
    logprobs = old.clone().requires_grad_()
    loss, metrics = policy_loss(
        ObjectiveConfig(loss_type="luspo", importance_sampling_level="token", rollout_correction=correction),
        logprobs=logprobs,
        advantages=torch.ones(1, dtype=torch.float64),
        mask=torch.ones_like(engine, dtype=torch.bool),
        rollout_logprobs=engine,
    )
    found = (-torch.autograd.grad(loss, logprobs)[0][0]).tolist()
    assert metrics["sampling/importance_sampling_ratio/min"].compute().item() == pytest.approx(min(found))
    assert metrics["sampling/importance_sampling_ratio/max"].compute().item() == pytest.approx(max(found))
    return found


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"upper": None}, [2.0, 0.5, 3.0]),
        ({"upper": 2.5}, [2.0, 0.5, 2.5]),
        ({"lower": 0.8, "upper": 2.5}, [2.0, 0.8, 2.5]),
        ({"mode": "mask", "lower": 0.8, "upper": 2.5}, [2.0, 0.0, 0.0]),
        ({"level": "sequence", "upper": None}, [3.0] * 3),
        ({"level": "sequence", "upper": 2.0}, [2.0] * 3),
        ({"level": "sequence", "mode": "mask", "upper": 2.0}, [0.0] * 3),
        ({"level": "geometric", "upper": None}, [3 ** (1 / 3)] * 3),
        ({"level": "geometric", "mode": "mask", "lower": 0.5, "upper": 1.1}, [0.0] * 3),
    ],
)
def test_rollout_corrections(options, expected):
    assert weights(RolloutCorrection(**options), [math.log(2), math.log(0.5), math.log(3)]) == pytest.approx(expected)


def test_an_engine_that_could_not_score_a_token_leaves_it_uncorrected():
    correction = RolloutCorrection(level="token", upper=None)
    config = ObjectiveConfig(loss_type="grpo", beta=0.0, rollout_correction=correction, off_policy_mask_threshold=0.01)
    inputs = batch()
    base = inputs | {"old_logprobs": None, "advantages": -torch.ones(N, dtype=torch.float64)}
    near = inputs["logprobs"] - 0.01
    unscored, known = near.clone(), near.clone()
    unscored[1, 2] = float("nan")
    known[1, 2] = inputs["logprobs"][1, 2]
    expected = grads(config, base | {"rollout_logprobs": known})
    torch.testing.assert_close(grads(config, base | {"rollout_logprobs": unscored}), expected, **CLOSE)
    _, metrics = policy_loss(config, **base | {"rollout_logprobs": unscored})
    difference = metrics["sampling/sampling_logp_difference/mean"]
    assert difference.count == inputs["mask"].sum() - 1
    assert difference.compute().isfinite()


def test_truncated_completions_leave_the_loss_and_stay_in_its_means():
    inputs = batch() | {"mask": torch.ones(N, T, dtype=torch.bool)}
    truncated = torch.tensor([True, False, False, True, False, False])
    for drop, dropped in ((False, torch.zeros(N, dtype=torch.bool)), (True, truncated)):
        config = ObjectiveConfig(loss_type="grpo", mask_truncated_completions=drop)
        mask = config.loss_mask(inputs["mask"].int(), truncated)
        _, gradient, _ = grads(config, inputs | {"mask": mask})
        _, whole, _ = grads(config, inputs)
        torch.testing.assert_close(gradient, whole.masked_fill(dropped[:, None], 0.0), **CLOSE)


def test_the_top_entropy_mask_keeps_the_share_asked_for():
    inputs = batch() | {"mask": torch.ones(N, T, dtype=torch.bool)}
    config = ObjectiveConfig(loss_type="reinforce", top_entropy_quantile=0.25)
    _, gradient, _ = grads(config, inputs)
    kept = gradient != 0
    assert kept.sum() == math.ceil(0.25 * N * T)
    assert inputs["entropy"][kept].min() > inputs["entropy"][~kept].max()


def test_the_off_policy_mask_drops_negative_completions_far_from_their_sampler():
    inputs = batch()
    engine = inputs["logprobs"] + torch.tensor([0.3, 0.3, 0.1, 0.3, 0.3, 0.3])[:, None]
    inputs |= {"advantages": torch.tensor([-1.0, 1.0, -1.0, 0.0, -1.0, -1.0]).double(), "rollout_logprobs": engine}
    config = ObjectiveConfig(loss_type="reinforce", off_policy_mask_threshold=0.2)
    _, gradient, _ = grads(config, inputs)
    assert gradient.ne(0).any(1).tolist() == [False, True, True, False, False, False]
    _, metrics = policy_loss(config, **inputs)
    assert metrics["off_policy_kept"].value == 3, "completions 1 to 3; the last has no token"


# ---- padding ----


@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -float("inf"), -200.0, 1e30])
@pytest.mark.parametrize("loss_type", PRESETS)
def test_padding_may_hold_anything(loss_type, garbage):
    config = full(loss_type, top_entropy_quantile=0.6)
    clean = batch()
    clean["advantages"] = torch.randn(N, T, dtype=torch.float64)
    mask = clean["mask"]
    dirty = {name: x if name == "mask" else x.masked_fill(~mask, garbage) for name, x in clean.items()}
    loss, *gradients = grads(config, dirty)
    torch.testing.assert_close((loss, *gradients), grads(config, clean), rtol=0, atol=0)
    for gradient in gradients:
        assert gradient.isfinite().all() and (gradient[~mask] == 0).all()
    _, metrics = policy_loss(config, **dirty)
    _, expected = policy_loss(config, **clean)
    for name, metric in metrics.items():
        torch.testing.assert_close(metric.compute(), expected[name].compute(), rtol=0, atol=0)


def test_a_batch_without_a_single_token_gives_zero():
    inputs = batch() | {"mask": torch.zeros(N, T, dtype=torch.bool)}
    for loss_type in PRESETS:
        loss, gradient, d_entropy = grads(full(loss_type, top_entropy_quantile=0.5), inputs)
        assert loss == 0 and (gradient == 0).all() and (d_entropy == 0).all()


def test_a_batch_without_a_single_completion_gives_zero_and_metrics_that_merge():
    empty = {name: x[:0] for name, x in batch().items()}
    for loss_type in PRESETS:
        config = full(loss_type, top_entropy_quantile=0.5)
        loss, gradient, _ = grads(config, empty)
        assert loss == 0 and gradient.shape == (0, T)
        _, nothing = policy_loss(config, **empty)
        _, something = policy_loss(config, **batch())
        for name, metric in something.items():
            assert nothing[name].merge(metric).compute() == metric.compute()


@pytest.mark.parametrize("loss_type", PRESETS)
@pytest.mark.parametrize("gap", [60.0, -60.0, 1e4, -1e4])
def test_a_wild_ratio_leaves_loss_and_gradient_finite(loss_type, gap):
    inputs = {name: x.float() if x.is_floating_point() else x for name, x in batch().items()}
    for name in ("old_logprobs", "ref_logprobs", "rollout_logprobs"):
        wild = inputs | {name: inputs[name] + gap}
        loss, gradient, _ = grads(full(loss_type), wild)
        assert loss.isfinite() and gradient.isfinite().all()


def test_half_precision_is_computed_in_float32():
    inputs = batch()
    half = {name: x.bfloat16() if x.is_floating_point() else x for name, x in inputs.items()}
    widened = {name: x.float() if x.is_floating_point() else x for name, x in half.items()}
    loss, gradient, _ = grads(full("grpo"), half)
    expected, wide_gradient, _ = grads(full("grpo"), widened)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, wide_gradient.bfloat16())


# ---- inputs and metrics ----


@pytest.mark.parametrize(
    ("options", "inputs", "words"),
    [
        ({}, {}, ["max_completion_length", "dr_grpo"]),
        ({"loss_type": "grpo"}, {"ref_logprobs": None}, ["ref_logprobs", "beta is 0.04"]),
        ({"loss_type": "dapo", "entropy_coef": 0.1}, {"entropy": None}, ["entropy", "entropy_coef is 0.1"]),
        ({"loss_type": "dapo", "top_entropy_quantile": 0.2}, {"entropy": None}, ["top_entropy_quantile is 0.2"]),
        (
            {"loss_type": "dapo", "rollout_correction": RolloutCorrection()},
            {"rollout_logprobs": None},
            ["rollout_logprobs", "rollout_correction"],
        ),
        ({"loss_type": "dapo"}, {"mask": torch.ones(N, T + 1)}, ["mask", f"[{N}, {T + 1}]", f"[{N}, {T}]"]),
        ({"loss_type": "dapo"}, {"advantages": torch.ones(T)}, ["advantages", f"[{T}]", f"[{N}]"]),
        ({"loss_type": "dapo"}, {"logprobs": torch.ones(T)}, ["logprobs", f"[{T}]"]),
    ],
)
def test_missing_and_misshapen_inputs_are_named(options, inputs, words):
    with pytest.raises(ValueError) as error:
        policy_loss(ObjectiveConfig(**options), **batch() | inputs)
    assert all(word in str(error.value) for word in words), error.value


def test_metrics_are_means_over_what_they_claim_and_merge():
    inputs = batch()
    config = ObjectiveConfig(loss_type="grpo", epsilon=0.1, entropy_coef=0.01)
    _, whole = policy_loss(config, **inputs)
    parts = [policy_loss(config, **{k: v[rows] for k, v in inputs.items()})[1] for rows in (slice(0, 2), slice(2, N))]
    for name, metric in whole.items():
        merged = parts[0][name].merge(parts[1][name])
        assert isinstance(merged, Metric) and not merged.compute().requires_grad
        torch.testing.assert_close(merged.compute(), metric.compute(), **CLOSE)
    mask, A = inputs["mask"], inputs["advantages"][:, None]
    ratio = (inputs["logprobs"] - inputs["old_logprobs"]).exp()
    low, high = (ratio < 0.9) & (A < 0), (ratio > 1.1) & (A > 0)
    by_row = lambda x: torch.stack([row[m].double().mean() for row, m in zip(x, mask, strict=True) if m.any()])
    expected = {
        "clip_ratio/low_mean": low[mask].double().mean(),
        "clip_ratio/high_mean": high[mask].double().mean(),
        "clip_ratio/region_mean": (low | high)[mask].double().mean(),
        "clip_ratio/low_min": by_row(low).min(),
        "clip_ratio/high_max": by_row(high).max(),
        "entropy": inputs["entropy"][mask].mean(),
        "kl": kl_divergence(inputs["logprobs"], inputs["ref_logprobs"])[mask].mean(),
        "ratio/mean": ratio[mask].mean(),
        "ratio/min": ratio[mask].min(),
        "ratio/max": ratio[mask].max(),
        "sampling/sampling_logp_difference/max": (inputs["old_logprobs"] - inputs["rollout_logprobs"])[mask]
        .abs()
        .max(),
        "sampling/kl": kl_divergence(inputs["rollout_logprobs"], inputs["old_logprobs"])[mask].mean(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(whole[name].compute(), value, **CLOSE)
    assert 0 < expected["clip_ratio/region_mean"] < 1


def test_sequence_level_metrics_count_completions():
    inputs = batch()
    _, metrics = policy_loss(ObjectiveConfig(loss_type="gspo"), **inputs)
    assert metrics["clip_ratio/region_mean"].count == N - 1, "the completion without tokens doesn't count"


def test_the_ratio_of_trainer_and_engine_in_closed_form():
    """Two tokens of weights 2 and 1/2, and one that the engine could not score."""
    old = torch.tensor([[-1.0, -2.0, -1.0, 5.0]])
    engine = old - torch.tensor([[2.0, 0.5, 1.0, 1.0]]).log()
    engine[0, 2] = torch.nan
    mask = torch.tensor([[True, True, True, False]])
    _, metrics = policy_loss(
        ObjectiveConfig(max_completion_length=4),
        logprobs=old, advantages=torch.ones(1), mask=mask, rollout_logprobs=engine,
    )  # fmt: skip
    values = {name: float(metric.compute()) for name, metric in metrics.items() if name.startswith("sampling/")}
    expected = {"ratio/min": 0.5, "ratio/max": 2, "ratio/mean": 1.25, "ratio/std": 1.5 / 2**0.5}
    expected |= {"ess": 2.5**2 / (2 * 4.25), "chi2": 4.25 / 2 - 1, "k1": 0.0}
    assert {name: values[f"sampling/{name}"] for name in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("bounded", [None, RolloutCorrection(level="sequence", upper=1.0)])
def test_the_effective_sample_size_is_that_of_whole_completions_before_any_bound(bounded):
    inputs = batch()
    inputs["rollout_logprobs"][1, 0] = math.nan  # counts as π/π_engine = 1
    log_ratio = (inputs["logprobs"] - inputs["rollout_logprobs"]).nan_to_num()
    weights = [float(row[mask].sum().exp()) for row, mask in zip(log_ratio, inputs["mask"], strict=True)][: N - 1]
    config = ObjectiveConfig(rollout_correction=bounded, max_completion_length=T)
    _, metrics = policy_loss(config, **inputs)
    expected = sum(weights) ** 2 / sum(w**2 for w in weights) / len(weights)
    assert float(metrics["sampling/sequence_ess"].compute()) == pytest.approx(expected)
    _, metrics = policy_loss(config, **inputs | {"rollout_logprobs": inputs["logprobs"]})
    assert float(metrics["sampling/sequence_ess"].compute()) == pytest.approx(1, abs=1e-12)
