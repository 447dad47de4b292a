"""The Triton row kernels: run by Triton's interpreter against their torch twins, and compiled ahead of time."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_grpo.kernels import (
    blocks,
    chunkwise,
    linear,
    linear_logprob,
    logits_logprob,
    rows,
    torch_rows,
    triton_rows,
)
from lightning_grpo.kernels.blocks import Budget
from lightning_grpo.kernels.softmax import Softmax, Statistics, Transform

ROOT = Path(__file__).parent.parent


# Triton decides when it is imported whether it interprets: these tests run in a process of their own.
interpreted = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_in_the_interpreter")


def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-k", "row_kernels", __file__]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"})
    assert done.returncode == 0 and "25 passed" in done.stdout, done.stdout + done.stderr


def results(module, dtype, softcap, entropy_grad):
    """All that the row functions give for two blocks, with padding, of 1,100 ids, one logit −∞ and one large.

    The weights are made relative to the largest reference, which a module is free to choose.
    """
    g = torch.Generator().manual_seed(0)
    a = (torch.randn(5, 1100, generator=g) * 3).to(dtype)
    a[1, 5], a[2, 9] = -torch.inf, 80.0
    targets = torch.tensor([0, 7, 300, 1000, 1099])
    a[3, 1050] = 60.0
    transform = Transform.build(targets, 1100, torch.rand(5, generator=g) + 0.5, softcap, 1.2)
    stats = Statistics.empty(5, a.device, squares=True)
    found, written, joins = [], [], []
    blocks = [
        (slice(0, 1029), torch.nn.functional.pad(a[:, :1029], (0, 59), value=7.0)),
        (slice(1029, 1100), a[:, 1029:]),
    ]
    for ids, block in blocks:
        weights = torch.empty_like(block)
        joins.append(torch.ones(2, 5))
        module.accumulate(block, ids, targets, transform, stats, weights, joins[-1])
        written.append(weights[:, : ids.stop - ids.start])
    softmax = stats.finish()
    whole = torch.cat(written, 1)
    module.join(whole, 1029, chunkwise._scales(torch.stack(joins)), targets, -stats.s)
    found.append(whole * (stats.m - softmax.lse).exp()[:, None])
    c = torch.randn(2, 5, generator=g)
    for ids, block in blocks:
        out = torch.empty_like(block)
        module.gradient(block, out, ids, targets, transform, softmax, c[0], c[1] if entropy_grad else None)
        found.append(out[:, : ids.stop - ids.start])
    return [*softmax, stats.grad_norm(softmax), *found]


@interpreted
@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_kernels_equal_their_torch_twins(dtype, entropy_grad, softcap):
    ours, twins = (results(module, dtype, softcap, entropy_grad) for module in (triton_rows, torch_rows))
    for i, (x, y) in enumerate(zip(ours, twins, strict=True)):
        assert x.isfinite().all()
        # What is written to a block is rounded to its dtype; the interpreter cuts a bfloat16 short instead.
        rounded = i >= 5 and dtype == torch.bfloat16
        torch.testing.assert_close(x, y, rtol=2e-2 if rounded else 1e-5, atol=5e-6)


@interpreted
@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("path", ["frozen head", "kept", "computed again", "known ahead"])
def test_linear_logprob_on_the_row_kernels(monkeypatch, path):
    """The whole path of a GPU on the Triton kernels equals itself on their twins, with logits that grow by block."""
    kept = 1 << 30 if path == "kept" else 0
    monkeypatch.setattr(blocks, "budget", lambda **_: Budget(1, kept, 1))
    monkeypatch.setattr(linear, "_head_for", lambda hidden: chunkwise)
    monkeypatch.setattr(chunkwise, "chunks", lambda hidden, weight: blocks.cut(len(hidden), 4))
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(6, 16, generator=g), torch.randn(1100, 16, generator=g)
    weight[600] *= 20
    weight[1050] *= 60
    targets, c = torch.tensor([0, 7, 300, 600, 1000, 1099]), torch.randn(6, generator=g)
    c[3] = 0

    def solve():
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(path != "frozen head")]
        known = c if path == "known ahead" else None
        logprobs, entropy = linear_logprob(*leaves, targets, temperature=0.7, softcap=45.0, coefficient=known)
        (c * logprobs).sum().backward()
        scores = linear_logprob(*leaves, targets, temperature=0.7, softcap=45.0, grad_norm=True)
        assert torch.equal(scores[0], logprobs) and torch.equal(scores[1], entropy)
        return [*scores, *(x.grad for x in leaves if x.requires_grad)]

    expected = solve()
    monkeypatch.setattr(rows, "rows_for", lambda *_: triton_rows)
    for x, y in zip(solve(), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-4)


def apart(x):
    """The same numbers, with a gap after each."""
    return x.repeat_interleave(2, -1)[..., ::2]


@interpreted
@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("lay", [apart, lambda x: x.T.contiguous().T])
@pytest.mark.parametrize("wide", [False, True])
def test_row_kernels_read_and_write_any_strides(wide, lay, entropy_grad):
    """Blocks whose columns lie apart, and values of rows that do; of float64 and int32 where that may be."""
    g = torch.Generator().manual_seed(0)
    a, targets, c = torch.randn(5, 300, generator=g) * 3, torch.tensor([0, 7, 100, 298, 299]), torch.randn(2, 5)
    transform = Transform.build(targets, 300, torch.rand(5, generator=g) + 0.5, 20.0)

    def solve(module, lay, kind, number):
        values = lambda *xs: tuple(apart(x).to(number) if lay else x for x in xs)
        block = lay(a) if lay else a
        ids = apart(targets).to(kind) if lay else targets
        some = Transform(*values(*transform))
        stats = Statistics.empty(5, a.device)
        weights = torch.empty_like(block)
        joins = torch.ones(2, 5)
        module.accumulate(block, slice(0, 300), ids, some, stats, weights, joins)
        softmax = stats.finish()
        out = torch.empty_like(block)
        c_logprob, c_entropy = values(*c)
        row = Softmax(*values(*softmax))
        module.gradient(block, out, slice(0, 300), ids, some, row, c_logprob, c_entropy if entropy_grad else None)
        return [*softmax, weights * (joins[1] * (stats.m - softmax.lse).exp())[:, None], out]

    kinds = (torch.int32, torch.float64) if wide else (torch.int64, torch.float32)
    for x, y in zip(solve(triton_rows, lay, *kinds), solve(torch_rows, None, None, None), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=5e-6)


@interpreted
def test_row_kernels_write_no_further_than_their_output():
    """A block with padding, written to an output without."""
    a, targets = torch.randn(3, 128), torch.tensor([0, 7, 99])
    transform, stats = Transform.build(targets, 100, 1.0), Statistics.empty(3, a.device)
    memory = torch.full((3, 101), 7.0)
    triton_rows.accumulate(a, slice(0, 100), targets, transform, stats, memory[:, :100], torch.ones(2, 3))
    triton_rows.gradient(a, memory[:, :100], slice(0, 100), targets, transform, stats.finish(), torch.ones(3), None)
    assert (memory[:, 100] == 7).all()


@interpreted
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_row_kernels_do_not_follow_the_default_type(low):
    a, targets = torch.randn(3, 100), torch.tensor([0, 7, 99])
    transform = Transform.build(targets, 100, 1.0)

    def solve():
        stats, weights = Statistics.empty(3, a.device), torch.empty_like(a)
        joins = torch.ones(2, 3, dtype=torch.float32)
        triton_rows.accumulate(a, slice(0, 100), targets, transform, stats, weights, joins)
        return [weights, joins, *stats.finish()]

    expected = solve()
    torch.set_default_dtype(low)
    try:
        found = solve()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@interpreted
@pytest.mark.filterwarnings("ignore:overflow encountered")
@pytest.mark.parametrize("layout", ["strided targets", "transposed logits"])
def test_logits_logprob_on_the_row_kernels(monkeypatch, layout):
    g = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(6, 300, generator=g) * 3, torch.randint(0, 300, (6, 2), generator=g)[:, 0]
    if layout == "transposed logits":
        logits, targets = logits.T.contiguous().T, targets.contiguous()

    def solve():
        leaf = logits.clone().requires_grad_()
        assert leaf.stride() == logits.stride()
        logprobs, entropy = logits_logprob(leaf, targets)
        (logprobs * torch.arange(6)).sum().backward()
        return [logprobs, entropy, leaf.grad]

    expected = solve()
    monkeypatch.setattr(rows, "rows_for", lambda *_: triton_rows)
    for x, y in zip(solve(), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("path", "tokens", "synchronizations"),
    [
        ("known ahead", 4096, 0),
        ("known ahead", 16_384, 1),
        ("any loss", 4096, 0),
        ("frozen head", 4096, 0),
        ("scoring", 4096, 0),
    ],
)
def test_launches_take_less_time_than_products(monkeypatch, path, tokens, synchronizations):
    """Of the GPU's code path, without a GPU. The host waits only to compare a coefficient that could not be ignored."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    counts = importlib.import_module("kernel_launches")
    found = counts.count(path, 1536, 151_936, tokens, counts.IN_USE, masters=True)
    assert found.synchronizations == synchronizations
    assert found.launches * counts.LAUNCH_S < counts.product_seconds(path, 1536, 151_936, tokens) / 4


