"""The samples of the page: a list to filter and sort, and the completions of a prompt side by side.

What a model wrote is no part of the HTML: the page contains the samples as deflated JSON in base64, and ``samples.js``
shows them as text.
"""

import base64
import itertools
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lightning_grpo.record.reader import Run
from lightning_grpo.record.schema import EXTRA, LOGPROBS, ORDER, REWARD
from lightning_grpo.report.arms import run_names
from lightning_grpo.report.markup import escape, section

LIMIT = 10_000
"""Samples in a page, unless another number is given."""
SIZE = 32_000_000
"""Bytes of samples in a page, before they are deflated. Long completions lower the number of samples."""
GROUP = ORDER[:3]
"""Columns that identify a group."""
STEPS_PER_READ = 64

Key = tuple[int, ...]


def render(runs: Sequence[Run], limit: int = LIMIT) -> str:
    """Return the section with at most ``limit`` samples of all runs together, as whole groups that are spread evenly
    over the steps. Groups that a finding names come first. The section is empty if no run has samples, or ``limit`` is
    0."""
    if not limit:
        return ""
    known = [len(run.warnings) for run in runs]
    tables = [select(run, limit // len(runs)) for run in runs]
    totals = [total for _, total in tables]
    if not sum(totals):
        return ""
    contents = [
        {"name": name, **columns(table), "token_texts": token_texts(run, table)}
        for name, run, (table, _) in zip(run_names(runs), runs, tables, strict=True)
    ]
    shown = sum(table.num_rows for table, _ in tables)
    note = (
        f'<p class="lead">{shown:,} of {sum(totals):,} samples: whole groups, spread evenly over the steps, and those '
        "that findings name. <code>--samples</code> changes the number.</p>"
    )
    warnings = [warning for run, before in zip(runs, known, strict=True) for warning in run.warnings[before:]]
    return section(
        "samples",
        "Samples",
        note if shown < sum(totals) else "",
        *(f'<p class="note warning">{escape(warning)}</p>' for warning in warnings),
        (files(__package__) / "samples.html").read_text(),
        f'<script type="application/octet-stream" id="samples-data">{pack(contents)}</script>',
    )


# ── Choice ────────────────────────────────────────────────────────────────────────────────────────────────────────


def select(run: Run, limit: int) -> tuple[pa.Table, int]:
    """Return the samples of ``run`` for the page, and how many it has in all."""
    keys = run.samples(GROUP)
    if not keys.num_rows:
        return keys, 0
    groups = list(dict.fromkeys(_keys(keys)))
    named = set(_named(run))
    groups.sort(key=lambda group: group not in named)
    named_count = sum(group in named for group in groups)
    per_group = keys.num_rows / len(groups)

    def choose(samples: float) -> list[Key]:
        count = max(1, min(len(groups), int(samples / per_group)))
        first = min(named_count, count)
        return groups[:first] + spread(groups[named_count:], count - first)

    probe = read(run, choose(16 * per_group))
    bytes_per_sample = probe.nbytes / max(probe.num_rows, 1)
    return read(run, choose(min(limit, SIZE / bytes_per_sample))), keys.num_rows


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """Return ``count`` of ``items`` (all if there are fewer) at even distances, the first and the last among them."""
    count = min(count, len(items))
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)] if count else []


def read(run: Run, groups: Iterable[Key]) -> pa.Table:
    """Read the samples of ``groups``, with the columns that the page shows."""
    wanted = set(groups)
    names = [name for name in run.samples(steps=()).column_names if name != "prompt_ids"]
    steps = sorted({group[0] for group in wanted})
    tables = []
    for start in range(0, len(steps), STEPS_PER_READ):
        table = run.samples(names, steps[start : start + STEPS_PER_READ])
        table = table.filter(pa.array([key in wanted for key in _keys(table)], pa.bool_()))
        table = table.append_column("tokens", pa.array(token_counts(table), pa.int32()))
        tables.append(table if has_logprobs(table) else table.drop_columns(["completion_ids", "sampled"]))
    return pa.concat_tables(tables, promote_options="permissive")


def token_counts(table: pa.Table) -> list[int | None]:
    """Return the number of tokens of each sample that the policy sampled."""
    lengths = pc.list_value_length(table["completion_ids"]).to_pylist()
    masks = table["sampled"].to_pylist()
    return [length if mask is None else sum(mask) for length, mask in zip(lengths, masks, strict=True)]


