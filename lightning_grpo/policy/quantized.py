"""Base weights in 4 bits under trained adapters (QLoRA, Dettmers et al. 2023, arXiv:2305.14314), by bitsandbytes."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from lightning_grpo.errors import UserError

BYTES_PER_WEIGHT = 0.5 + 1 / 64 + 4 / (64 * 256)
"""4 bits, an 8-bit scale for each block of 64 weights, and a float32 scale for each 256 of these scales."""

ROUNDING = 2.0**-4
"""Typical relative error of a weight in 4 bits: on SmolLM2-135M the matrices differ by 9 % in their norm."""


def nf4() -> BitsAndBytesConfig:
    """Return the configuration that quantizes all linear layers but the output head while a model is loaded.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    if find_spec("bitsandbytes") is None:
        raise UserError(
            "quantization is nf4, which needs bitsandbytes: pip install 'lightning-grpo[bitsandbytes]', or leave it "
            "unset"
        )
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)


def compute_alike(model: nn.Module) -> None:
    """Make the quantized layers of ``model`` compute the same with and without gradients.

    bitsandbytes has other kernels for evaluation. Their rounding would make the ratio of the first update differ from
    1, and on some processors they repack the weights, after which no gradient passes through the layer.
    """
    from bitsandbytes.autograd._functions import MatMul4Bit
    from bitsandbytes.nn import Linear4bit

    class DequantizedLinear(Linear4bit):
        def forward(self, x: Tensor) -> Tensor:
            device = x.device.type
            if torch.is_autocast_enabled(device):
                x = x.to(torch.get_autocast_dtype(device))
            bias = None if self.bias is None else self.bias.to(x.dtype)
            weight: Any = self.weight
            return MatMul4Bit.apply(x, weight, None, bias, weight.quant_state)

    for module in model.modules():
        if type(module) is Linear4bit:
            module.__class__ = DequantizedLinear


def dequantized(weight: Any) -> Tensor:
    """Return the values that a parameter in 4 bits stands for."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight.data, weight.quant_state)
