"""Starts programs on several ranks. A store that the first rank opens finds them a free port without a race."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def assert_two_ranks_succeed(*command: str, timeout: float = 500) -> str:
    """Run ``python command`` as two ranks of torchrun from the repository's root; return what they printed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *command],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout
