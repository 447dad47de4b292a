"""The row arithmetic for a block of logits, in the implementation that suits the device: Triton, C++ or PyTorch."""

from types import ModuleType

from torch import Tensor

from lightning_grpo.kernels import cpp_rows, torch_rows
from lightning_grpo.kernels.softmax import Transform


def rows_for(a: Tensor, out: Tensor | None, transform: Transform) -> ModuleType:
    """Return the module whose `accumulate`, `gradient` and `join` read the block ``a`` and write to ``out``.

    `torch_rows` defines and documents the functions.
    """
    if a.is_cuda:
        # Triton is not a dependency on CPUs.
        from lightning_grpo.kernels import triton_rows

        return triton_rows
    return cpp_rows if cpp_rows.takes(a, out, transform) else torch_rows
