"""Names what is wrong with a run while it can still be fixed: rules over its metrics, with evidence and a remedy."""

from typing import TYPE_CHECKING

from lightning_grpo.lazy import lazy_names

if TYPE_CHECKING:
    from lightning_grpo.diagnosis.callback import Diagnosis
    from lightning_grpo.diagnosis.finding import Finding
    from lightning_grpo.diagnosis.history import History
    from lightning_grpo.diagnosis.rule import Rule

__all__ = ["Diagnosis", "Finding", "History", "Rule"]

# Lightning takes seconds to import, and `lightning-grpo diagnose` does not need it.
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Diagnosis": "lightning_grpo.diagnosis.callback",
        "Finding": "lightning_grpo.diagnosis.finding",
        "History": "lightning_grpo.diagnosis.history",
        "Rule": "lightning_grpo.diagnosis.rule",
    },
)