def has_logprobs(table: pa.Table) -> bool:
    """Whether any sample has log-probs."""
    return any(table[name].null_count < table.num_rows for name in LOGPROBS.names if name in table.column_names)


def _named(run: Run) -> Iterator[Key]:
    """The groups of the samples that findings name."""
    for finding in run.findings:
        named = finding.get("samples")
        for sample in named if isinstance(named, list) else ():
            key = tuple(sample.get(name) for name in GROUP) if isinstance(sample, dict) else ()
            if key and all(isinstance(part, int) for part in key):
                yield key


def _keys(table: pa.Table) -> Iterable[Key]:
    return zip(*(table[name].to_pylist() for name in GROUP), strict=True)


# ── Contents ──────────────────────────────────────────────────────────────────────────────────────────────────────


def columns(table: pa.Table) -> dict[str, Any]:
    """Return the samples as lists for ``samples.js``: one per column, values of rewards and extras by name, each prompt
    once, and log-probs as integers of 1/1000 nat."""
    prompts: dict[str, int] = {}
    out: dict[str, Any] = {
        name: table[name].to_pylist()
        for name in (
            *ORDER,
            "completion",
            "tokens",
            "finish_reason",
            "truncated",
            "version_min",
            "version_max",
            "source",
        )
    }
    out["prompt"] = [prompts.setdefault(prompt or "", len(prompts)) for prompt in table["prompt"].to_pylist()]
    out["prompts"] = list(prompts)
    for name in ("reward", "advantage"):
        out[name] = [plain(value) for value in table[name].to_pylist()]
    for name, prefix in (("rewards", REWARD), ("extras", EXTRA)):
        out[name] = {
            column.removeprefix(prefix): [plain(value) for value in table[column].to_pylist()]
            for column in table.column_names
            if column.startswith(prefix)
        }
    out["part_lengths"] = [
        lengths and part_lengths(text, lengths)
        for text, lengths in zip(out["completion"], table["part_lengths"].to_pylist(), strict=True)
    ]
    out["logprobs"] = {
        name.removesuffix("_logprobs"): [
            values and [milli(value) for value in values] for values in table[name].to_pylist()
        ]
        for name in LOGPROBS.names
        if name in table.column_names and table[name].null_count < table.num_rows
    }
    if out["logprobs"]:
        out["completion_ids"] = table["completion_ids"].to_pylist()
        out["sampled"] = table["sampled"].to_pylist()
    return out


def part_lengths(text: str, lengths: Sequence[int]) -> list[int]:
    """Return the lengths of the parts of ``text`` in UTF-16 code units, as JavaScript counts them."""
    ends = [0, *itertools.accumulate(lengths)]
    parts = [text[start:end] for start, end in itertools.pairwise(ends)]
    return [len(part.encode("utf-16-le", "surrogatepass")) // 2 for part in parts]


def plain(value: Any) -> Any:
    """Return a number with five significant digits, and one that JSON lacks under its name in JavaScript."""
    if not isinstance(value, float):
        return value
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return float(f"{value:.5g}")


def milli(value: float | None) -> int | None:
    """Return 1/1000 of nats; None for NaN and infinity."""
    return round(1000 * value) if value is not None and math.isfinite(value) else None


def token_texts(run: Run, table: pa.Table) -> dict[int, str]:
    """Return the text of each token if log-probs are shown and the folder of the run's model is here."""
    file = Path(str(run.info.get("model") or "")) / "tokenizer.json"
    if not has_logprobs(table) or not file.is_file():
        return {}
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    # after another token, since a tokenizer may drop the space before the first word of a text
    before = tokenizer.encode("a", add_special_tokens=False).ids
    length = len(tokenizer.decode(before))
    tokens = pc.unique(table["completion_ids"].combine_chunks().flatten()).to_pylist()
    texts = tokenizer.decode_batch([[*before, token] for token in tokens], skip_special_tokens=False)
    return {token: text[length:] for token, text in zip(tokens, texts, strict=True)}


def pack(value: Any) -> str:
    """Return ``value`` as deflated JSON in base64."""
    return base64.b64encode(zlib.compress(json.dumps(value, separators=(",", ":")).encode(), 6)).decode()
