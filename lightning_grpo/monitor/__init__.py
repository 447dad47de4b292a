"""Progress in the terminal, metrics of completions and rewards, checkpoints, and stopping on signals."""

PHASES = ("rollout", "sync", "reward", "score", "update")
"""Phases of an optimizer step, whose seconds are logged as ``time/PHASE``."""
