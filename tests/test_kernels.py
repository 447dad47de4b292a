"""linear_logprob and logits_logprob against the softmax of whole logits in float64."""

import pytest
import torch
from reference import naive_logprob

from lightning_grpo.kernels import blocks as blocks_module
from lightning_grpo.kernels import blockwise, chunkwise, linear, linear_logprob, logits_logprob, products
from lightning_grpo.kernels.blocks import Budget


@pytest.fixture(autouse=True, params=[blockwise, chunkwise], ids=["CPU's path", "GPU's path"])
def head(request, monkeypatch):
    """The module that computes the head; the GPU's runs on a CPU as well."""
    if request.param is blockwise and request.config.pluginmanager.has_plugin("on_device"):
        pytest.skip("a GPU takes its own path")
    monkeypatch.setattr(linear, "_head_for", lambda hidden: request.param)
    return request.param


def problem(n, h, v, *, seed=0, spread=1.5):
    """hidden, weight, bias, targets (both ends of the vocabulary among them), loss coefficients, all in float64."""
    g = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    targets = torch.randint(0, v, (n,), generator=g)
    targets[:1], targets[1:][-1:] = 0, v - 1
    # Values that bfloat16 can hold, so that every precision starts from the same numbers.
    hidden, weight, bias = (x.bfloat16().double() for x in (rand(n, h), rand(v, h) * spread / h**0.5, rand(v)))
    return hidden, weight, bias, targets, rand(2, n)


def solve(function, hidden, weight, bias, targets, c, *, dtype, trainable=True, entropy_grad=False, **options):
    """[logprobs, entropy, gradients of hidden (, weight, bias)] of the loss Σ c₀·logprob (+ Σ c₁·entropy)."""
    hidden = hidden.to(dtype, copy=True).requires_grad_()
    weight, bias = (None if x is None else x.to(dtype, copy=True).requires_grad_(trainable) for x in (weight, bias))
    found = function(hidden, weight, targets, bias=bias, entropy_grad=entropy_grad, **options)
    loss = (c[0] * found[0]).sum() + ((c[1] * found[1]).sum() if entropy_grad else 0)
    loss.backward()
    return [
        x.detach().double()
        for x in (*found, hidden.grad, *(y.grad for y in (weight, bias) if y is not None and trainable))
    ]


def assert_close(found, expected, *, values, gradients):
    for name, x, y in zip(["logprobs", "entropy"], found, expected, strict=False):
        torch.testing.assert_close(x, y, rtol=0, atol=values, msg=lambda m, name=name: f"{name}: {m}")
    for name, x, y in zip(["hidden", "weight", "bias"], found[2:], expected[2:], strict=False):
        assert (x - y).norm() <= gradients * y.norm().clamp(min=1e-30), (
            f"gradient of {name}: {(x - y).norm() / y.norm()}"
        )


@pytest.fixture(params=["one block", "many blocks", "many blocks, some kept"])
def blocks(request, monkeypatch):
    """How the vocabulary is cut, and how much of it the forward keeps."""
    block, keep = {
        "one block": (64 << 20, 0),
        "many blocks": (1, 0),
        "many blocks, some kept": (1, 512 * 20 * 4 * 2),
    }[request.param]
    monkeypatch.setattr(blocks_module, "budget", lambda **_: Budget(block, keep, 1 << 30))


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("vocabulary", [77, 257, 1537])
def test_fp32_outputs_and_gradients(blocks, vocabulary, trainable, entropy_grad, softcap):
    args = problem(20, 64, vocabulary)
    options = {
        "temperature": 0.7,
        "softcap": softcap,
        "scale": 1.3,
        "trainable": trainable,
        "entropy_grad": entropy_grad,
    }
    found = solve(linear_logprob, *args, dtype=torch.float32, **options)
    expected = solve(naive_logprob, *args, dtype=torch.float64, **options)
    assert_close(found, expected, values=5e-6, gradients=2e-6)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_squared_norm_of_the_gradient(blocks, softcap):
    """With the same log-probs and entropies, to the bit, as without it."""
    hidden, weight, bias, targets, _ = problem(20, 64, 1537)
    options = {"temperature": 0.7, "softcap": softcap, "scale": 1.3}
    expected = naive_logprob(hidden, weight, targets, bias=bias, **options, grad_norm=True)
    args, bias = (hidden.float(), weight.float().requires_grad_(), targets), bias.float()
    found = linear_logprob(*args, bias=bias, **options, grad_norm=True)
    assert not any(x.requires_grad for x in found)
    torch.testing.assert_close(found[2].double(), expected[2], rtol=1e-5, atol=0)
    for x, y in zip(found, linear_logprob(*args, bias=bias, **options), strict=False):
        assert torch.equal(x, y)


