"""Choosing an objective: presets, contradictions, YAML."""

from dataclasses import dataclass

import pytest
import torch
from jsonargparse import ArgumentParser

from lightning_grpo.objective import (
    CISPO,
    PRESETS,
    SAPO,
    AdaptiveBeta,
    AdaptiveEntropy,
    AdvantageConfig,
    Clipped,
    Coefficients,
    ObjectiveConfig,
    RolloutCorrection,
    Surrogate,
    Terms,
    policy_loss,
)


@dataclass(frozen=True, kw_only=True)
class Tempered(Surrogate):
    """What a user would write in a file of their own."""

    power: float = 1.0

    def __call__(self, terms: Terms) -> torch.Tensor:
        return -(terms.ratio**self.power) * terms.advantages


class Module:
    """Takes its objective as a LightningModule does."""

    def __init__(
        self, objective: ObjectiveConfig = ObjectiveConfig(), advantages: AdvantageConfig = AdvantageConfig()
    ) -> None:
        self.objective, self.advantages = objective, advantages


def parse(*args: str, yaml: str | None = None) -> Module:
    parser = ArgumentParser()
    parser.add_class_arguments(Module, "model")
    given = parser.parse_string(yaml) if yaml else parser.parse_args(list(args))
    return parser.instantiate_classes(given).model


def test_the_default_is_dr_grpo_without_reference():
    config = ObjectiveConfig()
    assert config.loss_type == "dr_grpo"
    assert config.resolved.aggregation == "constant"
    assert not config.needs_reference
    assert AdvantageConfig().scale_rewards == "none"


@pytest.mark.parametrize(
    ("loss_type", "surrogate", "level", "beta"),
    [
        ("grpo", Clipped(epsilon=0.2), "token", 0.04),
        ("dapo", Clipped(epsilon=0.2, epsilon_high=0.28), "token", 0.0),
        ("gspo", Clipped(epsilon=3e-4, epsilon_high=4e-4), "sequence", 0.0),
        ("cispo", CISPO(epsilon_high=5.0), "token", 0.0),
        ("sapo", SAPO(temperature_positive=1.0, temperature_negative=1.05), "token", 0.0),
    ],
)
def test_a_name_alone_gives_the_published_form(loss_type, surrogate, level, beta):
    parts = ObjectiveConfig(loss_type=loss_type).resolved
    assert (parts.surrogate, parts.importance_sampling_level, parts.beta) == (surrogate, level, beta)


def test_epsilon_alone_is_symmetric_and_both_are_kept():
    assert ObjectiveConfig(loss_type="dapo", epsilon=0.1).resolved.surrogate.bounds == (0.9, 1.1)
    assert ObjectiveConfig(loss_type="dapo", epsilon_high=0.5).resolved.surrogate.bounds == (0.8, 1.5)
    assert ObjectiveConfig(loss_type="dapo", epsilon=0.1, epsilon_high=0.5).resolved.surrogate.bounds == (0.9, 1.5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_type": "grop"}, ["loss_type", "'grop'", "dr_grpo"]),
        ({"importance_sampling_level": "turn"}, ["importance_sampling_level", "'turn'", "sequence"]),
        ({"aggregation": "mean"}, ["aggregation", "'mean'", "sequence_mean"]),
        ({"kl_estimator": "k4"}, ["kl_estimator", "'k4'", "k3"]),
        ({"beta": -0.1}, ["beta", "-0.1", "0 or more"]),
        ({"epsilon": -0.1}, ["epsilon", "-0.1", "0 or more"]),
        ({"top_entropy_quantile": 0.0}, ["top_entropy_quantile", "0.0", "(0, 1]"]),
        ({"max_completion_length": 0}, ["max_completion_length", "0", "1 or more"]),
        ({"loss_type": "sapo", "delta": 2.0}, ["delta", "2.0", "SAPO", "null"]),
        ({"loss_type": "cispo", "dual_clip": 3.0}, ["dual_clip", "3.0", "CISPO"]),
        ({"delta": 0.9}, ["delta", "0.9", "above 1"]),
        ({"dual_clip": 1.0}, ["dual_clip", "1.0", "above 1"]),
        ({"surrogate": Clipped(), "epsilon": 0.3}, ["epsilon", "0.3", "surrogate"]),
        ({"kl_placement": "reward", "use_bias_correction_kl": True}, ["use_bias_correction_kl", "'reward'", "'loss'"]),
        ({"adaptive_beta": AdaptiveBeta(target=0.1)}, ["adaptive_beta", "beta is 0", "0.01"]),
        ({"adaptive_entropy": AdaptiveEntropy(minimum=0.1)}, ["entropy_coef", "0.1"]),
    ],
)
def test_wrong_options_are_named_with_their_value_and_the_way_out(options, words):
    with pytest.raises(ValueError) as error:
        ObjectiveConfig(**options)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: RolloutCorrection(lower=2.0), ["lower", "2.0"]),
        (lambda: RolloutCorrection(upper=0.5), ["upper", "0.5"]),
        (lambda: AdaptiveBeta(target=0.0), ["target", "0.0"]),
        (lambda: AdaptiveEntropy(minimum=2.0), ["minimum", "2.0"]),
    ],
)
def test_parts_check_their_numbers(build, words):
    with pytest.raises(ValueError) as error:
        build()
    assert all(word in str(error.value) for word in words)


