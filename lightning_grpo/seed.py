"""One seed for a whole run."""

import os


def seed_of_run(seed: int | None) -> int:
    """``seed``, or that of `lightning.seed_everything` (``--seed_everything``) if it is None, or 0 if there is none."""
    return int(os.environ.get("PL_GLOBAL_SEED") or 0) if seed is None else seed