def test_squared_norm_of_sure_tokens_and_of_logits():
    """Where p(target) is 0.9999, 1 − 2p + Σ p² would be rounding; and it is the same from given logits."""
    hidden, weight, _, targets, _ = problem(30, 64, 1537, spread=0.5)
    hidden = hidden + 17 * weight[targets] / weight[targets].square().sum(1, keepdim=True)
    hidden = hidden.bfloat16().double()
    expected = naive_logprob(hidden, weight, targets, grad_norm=True)[2]
    assert expected.max() < 1e-4
    found = linear_logprob(hidden.float(), weight.float(), targets, grad_norm=True)[2]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)
    found = logits_logprob((hidden @ weight.T).float(), targets, grad_norm=True)[2]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("trainable", [False, True])
def test_large_odd_vocabulary(trainable):
    args = problem(33, 32, 50_257)
    options = {"trainable": trainable, "temperature": 1.0}
    found = solve(linear_logprob, *args, dtype=torch.float32, **options)
    expected = solve(naive_logprob, *args, dtype=torch.float64, **options)
    # Sums of 50,257 terms: as near as fp32 is to numbers of their size, whatever order a processor adds in.
    largest = max(float(x.abs().max()) for x in expected[:2])
    assert_close(found, expected, values=1e-6 * largest, gradients=2e-6)


@pytest.mark.parametrize(("dtype", "values", "gradients"), [(torch.bfloat16, 0.06, 0.02), (torch.float16, 0.01, 3e-3)])
@pytest.mark.parametrize("trainable", [False, True])
def test_half_precision(blocks, dtype, values, gradients, trainable):
    args = problem(20, 64, 1537)
    found = solve(linear_logprob, *args, dtype=dtype, trainable=trainable)
    assert_close(
        found, solve(naive_logprob, *args, dtype=torch.float64, trainable=trainable), values=values, gradients=gradients
    )


def test_half_precision_no_worse_than_naive(head):
    """Rounded logits are the whole error in bfloat16: the naive path, which has them too, is no nearer.

    On a CPU the GPU's path rounds its gradients twice, since `torch_rows` rescales all blocks.
    """
    args = problem(64, 64, 3000)
    exact = solve(naive_logprob, *args, dtype=torch.float64)
    ours, naive = (solve(f, *args, dtype=torch.bfloat16) for f in (linear_logprob, naive_logprob))
    for x, y, z in zip(ours, naive, exact, strict=True):
        assert (x - z).norm() <= (1.2 if head is blockwise else 1.5) * (y - z).norm()


@pytest.mark.parametrize("trainable", [False, True])
def test_sure_tokens_keep_their_gradient(trainable):
    """Where p(target) is 0.9999, the gradient is the small rest, not the rounding of p − 1."""
    hidden, weight, _, targets, c = problem(30, 64, 1537, spread=0.5)
    hidden = hidden + 17 * weight[targets] / weight[targets].square().sum(1, keepdim=True)
    hidden = hidden.bfloat16().double()
    expected = solve(naive_logprob, hidden, weight, None, targets, c, dtype=torch.float64, trainable=trainable)
    assert expected[0].max() > -1e-2
    found = solve(linear_logprob, hidden, weight, None, targets, c, dtype=torch.float32, trainable=trainable)
    assert_close(found, expected, values=5e-6, gradients=5e-6)
    low = solve(linear_logprob, hidden, weight, None, targets, c, dtype=torch.bfloat16, trainable=trainable)
    assert_close(low, expected, values=0.06, gradients=0.05)