def test_an_unused_clip_range_warns():
    with pytest.warns(UserWarning, match=r"epsilon is 0.3.*SAPO") as warned:
        ObjectiveConfig(loss_type="sapo", epsilon=0.3)
    assert len(warned) == 1


@pytest.mark.parametrize("loss_type", PRESETS)
def test_every_preset_is_built_from_the_command_line(loss_type):
    assert parse(f"--model.objective.loss_type={loss_type}").objective == ObjectiveConfig(loss_type=loss_type)


def test_yaml_builds_the_whole_objective_and_a_users_own_surrogate():
    module = parse(
        yaml=f"""
        model:
          objective:
            loss_type: dapo
            surrogate:
              class_path: {__name__}.Tempered
              init_args:
                power: 0.5
            beta: 0.01
            kl_estimator: k2
            adaptive_beta:
              target: 0.05
            rollout_correction:
              level: sequence
              mode: mask
              lower: 0.5
              upper: 5.0
            max_completion_length: 64
          advantages:
            estimator: pass_at_k
            k: 4
        """
    )
    assert module.objective == ObjectiveConfig(
        loss_type="dapo",
        surrogate=Tempered(power=0.5),
        beta=0.01,
        kl_estimator="k2",
        adaptive_beta=AdaptiveBeta(target=0.05),
        rollout_correction=RolloutCorrection(level="sequence", mode="mask", lower=0.5, upper=5.0),
        max_completion_length=64,
    )
    assert module.advantages == AdvantageConfig(estimator="pass_at_k", k=4)


def test_a_users_own_surrogate_is_what_is_optimised():
    logprobs = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    old = torch.tensor([[-1.5, -1.0]])
    config = ObjectiveConfig(loss_type="bnpo", surrogate=Tempered(power=2.0))
    loss, _ = policy_loss(
        config, logprobs=logprobs, advantages=torch.tensor([3.0]), mask=torch.ones(1, 2), old_logprobs=old
    )
    expected = -3 * (torch.tensor(1.0).exp() + torch.tensor(-2.0).exp()) / 2
    torch.testing.assert_close(loss.detach(), expected)


