"""Attention by blocks against the formula on whole matrices, in float64; what it keeps; bfloat16's rounding."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from lightning_grpo.kernels import attention as module
from lightning_grpo.kernels.attention import attention

N, T, P, D = 3, 7, 4, 8
LEFT, RIGHT = torch.tensor([0, 2, 7]), torch.tensor([7, 5, 1])


def masks() -> dict[str, torch.Tensor | None]:
    """[N, 1, T, L]; the left-padded ones have queries that see nothing, the last row's all."""
    causal = torch.ones(T, T, dtype=torch.bool).tril()
    positions = torch.arange(T)
    prefix = torch.arange(P) >= torch.tensor([0, 1, 4])[:, None, None]
    return {
        "causal": None,
        "left": (causal & (positions >= LEFT[:, None])[:, None])[:, None],
        "right": (causal & (positions < RIGHT[:, None])[:, None])[:, None],
        "cached": torch.cat([prefix.expand(N, T, P), causal.expand(N, T, T)], 2)[:, None],
        "window": (causal & ~causal.tril(-3)).expand(N, 1, T, T),
    }


def inputs(heads: int, key_heads: int, length: int, dtype=torch.float64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = (heads, T), (key_heads, length), (key_heads, length)
    return [torch.randn(N, t, h, D, generator=g).to(dtype).transpose(1, 2).requires_grad_() for h, t in shapes]


def plain(query, key, value, mask, scale):
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    mask = torch.ones(T, T, dtype=torch.bool).tril() if mask is None else mask
    weights = (scale * query @ key.mT).masked_fill(~mask, torch.finfo(torch.float32).min).softmax(-1)
    return (weights * mask) @ value


def results(function, tensors, mask):
    out = function(*tensors, mask, 0.3)
    weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)
    return out, *torch.autograd.grad(out, tensors, weights)


@pytest.mark.parametrize("block", [1, 60, 400, 1 << 20])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 2), (3, 1)])
@pytest.mark.parametrize("kind", masks())
def test_outputs_and_gradients_are_those_of_the_formula(kind, heads, block, monkeypatch):
    monkeypatch.setattr(module, "BLOCK", block)
    monkeypatch.setattr(module, "ROWS_BLOCK", block)
    mask = masks()[kind]
    tensors = inputs(*heads, T if mask is None else mask.shape[3])
    for found, expected in zip(results(attention, tensors, mask), results(plain, tensors, mask), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_gradients_are_the_slopes():
    tensors = inputs(4, 2, T)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, masks()["left"], 0.3), tensors, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_queries_that_see_nothing_give_zero_and_move_nothing(dtype):
    tensors, mask = inputs(4, 2, T, dtype), masks()["left"]
    out, d_query, d_key, d_value = results(attention, tensors, mask)
    blind = ~mask.any(-1)[:, 0]
    assert blind.sum() == 9
    assert not out.transpose(1, 2)[blind].any() and not d_query.transpose(1, 2)[blind].any()
    assert not d_key[2].any() and not d_value[2].any()
    assert all(x.isfinite().all() for x in (out, d_query, d_key, d_value))


@pytest.mark.parametrize("kind", ["causal", "left"])
def test_only_the_inputs_are_kept(kind):
    tensors, mask = inputs(4, 2, T), masks()[kind]
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attention(*tensors, mask, 0.3)
    held = [*tensors, *([] if mask is None else [mask])]
    assert kept == {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}


def test_bfloat16_is_as_near_the_truth_as_products_in_bfloat16_are():
    """Error of SDPA's C++ kernel, which rounds the probabilities but not the products: the measure of what is usual."""
    low = inputs(4, 4, T, torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in low]
    mask = masks()["right"]
    sdpa = lambda q, k, v, mask, scale: scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    truth = results(plain, exact, mask)
    off = lambda found: [((x.double() - y).norm() / y.norm()).item() for x, y in zip(found, truth, strict=True)]
    for ours, theirs in zip(off(results(attention, low, mask)), off(results(sdpa, low, mask)), strict=True):
        assert ours < 0.01 and ours < 4 * theirs


def test_a_second_run_gives_the_same_bits(monkeypatch):
    monkeypatch.setattr(module, "BLOCK", 60)
    tensors = inputs(6, 2, T, torch.bfloat16)
    first, second = (results(attention, tensors, masks()["left"]) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
