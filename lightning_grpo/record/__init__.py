"""What a run writes to its folder besides the logs: a description, metrics and samples; and how they are read."""

from lightning_grpo.lazy import lazy_names

__all__ = ["Record", "Run", "read_run"]

# readers must start fast, so the callback, which needs torch, is not imported for them
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Record": "lightning_grpo.record.callback",
        "Run": "lightning_grpo.record.reader",
        "read_run": "lightning_grpo.record.reader",
    },
)
