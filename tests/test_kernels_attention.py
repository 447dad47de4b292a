"""Attention by blocks against the formula on whole matrices, in float64; what it keeps; bfloat16's rounding."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from lightning_grpo.kernels.attention import attention
from lightning_grpo.policy import packing
from lightning_grpo.policy.packing import Layout

D = 8
LAYOUTS = {
    "a prompt": ([7], [[]]),
    "groups": ([5, 3], [[4, 6, 1], [2, 9]]),
    "empty completions": ([2, 1, 3], [[0, 0], [0, 3, 0], []]),
    "a long completion": ([1], [[30, 2]]),
}


def sees(layout: Layout, window: int | None) -> torch.Tensor:
    """[L, L] bool, from the sequences: a prompt, and each completion after it."""
    L = len(layout.positions())
    mask = torch.zeros(L, L, dtype=torch.bool)
    start = 0
    for prompt, completions in zip(layout.prompts, layout.completions, strict=True):
        first = start + prompt
        for length in [0, *completions]:
            row = torch.tensor([*range(start, start + prompt), *range(first, first + length)], dtype=torch.long)
            first += length
            causal = torch.ones(len(row), len(row), dtype=torch.bool).tril()
            mask[row[:, None], row] = causal if window is None else causal.triu(1 - window)
        start = first
    return mask


def inputs(heads: int, key_heads: int, length: int, dtype=torch.float64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(1, length, h, D, generator=g).to(dtype).transpose(1, 2).requires_grad_()
        for h in (heads, key_heads, key_heads)
    ]


def plain(query, key, value, mask, scale):
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return (scale * query @ key.mT).masked_fill(~mask, -torch.inf).softmax(-1) @ value


def results(function, tensors, allowed):
    out = function(*tensors, allowed, 0.3)
    weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)
    return out, *torch.autograd.grad(out, tensors, weights)


@pytest.mark.parametrize(("merged", "queries"), [(1, 1), (4, 5), (8, 256), (64, 256)])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("name", LAYOUTS)
def test_outputs_and_gradients_are_those_of_the_formula(name, window, heads, merged, queries, monkeypatch):
    monkeypatch.setattr(packing, "MERGED", merged)
    monkeypatch.setattr(packing, "QUERIES", queries)
    layout = Layout(*LAYOUTS[name])
    mask = sees(layout, window)
    tensors = inputs(*heads, len(mask))
    found = results(attention, tensors, layout.blocks(heads[0], window))
    for ours, expected in zip(found, results(plain, tensors, mask), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)


def test_gradients_are_the_slopes():
    layout = Layout(*LAYOUTS["groups"])
    tensors = inputs(4, 2, 30)
    assert torch.autograd.gradcheck(lambda *x: attention(*x, layout.blocks(4), 0.3), tensors, fast_mode=True)


def test_only_the_inputs_are_kept():
    layout, tensors, kept = Layout(*LAYOUTS["groups"]), inputs(4, 2, 30), {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        attention(*tensors, layout.blocks(4), 0.3)
    assert kept == {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}


def test_blocks_of_long_sequences_hold_few_masked_pairs():
    """Pairs in blocks against the pairs that attend, which is the work of attention against the least possible."""
    layout = Layout([256, 512], [[512, 300], [64, 128, 512]])
    blocks = layout.blocks(9)
    computed = sum(
        (b.queries.stop - b.queries.start)
        * (len(range(b.shared.start, b.shared.stop)) + len(range(b.own.start, b.own.stop)))
        for b in blocks
    )
    assert computed < 1.3 * int(sees(layout, None).sum())


def test_bfloat16_is_as_near_the_truth_as_products_in_bfloat16_are():
    """Error of SDPA's C++ kernel, which rounds the probabilities but not the products: the measure of what is usual."""
    layout = Layout(*LAYOUTS["groups"])
    low, mask = inputs(4, 4, 30, torch.bfloat16), sees(layout, None)
    exact = [x.detach().double().requires_grad_() for x in low]
    sdpa = lambda q, k, v, mask, scale: scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    truth = results(plain, exact, mask)
    off = lambda found: [((x.double() - y).norm() / y.norm()).item() for x, y in zip(found, truth, strict=True)]
    for ours, theirs in zip(off(results(attention, low, layout.blocks(4))), off(results(sdpa, low, mask)), strict=True):
        assert ours < 0.01 and ours < 4 * theirs


def test_a_second_run_gives_the_same_bits():
    layout, tensors = Layout(*LAYOUTS["groups"]), inputs(6, 2, 30, torch.bfloat16)
    first, second = (results(attention, tensors, layout.blocks(6)) for _ in range(2))
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
