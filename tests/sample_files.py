"""Files of samples, as a run records them."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lightning_grpo.record.schema import COLUMNS, LOGPROBS

HOSTILE = {
    "script": "<script>window.ran = 1</script>",
    "end of script": "</script><script>window.ran = 2</script><!--",
    "image": '"><img src=x onerror="window.ran = 3">',
    "link": '<a href="javascript:window.ran = 4">click</a>',
    "right-to-left override": "the answer is \u202e21\u202c",
    "control characters": "a\0b \x1b[2J c\u200bd",
    "long line": "x" * 100_000,
    "separators": "a\u2028b\u2029c",
}
"""Texts that a page must show and never run."""


def sample(step: int, group: int, index: int, **values: Any) -> dict[str, Any]:
    """The row of a sample; ``values`` change its columns or add to them."""
    known = {"step": step, "rollout": step, "rank": 0, "group": group, "index": index}
    texts = {"prompt": f"question {step}.{group}", "completion": f"answer {step}.{group}.{index}", "source": "sums"}
    figures = {"reward": float(index % 2), "advantage": index % 2 - 0.5, "truncated": False, "finish_reason": "stop"}
    return (
        known
        | texts
        | figures
        | {"completion_ids": [1, 2, 3], "version_min": step - 1, "version_max": step - 1}
        | values
    )


def rows(steps: int, groups: int = 2, size: int = 4) -> Iterator[dict[str, Any]]:
    """Samples of ``steps`` optimizer steps with ``groups`` groups of ``size`` completions each."""
    return (sample(step + 1, group, index) for step in range(steps) for group in range(groups) for index in range(size))


def write_samples(folder: Path, samples: list[dict[str, Any]], *, number: int = 0) -> Path:
    """Write ``samples`` to one file of the run in ``folder``, and return its path."""
    path = folder / "samples" / f"rank0-{number:06d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    more = [pa.field(name, pa.float32()) for name in samples[0] if name.startswith("rewards/")]
    more += [pa.field(name, pa.string()) for name in samples[0] if name.startswith("extra/")]
    more += [field for field in LOGPROBS if field.name in samples[0]]
    pq.write_table(pa.Table.from_pylist(samples, schema=pa.schema([*COLUMNS, *more])), path)
    return path
