"""Group Relative Policy Optimization on PyTorch Lightning."""

import logging
import sys
from typing import TYPE_CHECKING

from lightning_grpo.lazy import lazy_names
from lightning_grpo.moved import MovedFinder

if TYPE_CHECKING:
    from lightning_grpo.data import PromptDataModule
    from lightning_grpo.module import GRPOModule

__all__ = ["GRPOModule", "PromptDataModule"]

# torch, Lightning and transformers take seconds to import, and not everything in this package needs them.
__getattr__, __dir__ = lazy_names(
    __name__, {"GRPOModule": "lightning_grpo.module", "PromptDataModule": "lightning_grpo.data"}
)

sys.meta_path.append(MovedFinder())

# PEFT imports bitsandbytes, which then warns on some processors that a kernel is missing, which is not used here.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
