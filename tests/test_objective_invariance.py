"""The gradient of an optimizer step does not depend on how the step is split, padded or ordered.

A trainer splits N completions over ranks and micro-batches, pads each by itself, and averages the losses.
"""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_grpo.objective import PRESETS, ObjectiveConfig, RolloutCorrection, policy_loss
from lightning_grpo.policy.attention import NAME as ATTENTION
from lightning_grpo.policy.logprobs import completion_logprobs

N, T = 12, 10
GLOBAL = [name for name in PRESETS if name != "bnpo"]
PER_TOKEN = ("logprobs", "old_logprobs", "ref_logprobs", "rollout_logprobs", "entropy")
EVERYTHING = {"beta": 0.1, "entropy_coef": 0.05, "off_policy_mask_threshold": 0.1, "max_completion_length": 2 * T}
TINY = LlamaConfig(
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    initializer_range=0.2,
)


def step() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    logprobs = -torch.rand(N, T, generator=g, dtype=torch.float64)
    near = lambda: logprobs + 0.3 * torch.randn(N, T, generator=g, dtype=torch.float64)
    lengths = torch.tensor([10, 1, 4, 7, 2, 2, 9, 3, 5, 6, 1, 8])
    advantages = torch.randn(N, generator=g, dtype=torch.float64)
    advantages[3:6] = 0.0
    return {
        "logprobs": logprobs,
        "old_logprobs": near(),
        "ref_logprobs": near(),
        "rollout_logprobs": near(),
        "entropy": torch.rand(N, T, generator=g, dtype=torch.float64),
        "advantages": advantages,
        "mask": torch.arange(T) < lengths[:, None],
    }


def repad(x: dict[str, Tensor], width: int, filler: float) -> dict[str, Tensor]:
    """The same rows, cut or padded to ``width`` columns, with ``filler`` wherever there is no token."""
    mask = torch.nn.functional.pad(x["mask"], (0, width - T))
    grown = {name: torch.nn.functional.pad(x[name], (0, width - T)).masked_fill(~mask, filler) for name in PER_TOKEN}
    return x | grown | {"mask": mask}


def gradient(
    config: ObjectiveConfig, x: dict[str, Tensor], micro_batches: list[Tensor], *, trim: bool = True, total: int = N
) -> Tensor:
    """d(step)/d(log-probs and entropy), [2, N, T], of rows split into micro-batches as a trainer would."""
    leaves = {name: x[name].clone().requires_grad_() for name in ("logprobs", "entropy")}
    tokens, parts = int(step()["mask"].sum()), len(micro_batches)
    loss = 0.0
    for i, rows in enumerate(micro_batches):
        part = {name: value[rows] for name, value in (x | leaves).items()}
        if trim:
            part = repad(part, int(part["mask"].sum(1).max()) + i % 3, float("nan"))
        value, _ = policy_loss(config, **part, num_tokens=tokens / parts, num_sequences=total / parts)
        loss = loss + value / parts
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return torch.stack([torch.zeros(N, T, dtype=torch.float64) if g is None else g for g in grads])


def everything(loss_type: str) -> ObjectiveConfig:
    correction = None if loss_type == "vespo" else RolloutCorrection(lower=0.5, upper=1.5)
    return ObjectiveConfig(loss_type=loss_type, rollout_correction=correction, **EVERYTHING)


SPLITS = {
    "one batch": [12],
    "micro-batches of 1": [1] * 12,
    "micro-batches of 4": [4] * 3,
    "2 ranks of 2 micro-batches": [3] * 4,
    "4 ranks": [3, 3, 3, 3],
    "uneven": [5, 1, 4, 2],
}


@pytest.mark.parametrize("shuffled", [False, True], ids=["in order", "shuffled"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("loss_type", GLOBAL)
def test_a_split_step_has_the_whole_steps_gradient(loss_type, split, shuffled):
    config, x = everything(loss_type), step()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2)) if shuffled else torch.arange(N)
    got = gradient(config, x, list(order.split(SPLITS[split])))
    expected = gradient(config, x, [torch.arange(N)], trim=False)
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert expected.abs().max() > 1e-3


def test_without_totals_one_batch_is_taken_for_the_whole_step():
    x = step()
    for loss_type in GLOBAL:
        config = everything(loss_type)
        logprobs = x["logprobs"].clone().requires_grad_()
        loss, _ = policy_loss(config, **x | {"logprobs": logprobs})
        expected = gradient(config, x, [torch.arange(N)])[0]
        torch.testing.assert_close(torch.autograd.grad(loss, logprobs)[0], expected, rtol=1e-10, atol=1e-10)


def test_the_gradient_of_bnpo_depends_on_the_micro_batches():
    config, x = ObjectiveConfig(loss_type="bnpo"), step()
    whole = gradient(config, x, [torch.arange(N)])
    halves = gradient(config, x, list(torch.arange(N).split(6)))
    assert (whole - halves).abs().max() > 1e-3


