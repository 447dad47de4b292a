"""A reference that follows the policy."""

from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor

from lightning_grpo.errors import UserError
from lightning_grpo.ranges import check_ranges


class ReferenceRefresh(Callback):
    """Move the reference towards the policy: θ_ref ← (1 − mixing)·θ_ref + mixing·θ (TR-DPO, arXiv:2404.09656).

    It does so after every ``every_n_steps`` optimizer steps, for the rollouts that follow. Checkpoints then contain the
    reference, and a resumed run continues with it exactly.

    Args:
        mixing: Share of the policy in the new reference. 1 replaces it.
        every_n_steps: Number of optimizer steps between two refreshes.
    """

    def __init__(self, mixing: float = 0.6, every_n_steps: int = 512) -> None:
        self.mixing = mixing
        self.every_n_steps = every_n_steps
        check_ranges(self, {"mixing": "(0, 1]", "every_n_steps": "[1, inf)"}, prefix="ReferenceRefresh.")
        self._module: Any = None
        self._saved: list[Tensor] | None = None
        self._refreshed_at = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse modules without a reference of their own."""
        if stage != "fit":
            return
        self._module = pl_module
        if trainer.global_step == 0:
            self._refreshed_at = 0
        if not self._module.needs_reference:
            raise UserError("ReferenceRefresh needs a reference, but objective.beta is 0; set it, for example to 0.04")
        if self._module.lora is not None:
            raise UserError(
                "ReferenceRefresh needs the weights of a reference, but with lora it is the policy without its "
                "adapter; remove one of the two"
            )
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise UserError(
                "ReferenceRefresh does not support trainer.strategy ModelParallelStrategy, whose checkpoints would not "
                "contain the sharded reference; set ddp, or remove it"
            )

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the reference of a checkpoint, and refresh it if the run was stopped just before."""
        saved, self._saved = self._saved, None
        if saved is not None:
            for reference, value in zip(self._reference(), saved, strict=True):
                reference.copy_(value)
        self._refresh_if_due(trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Refresh the reference if an optimizer step was taken after which it is due."""
        self._refresh_if_due(trainer.global_step)

    @torch.no_grad()
    def _refresh_if_due(self, step: int) -> None:
        if step == self._refreshed_at or step % self.every_n_steps:
            return
        self._refreshed_at = step
        for reference, policy in zip(self._reference(), self._module.policy.parameters(), strict=True):
            reference.mul_(1 - self.mixing).add_(policy.to(reference.device), alpha=self.mixing)

    def _reference(self) -> list[Tensor]:
        return list(self._module.scorer.reference.parameters())

    def state_dict(self) -> dict[str, Any]:
        """The reference's weights, and the step of the last refresh."""
        return {"reference": self._reference(), "refreshed_at": self._refreshed_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the reference's weights until it is loaded."""
        self._saved, self._refreshed_at = state_dict["reference"], state_dict["refreshed_at"]
