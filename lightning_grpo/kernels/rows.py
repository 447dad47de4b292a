"""Row arithmetic on one block of the vocabulary, by what suits the device: Triton, C++, or plain torch."""

from types import ModuleType

from torch import Tensor

from lightning_grpo.kernels import cpp_rows, torch_rows
from lightning_grpo.kernels.softmax import Softmax, Statistics, Transform


def accumulate(
    a: Tensor, ids: slice, targets: Tensor, transform: Transform, stats: Statistics, weights: Tensor | None = None
) -> Tensor | None:
    """Take the block ``a`` of the vocabulary's ``ids`` into the statistics, in place.

    With ``weights`` [N, W] (may be ``a``), these are set to w ∝ exp(z)·∂z/∂a of the tokens other than the target, and
    the factors (old, new) [2, N] are returned by which a sum over the vocabulary goes on: sum·old + new·Σ w·x.
    """
    return _rows_for(a, weights, transform).accumulate(a, ids, targets, transform, stats, weights)


def gradient(
    a: Tensor,
    out: Tensor,
    ids: slice,
    targets: Tensor,
    transform: Transform,
    softmax: Softmax,
    c_logprob: Tensor,
    c_entropy: Tensor | None,
) -> None:
    """Write ∂loss/∂a, but for ``factor``, into ``out`` [N, ≥ W], which may be ``a``.

    From c_logprob = ∂loss/∂logprob and c_entropy = ∂loss/∂entropy, [N] each:
    ∂loss/∂z = c_logprob·(onehot − p) − c_entropy·p·(log p + entropy).
    """
    _rows_for(a, out, transform).gradient(a, out, ids, targets, transform, softmax, c_logprob, c_entropy)


def _rows_for(a: Tensor, out: Tensor | None, transform: Transform) -> ModuleType:
    if a.is_cuda:
        # A CPU needs no Triton.
        from lightning_grpo.kernels import triton_rows

        return triton_rows
    return cpp_rows if cpp_rows.takes(a, out, transform) else torch_rows
