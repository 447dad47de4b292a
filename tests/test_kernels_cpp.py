"""The C++ row kernels against their torch twins."""

import tempfile

import pytest
import torch

from lightning_grpo.kernels import cpp_rows, linear_logprob, logits_logprob, rows, torch_rows
from lightning_grpo.kernels.softmax import Statistics, Transform

needs_compiler = pytest.mark.skipif(cpp_rows._library() is None, reason="needs a C++ compiler")


def block(dtype):
    """Logits of five tokens for 1,100 ids, one −∞ and one large; targets, transform and the loss's coefficients."""
    g = torch.Generator().manual_seed(0)
    a = (torch.randn(5, 1100, generator=g) * 3).to(dtype)
    a[1, 5], a[2, 9] = -torch.inf, 80.0
    targets = torch.tensor([0, 7, 300, 1000, 1099])
    transform = Transform.build(targets, 1100, torch.rand(5, generator=g) + 0.5, None, 1.2)
    return a, targets, transform, torch.randn(2, 5, generator=g)


def results(module, dtype, entropy_grad, keep):
    a, targets, transform, c = block(dtype)
    stats, found = Statistics.empty(5, a.device, squares=True), []
    blocks = [(slice(0, 1029), a[:, :1029]), (slice(1029, 1100), a[:, 1029:].clone())]
    for ids, part in blocks:
        weights = torch.empty(part.shape, dtype=dtype) if keep else None
        joins = torch.ones(2, len(a)) if keep else None
        module.accumulate(part, ids, targets, transform, stats, weights, joins)
        found += [joins[0], weights * joins[1][:, None]] if keep else []
    softmax = stats.finish()
    for ids, part in blocks:
        out = torch.empty(part.shape, dtype=dtype)
        module.gradient(part, out, ids, targets, transform, softmax, c[0], c[1] if entropy_grad else None)
        found.append(out)
        in_place = part.clone()
        module.gradient(in_place, in_place, ids, targets, transform, softmax, c[0], c[1] if entropy_grad else None)
        assert torch.equal(in_place, out)
    return [*softmax, stats.grad_norm(softmax), *found]


@needs_compiler
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cpp_rows_equal_their_torch_twins(dtype, entropy_grad, keep):
    ours, twins = (results(module, dtype, entropy_grad, keep) for module in (cpp_rows, torch_rows))
    for i, (x, y) in enumerate(zip(ours, twins, strict=True)):
        assert x.isfinite().all()
        rounded = i >= 5 and dtype == torch.bfloat16
        torch.testing.assert_close(x, y, rtol=1e-2 if rounded else 1e-5, atol=5e-6)


@needs_compiler
def test_exponentials_are_exact_to_fp32():
    """The sums of 2,000 rows of one to 64 logits down to where e^z is no number any more, against float64."""
    a = torch.linspace(0, -110, 2000)[:, None] * torch.linspace(0, 1, 64)
    a[0] = torch.linspace(-1e-3, 0, 64)
    targets = torch.full((2000,), 64)
    stats = Statistics.empty(2000, a.device)
    weights = torch.empty(2000, 64)
    cpp_rows.accumulate(
        a, slice(0, 64), targets, Transform.build(targets, 65, 1.0), stats, weights, torch.ones(2, 2000)
    )
    expected = (a.double() - a.double().amax(1, keepdim=True)).exp()
    torch.testing.assert_close(stats.s.double(), expected.sum(1), rtol=5e-7, atol=0)
    torch.testing.assert_close(weights.double(), expected, rtol=3e-7, atol=2e-38)


@needs_compiler
def test_nan_and_infinity_show():
    """A NaN or +∞ in a row that counts reaches its log-prob, wherever it stands; other rows stay as they are."""
    for dtype in (torch.float32, torch.bfloat16):
        for column in (0, 1, 63, 299):
            logits = torch.zeros(3, 300, dtype=dtype)
            logits[1, column], logits[2, column] = torch.nan, torch.inf
            found = logits_logprob(logits, torch.tensor([5, 5, 5]))
            assert [x.isnan().tolist() for x in found] == [[False, True, True]] * 2


@needs_compiler
def test_rows_of_a_wider_tensor():
    """Blocks need not be contiguous, only their rows."""
    wide = torch.randn(6, 400, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 3, 50, 98, 99, 7])
    found = []
    for logits in (wide[:, 100:200], wide[:, 100:200].contiguous()):
        leaf = logits.detach().requires_grad_()
        logprob, entropy = logits_logprob(leaf, targets)
        logprob.sum().backward()
        found.append([logprob, entropy, leaf.grad])
    for x, y in zip(*found, strict=True):
        assert torch.equal(x, y)


@needs_compiler
def test_values_of_other_types_are_never_misread():
    """Targets may be int32; statistics that cannot be written in place are refused."""
    a, targets, transform, _ = block(torch.float32)
    found = []
    for ids in (targets, targets.int(), targets.repeat_interleave(2)[::2]):
        stats = Statistics.empty(5, a.device)
        cpp_rows.accumulate(a, slice(0, 1100), ids, transform, stats)
        found.append(stats.finish().logprob)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    apart = Statistics(*torch.zeros(5, 4).unbind(1))
    with pytest.raises(ValueError, match="statistics must be contiguous"):
        cpp_rows.accumulate(a, slice(0, 1100), targets, transform, apart)


