"""The seed of a run."""

import os


def seed_of_run(seed: int | None) -> int:
    """Return ``seed``; if it is None, the seed of `lightning.seed_everything` (``--seed_everything``), or else 0."""
    return int(os.environ.get("PL_GLOBAL_SEED") or 0) if seed is None else seed