@pytest.mark.slow
def test_compiled_kernels_neither_spill_nor_split_rows(tmp_path):
    """For every architecture, without a GPU: no spill, and 128-bit access to rows as the package lays them out."""
    out = tmp_path / "audit.json"
    script = ROOT / "benchmarks" / "kernel_audit.py"
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, script, "--quick", "--json", out],
        capture_output=True,
        text=True,
        env=env | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    audited = json.loads(out.read_text())["kernels"]
    assert {row["arch"] for row in audited} == {"sm_80", "sm_90", "sm_100", "gfx942"}
    for row in audited:
        assert row["spills"] == row["split"] == 0 and row["loads_128"] > 0, row


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("path", ["frozen head", "kept", "computed again", "known ahead"])
def test_gpu_equals_cpu(monkeypatch, dtype, path):
    """In blocks of 512 ids and chunks of 64 rows."""
    monkeypatch.setattr(blocks, "budget", lambda **_: Budget(1, 1 << 30 if path == "kept" else 0, 1))
    trainable = path != "frozen head"
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(200, 64, generator=g).to(dtype), torch.randn(50_257, 64, generator=g).to(dtype) / 4
    targets, c = torch.randint(0, 50_257, (200,), generator=g), torch.randn(200, generator=g)

    def solve(device):
        leaves = [x.to(device, copy=True).requires_grad_(i == 0 or trainable) for i, x in enumerate((hidden, weight))]
        known = c.to(device) if path == "known ahead" else None
        logprobs, entropy = linear_logprob(*leaves, targets.to(device), coefficient=known)
        (c.to(device) * logprobs).sum().backward()
        return [x.float().cpu() for x in (logprobs, entropy, *(x.grad for x in leaves if x.requires_grad))]

    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    for x, y in zip(solve("cuda"), solve("cpu"), strict=True):
        assert (x - y).norm() <= tolerance * y.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device")
def test_nothing_waits_for_the_gpu():
    hidden = torch.randn(200, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
    weight = torch.randn(5000, 64, device="cuda").requires_grad_()
    targets, c = torch.randint(5000, (200,), device="cuda"), torch.randn(200, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.autocast("cuda", torch.bfloat16):
            logprobs, _ = linear_logprob(hidden, weight, targets, coefficient=c)
        (c * logprobs).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert weight.grad.isfinite().all()