def test_plain_torch_where_there_is_no_compiler(monkeypatch, caplog):
    """The same values, and one line that says so."""
    hidden, weight = (torch.randn(n, 16, generator=torch.Generator().manual_seed(n)) for n in (9, 1100))
    targets = torch.arange(9)
    expected = linear_logprob(hidden, weight, targets)
    monkeypatch.setenv("CXX", "a-compiler-that-is-not-there")
    cpp_rows._library.cache_clear()
    try:
        for _ in range(2):
            found = linear_logprob(hidden, weight, targets)
    finally:
        cpp_rows._library.cache_clear()
    assert len(caplog.records) == 1 and "a-compiler-that-is-not-there" in caplog.text
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=5e-6)


COMPILER = """#!/bin/sh
case "$*" in *"FORBIDDEN"*) exit 1;; esac
exec c++ "$@"
"""


def compiled_with(monkeypatch, tmp_path, forbidden):
    """The library by a compiler that doesn't know an option and says nothing."""
    script = tmp_path / "compiler"
    script.write_text(COMPILER.replace("FORBIDDEN", forbidden))
    script.chmod(0o755)
    monkeypatch.setenv("CXX", f"env 'LANG=C C' {script}")
    cpp_rows._library.cache_clear()
    try:
        return cpp_rows._library()
    finally:
        cpp_rows._library.cache_clear()


@needs_compiler
@pytest.mark.parametrize("unknown", ["-march=native", "native", "-fopenmp ", "-fopenmp"])
def test_processors_and_compilers_without_some_options(monkeypatch, tmp_path, caplog, unknown):
    """As ARM's and Apple's: the same values without them. $CXX may be a command of several words."""
    expected = results(cpp_rows, torch.float32, True, True)
    library = compiled_with(monkeypatch, tmp_path, unknown)
    assert library is not None and not caplog.records
    monkeypatch.setattr(cpp_rows, "_library", lambda: library)
    for x, y in zip(results(cpp_rows, torch.float32, True, True), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=5e-6)


def test_a_compiler_that_fails_without_a_word(monkeypatch, tmp_path, caplog):
    assert compiled_with(monkeypatch, tmp_path, "") is None
    assert len(caplog.records) == 1 and "non-zero exit status 1" in caplog.text


@pytest.mark.parametrize("command", ["ccache 'a-compiler", "  "])
def test_odd_values_of_cxx(monkeypatch, caplog, command):
    """A quote without its end is said; blanks are no name."""
    monkeypatch.setenv("CXX", command)
    cpp_rows._library.cache_clear()
    try:
        library = cpp_rows._library()
    finally:
        cpp_rows._library.cache_clear()
    if command.strip():
        assert library is None and "No closing quotation" in caplog.text
    else:
        assert "a-compiler" not in caplog.text and "-O3" not in caplog.text.split("directory: ")[-1]


def test_no_folder_for_temporary_files(monkeypatch, caplog):
    def missing():
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "_get_default_tempdir", missing)
    monkeypatch.setattr(tempfile, "tempdir", None)
    cpp_rows._library.cache_clear()
    try:
        assert cpp_rows._library() is None
    finally:
        cpp_rows._library.cache_clear()
    assert len(caplog.records) == 1 and "No usable temporary directory" in caplog.text


@needs_compiler
def test_columns_apart_are_read_and_written_in_place():
    """Whatever the strides, and a block that is only read stays as it was."""
    a, targets, transform, c = block(torch.float32)
    apart = a.T.contiguous().T
    found = []
    for x in (a, apart):
        stats, out, before = Statistics.empty(5, a.device), torch.empty_like(x), x.clone()
        cpp_rows.accumulate(x, slice(0, 1100), targets, transform, stats)
        cpp_rows.gradient(x, out, slice(0, 1100), targets, transform, stats.finish(), c[0], c[1])
        assert torch.equal(x, before)
        found.append([*stats[:4], out])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_compiler)])
@pytest.mark.parametrize("trainable", [False, True])
def test_fp32_whatever_the_default_type(monkeypatch, trainable, compiled, low):
    """As under Lightning's bf16-true and 16-true, which set it."""
    monkeypatch.setattr(cpp_rows, "takes", cpp_rows.takes if compiled else lambda *_: False)
    hidden, weight = (torch.randn(n, 16, generator=torch.Generator().manual_seed(n)).to(low) for n in (9, 1100))

    def solve():
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trainable)]
        logprob, entropy = linear_logprob(*leaves, torch.arange(9))
        logprob.sum().backward()
        return [logprob, entropy, *(x.grad for x in leaves if x.requires_grad)]

    expected = solve()
    torch.set_default_dtype(low)
    try:
        found = solve()
    finally:
        torch.set_default_dtype(torch.float32)
    assert found[0].dtype == found[1].dtype == torch.float32
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_plain_torch_takes_what_cpp_does_not():
    """Softcaps, float16, columns apart."""
    transform = Transform.build(torch.tensor([0]), 4, 1.0)
    chosen = [
        rows.rows_for(a, None, t)
        for a, t in (
            (torch.zeros(1, 4), transform._replace(cap=torch.ones(1))),
            (torch.zeros(1, 4).half(), transform),
            (torch.zeros(4, 2)[:, :1].T, transform),
        )
    ]
    assert chosen == [torch_rows] * 3