def test_sure_tokens_keep_their_gradient_in_float16():
    """Where the rest is 2e-6, which GradScaler's factor lifts only after the forward."""
    hidden, weight, _, targets, c = problem(30, 64, 1537, spread=0.5)
    hidden = (hidden + 26 * weight[targets] / weight[targets].square().sum(1, keepdim=True)).half().double()
    frozen = {"trainable": False}
    expected = solve(naive_logprob, hidden, weight, None, targets, c, dtype=torch.float64, **frozen)
    found = solve(linear_logprob, hidden, weight, None, targets, 2.0**16 * c, dtype=torch.float16, **frozen)
    assert (found[2] / 2**16 - expected[2]).norm() <= 0.02 * expected[2].norm()


def test_temperature_of_each_row():
    args = problem(20, 64, 300)
    temperature = torch.linspace(0.3, 2, 20)
    found = solve(linear_logprob, *args, dtype=torch.float32, temperature=temperature)
    assert_close(
        found, solve(naive_logprob, *args, dtype=torch.float64, temperature=temperature), values=5e-6, gradients=2e-6
    )


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("entropy_grad", [False, True])
def test_impossible_tokens(blocks, trainable, entropy_grad):
    """A bias of −∞ makes a token impossible: its probability is 0 and nothing becomes NaN."""
    hidden, weight, bias, targets, c = problem(20, 64, 1537)
    bias[5:1030] = -torch.inf
    targets[1:-1] %= 5
    targets[4] = 1100
    options = {"trainable": trainable, "entropy_grad": entropy_grad}
    found = solve(linear_logprob, hidden, weight, bias, targets, c, dtype=torch.float32, **options)
    assert all(x.isfinite().all() for x in found)
    possible = torch.cat([torch.arange(5), torch.arange(1030, 1537)])
    renamed = torch.where(targets < 5, targets, targets - 1025)
    expected = solve(
        naive_logprob, hidden, weight[possible], bias[possible], renamed, c, dtype=torch.float64, **options
    )
    found[3:] = [x[possible] for x in found[3:]]
    assert_close(found, expected, values=5e-6, gradients=3e-6)


def test_extreme_logits():
    args = problem(20, 64, 300, spread=3000.0)
    found = solve(linear_logprob, *args, dtype=torch.float32, entropy_grad=True)
    expected = solve(naive_logprob, *args, dtype=torch.float64, entropy_grad=True)
    assert expected[0].min() < -5000
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-2)
    assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("trainable", [False, True])
def test_few_rows(n, trainable):
    args = problem(n, 64, 257)
    found = solve(linear_logprob, *args, dtype=torch.float32, trainable=trainable)
    assert_close(
        found, solve(naive_logprob, *args, dtype=torch.float64, trainable=trainable), values=5e-6, gradients=2e-6
    )


@pytest.mark.parametrize("trainable", [False, True])
def test_rows_without_weight_in_the_loss_may_hold_nan(blocks, trainable):
    hidden, weight, bias, targets, c = problem(20, 64, 1537)
    c[:, ::3] = 0
    clean = solve(linear_logprob, hidden, weight, bias, targets, c, dtype=torch.float32, trainable=trainable)
    hidden[::3] = torch.nan

    def masked(*args, **kwargs):
        return [torch.where(c[0] != 0, x, 0) for x in linear_logprob(*args, **kwargs)]

    found = solve(masked, hidden, weight, bias, targets, c, dtype=torch.float32, trainable=trainable)
    assert (found[2][::3] == 0).all()
    for x, y in zip(found[2:], clean[2:], strict=True):
        torch.testing.assert_close(x, y)


