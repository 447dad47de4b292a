"""Group Relative Policy Optimization on PyTorch Lightning."""

from lightning_grpo.data import PromptDataModule
from lightning_grpo.module import GRPOModule

__all__ = ["GRPOModule", "PromptDataModule"]
