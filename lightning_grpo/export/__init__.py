"""Trained policies as Hugging Face folders and PEFT adapters."""

from lightning_grpo.lazy import lazy_names

__all__ = ["Export", "SavedPolicy", "export", "read_checkpoint"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Export": "lightning_grpo.export.callback",
        "SavedPolicy": "lightning_grpo.export.checkpoint",
        "export": "lightning_grpo.export.folder",
        "read_checkpoint": "lightning_grpo.export.checkpoint",
    },
)