@pytest.mark.parametrize("loss_type", PRESETS)
def test_completions_without_advantage_may_be_left_out_where_the_objective_says_so(loss_type):
    x = step()
    config = ObjectiveConfig(loss_type=loss_type, beta=0.0, max_completion_length=2 * T)
    kept = x["advantages"].nonzero()[:, 0]
    assert len(kept) == N - 3
    whole, fewer = gradient(config, x, [torch.arange(N)]), gradient(config, x, [kept])
    same = torch.allclose(whole, fewer, rtol=1e-10, atol=1e-10)
    assert same == config.skips_zero_advantage


def test_with_a_kl_or_an_entropy_bonus_they_may_not_be_left_out():
    x = step()
    kept = x["advantages"].nonzero()[:, 0]
    for options in ({"beta": 0.1}, {"entropy_coef": 0.1}):
        config = ObjectiveConfig(loss_type="dapo", **options)
        assert not config.skips_zero_advantage
        missing = gradient(config, x, [torch.arange(N)]) - gradient(config, x, [kept])
        assert missing.abs().max() > 1e-4


# ── Rows without padding ──────────────────────────────────────────────────────────────────────────────────────────────


def weight_gradient(loss_type: str, attention: str, micro_batches: list[Tensor], share_prompt: bool = True) -> Tensor:
    """The gradient of all weights of a tiny model for the step, whose rows have three prompts."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(TINY)
    model.set_attn_implementation(attention)
    x, config, g = step(), everything(loss_type), torch.Generator().manual_seed(3)
    rows = {
        "prompt_ids": torch.randint(50, (3, 6), generator=g).repeat_interleave(4, 0),
        "prompt_mask": (torch.arange(6) >= torch.tensor([[0], [3], [2]])).repeat_interleave(4, 0),
        "completion_ids": torch.randint(50, (N, T), generator=g),
        "completion_mask": x["mask"],
    }
    for part in micro_batches:
        given = {name: value[part] for name, value in x.items()}
        logprobs, entropy = completion_logprobs(
            model, **{name: value[part] for name, value in rows.items()}, share_prompt=share_prompt, entropy_grad=True
        )
        given |= {"logprobs": logprobs.double(), "entropy": entropy.double()}
        totals = {"num_tokens": int(x["mask"].sum()) / len(micro_batches), "num_sequences": N / len(micro_batches)}
        loss, _ = policy_loss(config, **given, **totals)
        (loss / len(micro_batches)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("loss_type", GLOBAL)
def test_packed_rows_have_the_gradient_of_padded_ones(loss_type):
    expected = weight_gradient(loss_type, "sdpa", [torch.arange(N)], share_prompt=False)
    uneven = list(torch.randperm(N, generator=torch.Generator().manual_seed(2)).split([5, 1, 4, 2]))
    for micro_batches in ([torch.arange(N)], uneven):
        for share_prompt in (True, False):
            found = weight_gradient(loss_type, ATTENTION, micro_batches, share_prompt)
            assert (found - expected).norm() < 1e-5 * expected.norm()


# ── Tokens that the policy did not sample ─────────────────────────────────────────────────────────────────────────────


def with_holes(x: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    """The step with tokens within completions masked, and the columns of each row without them."""
    holes = torch.zeros(N, T, dtype=torch.bool)
    holes[:, 1:3] = holes[:, 6] = True
    last = torch.arange(T) == x["mask"].sum(1, keepdim=True) - 1
    mask = x["mask"] & (~holes | last)
    return x | {"mask": mask}, mask.int().argsort(dim=1, descending=True, stable=True)


@pytest.mark.parametrize("loss_type", PRESETS)
def test_foreign_tokens_within_completions_have_no_influence(loss_type):
    x, order = with_holes(step())
    foreign = ~x["mask"] & (torch.arange(T) < step()["mask"].sum(1, keepdim=True))
    assert foreign.sum() > N
    config = everything(loss_type)
    found = gradient(config, x, [torch.arange(N)], trim=False)
    assert not found[:, foreign].any()
    for filler in (0.0, -50.0, float("nan")):
        changed = x | {name: x[name].masked_fill(foreign, filler) for name in PER_TOKEN}
        assert torch.equal(gradient(config, changed, [torch.arange(N)], trim=False), found)
    # the same tokens without the others in between
    closed = {name: x[name].gather(1, order) for name in (*PER_TOKEN, "mask")}
    expected = gradient(config, x | closed, [torch.arange(N)], trim=False)
    torch.testing.assert_close(found.gather(2, order.expand(2, N, T)), expected, rtol=1e-10, atol=1e-12)
    assert expected.abs().max() > 1e-3
