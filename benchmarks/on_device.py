"""pytest plugin (``-p on_device``): run a test module's kernels on $ON_DEVICE and copy the results back.

Tests compare them with float64 on the CPU. Copies between devices are differentiable, so that gradients are copied back
too.
"""

import os
from collections.abc import Callable, Iterator

import pytest
from torch import Tensor
from torch.utils._pytree import tree_map

KERNELS = ("linear_logprob", "logits_logprob")


def on_device(kernel: Callable) -> Callable:
    device = os.environ.get("ON_DEVICE", "cuda")

    def moved(values, to):
        return tree_map(lambda value: value.to(to) if isinstance(value, Tensor) else value, values)

    def call(*args, **kwargs):
        return moved(kernel(*moved(args, device), **moved(kwargs, device)), "cpu")

    return call


@pytest.fixture(autouse=True)
def kernels_on_device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in KERNELS:
        if hasattr(request.module, name):
            monkeypatch.setattr(request.module, name, on_device(getattr(request.module, name)))
    yield
