"""Seeds and the sampled distribution."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_grpo.rollout import Sampling, rollout_seeds
from lightning_grpo.rollout.hf.sampling import draw, sampled_logprobs
from lightning_grpo.rollout.seeds import _mix, uniform

index = st.integers(0, 2**31)


def test_seeds_are_pinned():
    """A change of the hash would silently change every run."""
    assert rollout_seeds(42, 0, 0, 0) == 6967232409577074121
    assert rollout_seeds(42, 1, 2, 3) == 2295903681480754174
    assert uniform(7, 0) == 0.7215081806049702


@given(index, index, index, index)
def test_seeds_are_63_bits(seed, rollout, prompt, sample):
    assert 0 <= rollout_seeds(seed, rollout, prompt, sample) < 2**63


def test_the_hash_is_splitmix64():
    """The first outputs of the generator seeded with 0, from its authors' reference implementation."""
    golden = 0x9E3779B97F4A7C15
    assert [_mix(i * golden) for i in range(3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_seeds_differ_in_every_argument():
    seeds = {rollout_seeds(s, r, p, g) for s in range(6) for r in range(6) for p in range(6) for g in range(6)}
    assert len(seeds) == 6**4


def test_uniforms_are_uniform_and_independent_of_neighbours():
    u = torch.tensor([[uniform(seed, t) for t in range(100)] for seed in range(100)], dtype=torch.float64)
    assert u.min() >= 0 and u.max() < 1
    counts = torch.histc(u, bins=20, min=0, max=1)
    chi2 = ((counts - 500) ** 2 / 500).sum()
    assert chi2 < 43.8  # the 0.999 quantile with 19 degrees of freedom
    for pair in (torch.stack([u[:-1].flatten(), u[1:].flatten()]), torch.stack([u[:, :-1].ravel(), u[:, 1:].ravel()])):
        assert torch.corrcoef(pair)[0, 1].abs() < 0.04


def test_draws_follow_the_distribution():
    logprobs = torch.tensor([0.5, 0.25, 0.0, 0.2, 0.05]).log().expand(20_000, 5)
    uniforms = torch.tensor([uniform(seed, 3) for seed in range(20_000)], dtype=torch.float64)
    share = torch.bincount(draw(logprobs, uniforms), minlength=5) / 20_000
    assert share[2] == 0
    torch.testing.assert_close(share, logprobs[0].exp(), atol=0.012, rtol=0)


def test_draw_at_the_ends_never_takes_an_excluded_token():
    logprobs = torch.tensor([[-math.inf, 0.0, -math.inf]])
    for u in (0.0, 0.5, 1 - 2**-53):
        assert draw(logprobs, torch.tensor([u], dtype=torch.float64)).item() == 1


@pytest.mark.parametrize("size", [256, 300, 1000])
def test_draws_invert_the_distribution_function(size):
    """Against a plain float64 sum over all tokens, in rows of which most are excluded."""
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(200, size, generator=generator)
    logprobs = logits.masked_fill(torch.rand(200, size, generator=generator) < 0.8, -math.inf).log_softmax(-1)
    uniforms = torch.rand(200, generator=generator, dtype=torch.float64)
    uniforms[:2] = torch.tensor([0.0, 1 - 2**-53])
    tokens = draw(logprobs, uniforms)
    p = logprobs.double().exp()
    after = p.cumsum(-1).gather(1, tokens[:, None])[:, 0]
    own = p.gather(1, tokens[:, None])[:, 0]
    assert (own > 0).all()
    assert (after - own - 1e-6 <= uniforms).all() and (uniforms <= after + 1e-6).all()


def test_greedy_takes_the_most_likely():
    logprobs = torch.randn(3, 7)
    assert draw(logprobs, torch.rand(3), greedy=True).tolist() == logprobs.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(top_k=2), [0, 1]),
        (Sampling(top_p=0.5), [0]),
        (Sampling(top_p=0.51), [0, 1]),
        (Sampling(min_p=0.3), [0, 1, 2]),
        (Sampling(top_k=3, top_p=0.9), [0, 1, 2]),
        (Sampling(top_k=99), [0, 1, 2, 3]),
    ],
)
def test_truncations_keep_and_renormalize(sampling, kept):
    p = torch.tensor([0.5, 0.25, 0.15, 0.1])
    out = sampled_logprobs(p.log()[None], sampling)[0]
    assert out.isfinite().nonzero().flatten().tolist() == kept
    torch.testing.assert_close(out[kept].exp(), p[kept] / p[kept].sum())


def test_temperature_and_greedy():
    logits = torch.randn(2, 9)
    torch.testing.assert_close(sampled_logprobs(logits, Sampling(temperature=0.5)), (logits / 0.5).log_softmax(-1))
    torch.testing.assert_close(sampled_logprobs(logits, Sampling(temperature=0)), logits.log_softmax(-1))


def test_repetition_penalty_moves_seen_tokens_towards_zero():
    logits = torch.tensor([[2.0, -2.0, 1.0]])
    seen = torch.tensor([[True, True, False]])
    out = sampled_logprobs(logits, Sampling(repetition_penalty=2.0), seen)
    torch.testing.assert_close(out, torch.tensor([[1.0, -4.0, 1.0]]).log_softmax(-1))
    with pytest.raises(ValueError, match="repetition penalty"):
        sampled_logprobs(logits, Sampling(repetition_penalty=2.0))