def test_nan_shows():
    """A NaN in the hidden states of a row that counts reaches the outputs: it is never taken for a small logit."""
    hidden, weight, _, targets, _ = problem(4, 8, 30)
    hidden[1, 2] = torch.nan
    logprob, entropy = linear_logprob(hidden.float(), weight.float(), targets)
    assert logprob.isnan().tolist() == entropy.isnan().tolist() == [False, True, False, False]


@pytest.mark.parametrize("trainable", [False, True])
def test_retained_graph_and_double_use(blocks, trainable):
    hidden, weight, _, targets, c = problem(20, 64, 1537)
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_(trainable)
    leaves = [hidden, weight] if trainable else [hidden]
    logprob, _ = linear_logprob(hidden, weight, targets)
    first = torch.autograd.grad((c[0] * logprob).sum(), leaves, retain_graph=True)
    again = torch.autograd.grad((c[0] * logprob).sum(), leaves, retain_graph=True)
    both = torch.autograd.grad((c[0] * logprob).sum() + (3 * c[0] * logprob).sum(), leaves)
    for x, y, z in zip(first, again, both, strict=True):
        assert torch.equal(x, y)
        torch.testing.assert_close(z, 4 * x)


@pytest.mark.parametrize("factor", [1.0, 0.25])
@pytest.mark.parametrize("bias", [False, True])
def test_coefficient_known_ahead(head, monkeypatch, bias, factor):
    """The gradients of the forward, for even chunks of at most 64 tokens, are used, and are right."""
    monkeypatch.setattr(blocks_module, "budget", lambda **_: Budget(8 << 20, 0, chunk=1))
    hidden, weight, b, targets, c = problem(150, 64, 1537)
    c[:, 5:9] = 0
    b = b if bias else None
    expected = solve(naive_logprob, hidden, weight, b, targets, factor * c, dtype=torch.float64, temperature=0.7)
    ahead = lambda *args, **kwargs: linear_logprob(*args, coefficient=c[0].float(), **kwargs)
    calls = []
    chunks = head.chunks
    monkeypatch.setattr(head, "chunks", lambda *args: calls.extend(chunks(*args)) or chunks(*args))
    if head is chunkwise:
        monkeypatch.setattr(head, "gradients", lambda *args: pytest.fail("computed again in the backward"))
    found = solve(ahead, hidden, weight, b, targets, factor * c, dtype=torch.float32, temperature=0.7)
    assert calls[:3] == [slice(0, 50), slice(50, 100), slice(100, 150)]
    assert_close(found, expected, values=5e-6, gradients=2e-6)


@pytest.mark.parametrize("size", [1e-2, 1e-4, 1e-5, 1e-6, 1e-7])
@pytest.mark.parametrize("trainable", [False, True])
def test_small_coefficients_in_float16(trainable, size):
    """Under GradScaler's factor, which comes after the forward, those of a long batch are as near."""
    hidden, weight, bias, targets, c = problem(150, 64, 1537)
    expected = solve(naive_logprob, hidden, weight, bias, targets, size * c, dtype=torch.float64, trainable=trainable)

    def mixed(*args, **options):
        with torch.autocast("cpu", torch.float16):
            return linear_logprob(*args, coefficient=(size * c[0]).float(), **options)

    factor = 2.0**16
    found = solve(mixed, hidden, weight, bias, targets, factor * size * c, dtype=torch.float32, trainable=trainable)
    assert_close(found[:2], expected, values=0.01, gradients=0)
    assert_close([*expected[:2], *(x / factor for x in found[2:])], expected, values=0, gradients=1e-3)


