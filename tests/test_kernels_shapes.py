"""Any shape, type, layout and budget: linear_logprob against the softmax of whole logits in float64."""

import math
from dataclasses import dataclass
from unittest.mock import patch

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reference import naive_logprob
from torch import Tensor

from lightning_grpo.kernels import blocks, blockwise, chunkwise, cpp_rows, linear, linear_logprob, logits_logprob
from lightning_grpo.kernels.blocks import Budget

# Relative rounding of one number in each type.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
BACKENDS = ["torch", "cpp"] if cpp_rows._library() else ["torch"]


@dataclass(frozen=True)
class Case:
    """One call, with the bytes that it may use."""

    n: int
    h: int = 8
    v: int = 700
    dtype: torch.dtype = torch.float32
    backend: str = "torch"
    gpu: bool = False
    """Take the GPU's path, with the rows of `torch_rows`."""
    block: int = 1
    kept: int = 0
    chunk: int = 1
    temperature: float | None = 1.0
    """None: one for each row."""
    softcap: float | None = None
    bias: bool = False
    needs: tuple[bool, bool, bool] = (True, True, True)
    """Gradients of hidden, weight, bias."""
    entropy_grad: bool = False
    known: str | None = None
    """The coefficient known ahead: None, "right", "multiple" or "wrong"."""
    idle: int = 0
    """Every so many rows the loss leaves one out; 0: none, 1: all."""
    layout: str = "contiguous"
    seed: int = 0


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers, in other memory."""
    if layout == "transposed":
        return x.T.contiguous().T if x.dim() == 2 else x
    if layout == "every second":
        return x.repeat_interleave(2, -1)[..., ::2]
    return x


def inputs(case: Case) -> dict[str, Tensor]:
    """In float64, of values that the case's type can hold; targets at both edges of blocks among them."""
    g = torch.Generator().manual_seed(case.seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(case.dtype).double()
    targets = torch.randint(0, case.v, (case.n,), generator=g)
    edges = torch.tensor([0, case.v - 1, 511, 512, 575, 576])
    edges = edges[edges < case.v][: case.n]
    targets[: len(edges)] = edges
    c = torch.randn(2, case.n, generator=g, dtype=torch.float64)
    if case.idle:
        c[:, :: case.idle] = 0
    # A power of two, so that the type can still hold the numbers.
    spread = 2.0 ** math.floor(math.log2(1.5 / case.h**0.5))
    return {
        "hidden": rand(case.n, case.h),
        "weight": rand(case.v, case.h) * spread,
        "bias": rand(case.v),
        "targets": targets,
        "temperature": torch.rand(case.n, generator=g) + 0.5,
        "c": c,
    }


def solve(case: Case, function, dtype: torch.dtype) -> list[Tensor | None]:
    """[log-probs, entropies, and gradients of hidden, weight and bias] of Σ c₀·logprob (+ Σ c₁·entropy)."""
    given = inputs(case)
    exact = dtype == torch.float64
    values = given["hidden"], given["weight"], given["bias"]
    leaves = [laid_out(x.to(dtype), "contiguous" if exact else case.layout) for x in values]
    leaves = [x.detach().requires_grad_(need) for x, need in zip(leaves, case.needs, strict=True)]
    c = given["c"].to(torch.float64 if exact else torch.float32)
    options = {
        "temperature": given["temperature"] if case.temperature is None else case.temperature,
        "softcap": case.softcap,
        "bias": leaves[2] if case.bias else None,
        "entropy_grad": case.entropy_grad,
        "scale": 0.75,
    }
    if not exact and case.known:
        options["coefficient"] = {"right": c[0], "multiple": c[0] / 3, "wrong": c[0].flip(0) + 1}[case.known]
    targets = laid_out(given["targets"], "contiguous" if exact else case.layout)
    found = function(leaves[0], leaves[1], targets, **options)
    loss = (c[0] * found[0]).sum() + ((c[1] * found[1]).sum() if case.entropy_grad else 0)
    if loss.requires_grad:
        loss.backward()
    used = [True, True, case.bias]
    # A sum over no rows has no gradient with either implementation.
    zeros = lambda x: torch.zeros_like(x) if x.grad is None else x.grad
    gradients = [zeros(x) if need and use else None for x, need, use in zip(leaves, case.needs, used, strict=True)]
    return [x if x is None else x.detach().double() for x in (*found, *gradients)]


def check(case: Case) -> None:
    """Values are off by the rounding of logits and of their sums, gradients by as much of what they are summed from."""
    sizes = Budget(case.block, case.kept, case.chunk)
    takes = cpp_rows.takes if case.backend == "cpp" and not case.gpu else lambda *_: False
    head = chunkwise if case.gpu else blockwise
    with (
        patch.object(blocks, "budget", lambda **_: sizes),
        patch.object(cpp_rows, "takes", takes),
        patch.object(linear, "_head_for", lambda hidden: head),
    ):
        found = solve(case, linear_logprob, case.dtype)
    expected = solve(case, naive_logprob, torch.float64)
    if not case.n:
        assert all(y is None or (x.shape == y.shape and not x.any()) for x, y in zip(found, expected, strict=True))
        return
    given = inputs(case)
    least = float(given["temperature"].min()) if case.temperature is None else case.temperature
    hidden, weight = (given[name].norm(dim=1) for name in ("hidden", "weight"))
    slope = 0.75 / least
    logits = slope * float(hidden.amax() * weight.amax() + case.bias * given["bias"].abs().amax())
    # Of the logits, and of sums over the vocabulary.
    values = 2 * ROUNDING[case.dtype] * logits + 1e-6 * max(1.0, float(expected[0].abs().amax()))
    for x, y in zip(found[:2], expected[:2], strict=True):
        assert (x - y).abs().amax() <= values
    c = given["c"][0].abs() + (given["c"][1].abs() * logits if case.entropy_grad else 0)
    for x, y, terms in zip(found[2:], expected[2:], (c * weight.amax(), c * hidden, c), strict=True):
        if y is not None:
            allowed = (values + 4 * ROUNDING[case.dtype]) * slope * terms.norm()
            assert (x - y).norm() <= allowed + 1e-30


any_case = st.builds(
    Case,
    n=st.integers(0, 40),
    h=st.integers(1, 24),
    v=st.integers(2, 1700),
    dtype=st.sampled_from(list(ROUNDING)),
    backend=st.sampled_from(BACKENDS),
    gpu=st.booleans(),
    block=st.integers(1, 200_000),
    kept=st.integers(0, 300_000),
    chunk=st.integers(1, 300_000),
    temperature=st.none() | st.floats(0.3, 3),
    softcap=st.none() | st.floats(2, 50),
    bias=st.booleans(),
    needs=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    entropy_grad=st.booleans(),
    known=st.sampled_from([None, None, "right", "multiple", "wrong"]),
    idle=st.sampled_from([0, 0, 1, 2, 3]),
    layout=st.sampled_from(["contiguous", "transposed", "every second"]),
    seed=st.integers(0, 1000),
)


@settings(max_examples=150, deadline=None)
@given(any_case)
def test_any_shape(case):
    check(case)


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 40),
    v=st.integers(513, 1700),
    kept=st.integers(0, 300_000),
    dtype=st.sampled_from(list(ROUNDING)),
    backend=st.sampled_from(BACKENDS),
    gpu=st.booleans(),
    idle=st.sampled_from([0, 3]),
)
@example(n=20, v=1124, kept=20 * 4 * (512 + 100), dtype=torch.float32, backend="torch", gpu=False, idle=0)
def test_any_budget_of_a_trainable_head(n, v, kept, dtype, backend, gpu, idle):
    """Whatever part of the probabilities the forward keeps: a narrow last block may fit where a whole one doesn't."""
    check(Case(n=n, v=v, kept=kept, dtype=dtype, backend=backend, gpu=gpu, idle=idle))


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(0, 20),
    v=st.integers(1, 600),
    dtype=st.sampled_from(list(ROUNDING)),
    backend=st.sampled_from(BACKENDS),
    layout=st.sampled_from(["contiguous", "transposed", "every second"]),
    kind=st.sampled_from([torch.int64, torch.int32]),
    temperature=st.floats(0.3, 3),
    entropy_grad=st.booleans(),
    idle=st.sampled_from([0, 1, 3]),
    seed=st.integers(0, 1000),
)
def test_any_logits(n, v, dtype, backend, layout, kind, temperature, entropy_grad, idle, seed):
    """Of a model's own, wherever they lie, and twice through a retained graph."""
    case = Case(n=n, v=max(v, 2), dtype=dtype, idle=idle, seed=seed)
    c = inputs(case)["c"].float()
    logits = (torch.randn(n, v, generator=torch.Generator().manual_seed(seed)) * 3).to(dtype)
    targets = laid_out(inputs(case)["targets"].clamp(max=v - 1), layout).to(kind)

    def solve(leaf, function):
        found = function(leaf, targets)
        loss = (c[0] * found[0]).sum() + ((c[1] * found[1]).sum() if entropy_grad else 0)
        twice = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2)]
        assert torch.equal(*twice)
        return [x.detach().double() for x in (*found, twice[0])]

    options = {"temperature": temperature, "entropy_grad": entropy_grad}
    takes = cpp_rows.takes if backend == "cpp" else lambda *_: False
    with patch.object(cpp_rows, "takes", takes):
        leaf = laid_out(logits, layout).detach().requires_grad_()
        found = solve(leaf, lambda leaf, ids: logits_logprob(leaf, ids, **options))
    eye = torch.eye(v, dtype=torch.float64)
    exact = logits.double().requires_grad_()
    expected = solve(exact, lambda leaf, ids: naive_logprob(leaf, eye, ids.long(), **options))
    for x, y in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-5 / min(temperature, 1))
    size = c.norm() / temperature * (40 / temperature if entropy_grad else 1)
    assert (found[2] - expected[2]).norm() <= (1e-5 + 3 * ROUNDING[dtype]) * size