def test_what_the_module_may_leave_undone():
    plain = ObjectiveConfig()
    assert plain.skips_zero_advantage
    assert not plain.needs_old_logprobs(1) and plain.needs_old_logprobs(2)
    assert not ObjectiveConfig(loss_type="reinforce").needs_old_logprobs(4)
    assert ObjectiveConfig(loss_type="reinforce", rollout_correction=RolloutCorrection()).needs_old_logprobs(4)

    in_loss, in_reward = ObjectiveConfig(beta=0.1), ObjectiveConfig(beta=0.1, kl_placement="reward")
    assert in_loss.needs_reference and in_loss.kl_in_loss and not in_loss.skips_zero_advantage
    assert in_reward.needs_reference and in_reward.kl_in_reward and in_reward.skips_zero_advantage

    assert in_loss.resolved.kl_estimator == "k3" and in_reward.resolved.kl_estimator == "k1"

    bonus = ObjectiveConfig(entropy_coef=0.01)
    assert bonus.needs_entropy_grad and not bonus.skips_zero_advantage
    assert ObjectiveConfig(adaptive_entropy=AdaptiveEntropy()).needs_entropy_grad
    top = ObjectiveConfig(top_entropy_quantile=0.2)
    assert top.needs_entropy and not top.needs_entropy_grad and not top.skips_zero_advantage
    assert not ObjectiveConfig(loss_type="bnpo").skips_zero_advantage


def test_adaptive_beta_moves_towards_its_target_and_is_saved():
    coefficients = Coefficients(ObjectiveConfig(beta=0.1, adaptive_beta=AdaptiveBeta(target=0.05)))
    assert coefficients.config.resolved.beta == 0.1
    coefficients.step(kl=0.5)
    assert coefficients.config.resolved.beta == pytest.approx(0.1 * 1.02)
    coefficients.step(kl=0.0)
    assert coefficients.config.resolved.beta == pytest.approx(0.1 * 1.02 * 0.98)
    coefficients.step(kl=0.0505)
    assert coefficients.config.resolved.beta == pytest.approx(0.1 * 1.02 * 0.98 * 1.001)
    restored = Coefficients(coefficients.base)
    restored.load_state_dict(coefficients.state_dict())
    assert restored.config == coefficients.config


def test_adaptive_entropy_gives_a_bonus_only_while_entropy_is_low():
    config = ObjectiveConfig(
        entropy_coef=0.01, adaptive_entropy=AdaptiveEntropy(target=0.2, minimum=0.01, maximum=0.017)
    )
    coefficients = Coefficients(config)
    assert coefficients.config.entropy_coef == 0, "nothing is known yet of the entropy"
    seen = []
    for entropy in (0.1, 0.1, 0.3, 0.3, 0.2):
        coefficients.step(entropy=entropy)
        seen.append((coefficients.entropy_coef, coefficients.config.entropy_coef))
    assert seen == [
        (pytest.approx(0.015), pytest.approx(0.015)),
        (pytest.approx(0.017), pytest.approx(0.017)),
        (pytest.approx(0.012), 0),
        (pytest.approx(0.01), 0),
        (pytest.approx(0.015), pytest.approx(0.015)),
    ]


def test_fixed_coefficients_stay():
    config = ObjectiveConfig(loss_type="grpo", entropy_coef=0.02)
    coefficients = Coefficients(config)
    coefficients.step(kl=9.0, entropy=9.0)
    assert coefficients.config is config


@pytest.mark.parametrize("loss_type", [name for name in PRESETS if name != "grpo"])
def test_on_policy_gradient_without_the_log_probs(loss_type):
    config = ObjectiveConfig(loss_type=loss_type, max_completion_length=5)
    torch.manual_seed(0)
    gradients = []
    for logprobs in (torch.zeros(3, 5), -torch.rand(3, 5)):
        logprobs.requires_grad_()
        loss, _ = policy_loss(
            config, logprobs=logprobs, advantages=torch.tensor([1.0, -1.0, 0.5]), mask=torch.ones(3, 5)
        )
        gradients.append(torch.autograd.grad(loss, logprobs)[0])
    assert config.constant_on_policy
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-8)


def test_what_makes_the_on_policy_gradient_depend_on_the_log_probs():
    assert not ObjectiveConfig(loss_type="grpo").constant_on_policy
    assert not ObjectiveConfig(entropy_coef=0.1).constant_on_policy
    assert not ObjectiveConfig(off_policy_mask_threshold=0.1).constant_on_policy
