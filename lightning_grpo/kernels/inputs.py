"""The inputs of the log-prob kernel."""

from typing import NamedTuple

from torch import Tensor

from lightning_grpo.kernels.softmax import Transform


class Inputs(NamedTuple):
    """Tokens and the head that predicts them; see `linear_logprob`."""

    hidden: Tensor
    """[N, H]."""
    weight: Tensor
    """[V, H]; its dtype may differ from that of ``hidden``, to which it is cast for matrix products."""
    bias: Tensor | None
    """[V]."""
    targets: Tensor
    """[N] int64."""
    transform: Transform

    def rows(self, index: slice | Tensor) -> "Inputs":
        hidden, targets, transform = self.hidden[index], self.targets[index], self.transform.rows(index)
        return Inputs(hidden, self.weight, self.bias, targets, transform)