def test_sums_over_many_tokens_fit_float16():
    """The gradient of a weight that every token adds to, with a coefficient far from 1, ends finite."""
    hidden = torch.full((4000, 4), 30.0, dtype=torch.float16).requires_grad_()
    weight = torch.zeros(600, 4, dtype=torch.float16).requires_grad_()
    c = torch.full((4000,), 5.0)
    logprob, _ = linear_logprob(hidden, weight, torch.zeros(4000, dtype=torch.long), coefficient=c)
    (1e-3 * c * logprob).sum().backward()
    torch.testing.assert_close(weight.grad[0].float(), torch.full((4,), 599 / 600 * 30 * 20), rtol=1e-3, atol=0)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_coefficient_that_is_not_finite(dtype, wrong):
    """It is left aside, and the loss's own gradient taken."""
    hidden, weight, _, targets, c = problem(20, 64, 1537)
    leaves = [x.to(dtype).requires_grad_() for x in (hidden, weight)]
    coefficient = c[0].float().index_fill(0, torch.tensor([3]), wrong)
    expected = torch.autograd.grad((c[0] * linear_logprob(*leaves, targets)[0]).sum(), leaves)
    found = torch.autograd.grad((c[0] * linear_logprob(*leaves, targets, coefficient=coefficient)[0]).sum(), leaves)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


def test_coefficient_that_the_loss_does_not_have():
    """The loss's own gradient wins; and a retained graph gives the same again."""
    hidden, weight, _, targets, c = problem(20, 64, 1537)
    leaves = [hidden.float().requires_grad_(), weight.float().requires_grad_()]
    for coefficient in (c[0], c[0] + 1, c[0] * torch.linspace(1, 1.01, 20), torch.zeros(20)):
        expected = torch.autograd.grad((c[0] * linear_logprob(*leaves, targets)[0]).sum(), leaves)
        loss = (c[0] * linear_logprob(*leaves, targets, coefficient=coefficient.float())[0]).sum()
        for _ in range(2):
            for x, y in zip(torch.autograd.grad(loss, leaves, retain_graph=True), expected, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_same_values_with_and_without_gradients(blocks):
    """Scoring and updating must agree to the bit, or the first ratio is not 1."""
    hidden, weight, _, targets, _ = problem(20, 64, 1537)
    hidden, weight = hidden.bfloat16().requires_grad_(), weight.bfloat16()
    with torch.no_grad():
        scored = linear_logprob(hidden, weight, targets)
    frozen = linear_logprob(hidden, weight, targets)
    trained = linear_logprob(hidden, weight.requires_grad_(), targets)
    for x, y, z in zip(scored, frozen, trained, strict=True):
        assert torch.equal(x, y) and torch.equal(x, z)


@pytest.mark.parametrize("trainable", [False, True])
def test_autocast_is_bfloat16_with_fp32_weights(trainable):
    args = problem(20, 64, 1537)

    def cast(*args, **kwargs):
        with torch.autocast("cpu", torch.bfloat16):
            return linear_logprob(*args, **kwargs)

    found = solve(cast, *args, dtype=torch.float32, trainable=trainable)
    low = solve(linear_logprob, *args, dtype=torch.bfloat16, trainable=trainable)
    for x, y in zip(found[:2], low[:2], strict=True):
        assert torch.equal(x, y)
    assert_close(found, low, values=0, gradients=4e-3)


@pytest.mark.filterwarnings("ignore:Input #")
def test_gradcheck():
    """In fp32, which is what the Function computes in: its derivative against central differences of its own values."""
    hidden, weight, bias, targets, _ = (x.float() for x in problem(4, 6, 23))
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]

    def function(hidden, weight, bias):
        return linear_logprob(
            hidden, weight, targets.long(), bias=bias, softcap=4.0, temperature=0.8, entropy_grad=True
        )

    assert torch.autograd.gradcheck(function, leaves, eps=1e-2, atol=5e-3, rtol=5e-3, nondet_tol=0)


