"""Files of a run's folder, and the columns of its samples.

======================================  ==========================================================================
run.json                                one object that describes the run
metrics.jsonl                           one object per optimizer step, and one per evaluation of held-out prompts
samples/rank0-000000.parquet            one row per completion that the policy was trained on
findings.jsonl                          one object per finding of the diagnosis
======================================  ==========================================================================

A ``step`` is the number of an optimizer step, counted from 1.
"""

from collections.abc import Sequence

import pyarrow as pa

FORMAT = 1
"""Version of the files, in ``run.json``. It increases when the meaning of a name changes."""
INFO, METRICS, FINDINGS, SAMPLES = "run.json", "metrics.jsonl", "findings.jsonl", "samples"
HELD_OUT = ("val/", "test/")
"""Prefixes of metrics of held-out prompts."""
REWARD, EXTRA = "rewards/", "extra/"
"""Prefixes of the columns of each reward, and of what rewards logged with ``log_extra``."""

COLUMNS = pa.schema(
    [
        ("step", pa.int32()),
        ("rollout", pa.int32()),
        ("rank", pa.int16()),
        ("group", pa.int32()),
        ("index", pa.int16()),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("sampled", pa.list_(pa.bool_())),
        ("part_lengths", pa.list_(pa.int32())),
        ("reward", pa.float32()),
        ("advantage", pa.float32()),
        ("truncated", pa.bool_()),
        ("finish_reason", pa.string()),
        ("version_min", pa.int32()),
        ("version_max", pa.int32()),
        ("seed", pa.int64()),
        ("source", pa.string()),
    ]
)
"""Columns of every file. Besides them there are ``rewards/NAME`` (float32, null if the reward does not apply), and
possibly ``extra/NAME`` (float64 or string) and `LOGPROBS`."""
LOGPROBS = pa.schema([("engine_logprobs", pa.list_(pa.float32())), ("trainer_logprobs", pa.list_(pa.float32()))])
"""Columns with one value per token of ``completion_ids``, written with ``record.logprobs: true``."""
ORDER = ["step", "rollout", "group", "index"]
"""Columns that identify a sample, in the order of the rows."""


def concatenate(tables: Sequence[pa.Table]) -> pa.Table:
    """Concatenate tables with different columns. Where a column has numbers in one and texts in another, it has texts
    in the result."""
    types: dict[str, set[pa.DataType]] = {}
    for table in tables:
        for column in table.schema:
            types.setdefault(column.name, set()).add(column.type)
    mixed = {name for name, found in types.items() if name.startswith(EXTRA) and len(found - {pa.null()}) > 1}
    return pa.concat_tables([_as_text(table, mixed) for table in tables], promote_options="permissive")


def _as_text(table: pa.Table, names: set[str]) -> pa.Table:
    for name in names:
        if name in table.column_names:
            table = table.set_column(table.column_names.index(name), name, table[name].cast(pa.string()))
    return table