@pytest.mark.parametrize("entropy_grad", [False, True])
def test_logits_logprob(entropy_grad):
    _, _, _, targets, c = problem(20, 8, 257)
    logits = 4 * torch.randn(20, 257, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    eye = torch.eye(257, dtype=torch.float64)
    on_logits = lambda logits, eye, targets, bias, **options: logits_logprob(logits, targets, **options)
    options = {"temperature": 0.7, "entropy_grad": entropy_grad, "trainable": False}
    found = solve(on_logits, logits, eye, None, targets, c, dtype=torch.float32, **options)
    expected = solve(naive_logprob, logits, eye, None, targets, c, dtype=torch.float64, **options)
    assert_close(found, expected, values=5e-6, gradients=2e-6)


def test_logits_are_left_as_they_were():
    logits = torch.randn(5, 30, requires_grad=True)
    before = logits.detach().clone()
    logits_logprob(logits, torch.arange(5))[0].sum().backward()
    assert torch.equal(logits, before)


@pytest.mark.parametrize("options", [{}, {"coefficient": torch.ones(20)}])
@pytest.mark.parametrize("trainable", [False, True])
def test_second_derivatives_are_refused(trainable, options):
    hidden, weight, _, targets, _ = problem(20, 64, 1537)
    hidden, weight = hidden.float().requires_grad_(), weight.float().requires_grad_(trainable)
    logprob, _ = linear_logprob(hidden, weight, targets, **options)
    (grad,) = torch.autograd.grad(logprob.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_errors_name_the_argument():
    hidden, weight, targets = torch.randn(3, 4), torch.randn(7, 4), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"targets range from 0 to 7, but the ids of the head are 0 to 6"):
        linear_logprob(hidden, weight, torch.tensor([0, 1, 7]))
    with pytest.raises(ValueError, match=r"temperature is 0.0; set it above 0"):
        linear_logprob(hidden, weight, targets, temperature=0.0)
    with pytest.raises(ValueError, match=r"hidden is torch.bfloat16 and weight is torch.float32"):
        linear_logprob(hidden.bfloat16(), weight, targets)
    with pytest.raises(ValueError, match=r"hidden \[N, H\], weight \[V, H\]"):
        linear_logprob(hidden, weight.T, targets)
    with pytest.raises(ValueError, match=r"bias has shape \(8,\); linear_logprob takes \(7,\)"):
        linear_logprob(hidden, weight, targets, bias=torch.zeros(8))
    with pytest.raises(ValueError, match=r"coefficient has shape \(3, 1\); linear_logprob takes \(3,\)"):
        linear_logprob(hidden, weight, targets, coefficient=torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"temperature has shape \(3, 1\); give a number, or \(3,\)"):
        linear_logprob(hidden, weight, targets, temperature=torch.ones(3, 1))
    for softcap in (0.0, -1.0, torch.inf):
        with pytest.raises(ValueError, match=rf"softcap is {softcap}; set it above 0"):
            linear_logprob(hidden, weight, targets, softcap=softcap)
    for dtype in (torch.float32, torch.bool):
        with pytest.raises(ValueError, match=rf"targets are {dtype}; give token ids as integers"):
            linear_logprob(hidden, weight, targets.to(dtype))
    for name, call in (
        ("hidden", lambda: linear_logprob(hidden.double(), weight.double(), targets)),
        ("logits", lambda: logits_logprob(weight[:3].double(), targets)),
    ):
        with pytest.raises(ValueError, match=rf"{name} is torch.float64; the log-prob kernels take float32"):
            call()
    with pytest.raises(ValueError, match=r"logits \[N, V\]"):
        logits_logprob(hidden, targets[:2])


def test_fp32_without_onednn_by_name(monkeypatch, caplog):
    """A torch without its private operator gives the same values from its public ones, and says what it costs."""
    hidden, weight, bias, targets, c = problem(20, 64, 1537)
    expected = solve(linear_logprob, hidden, weight, bias, targets, c, dtype=torch.float32)
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    products._onednn_linear.cache_clear()
    try:
        assert products._onednn_linear() is None
        found = solve(linear_logprob, hidden, weight, bias, targets, c, dtype=torch.float32)
    finally:
        products._onednn_linear.cache_clear()
    assert len(caplog.records) == 1 and "_linear_pointwise" in caplog.text
    assert_close(found, expected, values=5e-6, gradients=2e-6)
