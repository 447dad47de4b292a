"""The prompts of a run: read from one or several sources, encoded, and divided into training and held-out prompts."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lightning_grpo.data import store
from lightning_grpo.data.encoding import Encoder, Remarks
from lightning_grpo.data.prompts import Encoded, Prompt, fingerprint, identify
from lightning_grpo.data.sources import Opened, open_source, require_rows, stream_rows
from lightning_grpo.data.store import PromptTable, PromptWriter, open_table
from lightning_grpo.data.streaming import FIRST, StreamedPrompts
from lightning_grpo.data.template import read_template
from lightning_grpo.errors import UserError
from lightning_grpo.ranges import check_ranges

# Procedural sources seed row i with seed + i. The offset keeps held-out rows distinct from training rows.
VALIDATION_SEED = 1_000_000_000


@dataclass(kw_only=True)
class Source:
    """One of several sources of prompts."""

    source: str
    """As ``data.source`` with one source."""
    source_args: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the source."""
    size: int | None = None
    """Number of rows to generate or to read from the start. Unset: all."""
    weight: float | None = None
    """Share of this source in every rollout, relative to the weights of the others. Unset for all sources: every prompt
    occurs once per pass over the data."""
    columns: dict[str, str] | None = None
    """New column names for this source. Unset: ``data.columns``."""
    chat: bool | None = None
    """Turn a text prompt into a user message. Unset: ``data.chat``."""
    system_prompt: str | None = None
    """System message of this source. Unset: ``data.system_prompt``."""
    rewards: list[str] | None = None
    """Names of the rewards that apply to prompts of this source. Unset: all rewards."""


def check_sources(sources: Mapping[str, Source], option: str) -> dict[str, Source]:
    """Return several sources by name.

    Raises:
        UserError: a setting can't be used. ``option`` is the option of the sources, for the message.
    """
    if not sources:
        raise UserError(f"{option} is empty; name one source or more")
    for name, source in sources.items():
        if not name or "/" in name or "." in name:
            raise UserError(
                f"{option} has a source named {name!r}; metrics contain it, so use letters, digits, - and _"
            )
        check_ranges(source, {"size": "[1, inf)", "weight": "(0, inf)"}, prefix=f"{option}.{name}.")
    unset = [name for name, source in sources.items() if source.weight is None]
    if 0 < len(unset) < len(sources):
        raise UserError(f"{option}.{unset[0]} has no weight, but others have one; set {option}.{unset[0]}.weight too")
    return dict(sources)


@dataclass(frozen=True)
class DataSet:
    """Encoded prompts, in the order of their sources."""

    train: Sequence[Prompt]
    validation: Sequence[Prompt]
    fingerprint: str
    """Of the training prompts; see `lightning_grpo.data.prompts.fingerprint`."""
    sizes: list[int]
    """Number of training prompts of each source."""
    remarks: list[str]
    """What is probably a mistake in the data, as sentences."""
    source_names: list[str]
    """The different `Prompt.source` of the training prompts; of the first ones if they are streamed."""


@dataclass(frozen=True, kw_only=True)
class DataSetReader:
    """Reads a data set, from its sources or from the prompts that an earlier run stored.

    Args:
        sources: the sources of the training prompts; a single one is called "".
        validation: the sources of the held-out prompts. Empty: they are drawn from the training prompts.
        validation_size: number of held-out prompts, of each source if ``validation`` has any.
        encoder: encodes the rows. Settings of a source take precedence.
        seed: of procedural sources and of the choice of held-out prompts.
        streaming: read the training prompts while they are served.
        cache: store prompts in `store.cache_folder`, and use those that are stored there.
    """

    sources: Mapping[str, Source]
    validation: Mapping[str, Source]
    validation_size: int
    encoder: Encoder
    seed: int
    cache: bool = True
    streaming: bool = False

    def read(self) -> DataSet:
        """Read and encode all rows, and divide the prompts.

        Raises:
            UserError: a source can't be read, or a row is invalid.
        """
        if self.streaming:
            return self._stream()
        opened = [*self._open(self.sources, self.seed, "data.source")]
        opened += self._open(self.validation, self.seed + VALIDATION_SEED, "data.validation_source")
        key = self._key(opened) if self.cache else None
        if key is None:
            return self._divide(opened, None)
        with store.entry(key) as folder:
            try:
                return _load(folder)
            except (OSError, ValueError, KeyError):  # not stored, or by another version
                return self._divide(opened, folder)

    def _stream(self) -> DataSet:
        """Read the held-out prompts, and the first training prompts."""
        (source,) = self.sources.values()
        validation: Sequence[Prompt] = []
        remarks: list[str] = []
        if self.validation:
            opened = [*self._open(self.validation, self.seed + VALIDATION_SEED, "data.validation_source")]
            validation, _ = self._encode(opened, None, remarks)
        train = StreamedPrompts(
            lambda: stream_rows(source.source, args=source.source_args, size=source.size),
            self.encoder,
            held_out={tuple(prompt.ids) for prompt in validation},
            name=source.source,
        )
        first = train[:FIRST]
        remarks += train.remarks.sentences()
        return DataSet(
            train, validation, fingerprint(map(identify, first)), [len(train)], remarks, _source_names(first)
        )

    def _open(self, sources: Mapping[str, Source], seed: int, option: str) -> Iterator["_Opened"]:
        for name, source in sources.items():
            where = f"{option}.{name}.source" if name else option
            size = source.size
            if option == "data.validation_source" and size is None:
                size = self.validation_size or None
            opened = open_source(source.source, args=source.source_args, size=size, seed=seed, option=where)
            yield _Opened(name, replace(source, size=size), opened, where)

    def _key(self, opened: Sequence["_Opened"]) -> str | None:
        """A hash of all that determines the prompts; None if some of it is unknown."""
        if any(part.opened.identity is None for part in opened):
            return None
        tokenizer = self.encoder.tokenizer
        if not getattr(tokenizer, "is_fast", False):
            return None
        encoder = {f.name: getattr(self.encoder, f.name) for f in fields(self.encoder) if f.name != "tokenizer"}
        if self.encoder.chat_template is not None:
            encoder["chat_template"] = read_template(self.encoder.chat_template)
        parts = [
            *((part.name, asdict(replace(part.source, weight=None)), part.opened.identity) for part in opened),
            encoder,
            tokenizer.backend_tokenizer.to_str(),
            (tokenizer.chat_template, tokenizer.bos_token, tokenizer.eos_token),
            (len(self.sources), self.validation_size, self.seed),
            [version(package) for package in ("lightning-grpo", "transformers", "tokenizers")],
        ]
        return hashlib.sha256(json.dumps(parts, default=repr).encode()).hexdigest()

    def _divide(self, opened: Sequence["_Opened"], folder: Path | None) -> DataSet:
        """Encode all rows, divide the prompts, and store them in ``folder`` if there are many."""
        remarks: list[str] = []
        train_sources, validation_sources = opened[: len(self.sources)], opened[len(self.sources) :]
        rows, sizes = self._encode(train_sources, folder and folder / "train.arrow", remarks)
        if validation_sources:
            chosen = np.empty(0, dtype=np.int64)
            file = folder / "validation.arrow" if folder and isinstance(rows, PromptTable) else None
            validation, _ = self._encode(validation_sources, file, remarks, stored_from=1)
        else:
            chosen = self._held_out(len(rows))
            validation = select(rows, chosen)
        held_out = {prompt.ids.tobytes() for prompt in encoded(validation)}
        candidates = encoded(rows) if held_out else ()
        duplicates = [i for i, prompt in enumerate(candidates) if prompt.ids.tobytes() in held_out]
        kept = np.setdiff1d(np.arange(len(rows)), [*chosen, *duplicates])
        if dropped := len(rows) - len(chosen) - len(kept):
            remarks.append(f"dropped {dropped} training prompts that are also held-out prompts")
        train = select(rows, kept, folder)
        counts = np.histogram(kept, bins=np.cumsum([0, *sizes]))[0].tolist() if all(sizes) else sizes
        dataset = DataSet(train, validation, fingerprint(encoded(train)), counts, remarks, _source_names(train))
        if isinstance(rows, PromptTable) and isinstance(validation, PromptTable) and folder is not None:
            _save(dataset, folder, kept, None if validation_sources else chosen)
        return dataset

    def _held_out(self, count: int) -> np.ndarray:
        """The indices of the held-out prompts among ``count``, in order."""
        if self.validation_size >= count:
            raise UserError(
                f"data.validation_size is {self.validation_size}, but {self._names()} has {count} prompts; set it "
                f"below {count}, or set data.validation_source"
            )
        order = np.random.default_rng((self.seed, count)).permutation(count)
        return np.sort(order[: self.validation_size])

    def _names(self) -> str:
        return " and ".join(repr(source.source) for source in self.sources.values())

    def _encode(
        self, opened: Sequence["_Opened"], file: Path | None, remarks: list[str], stored_from: int | None = None
    ) -> tuple[Sequence[Prompt], list[int]]:
        """All prompts of some sources, and the number of prompts of each."""
        writer, sizes, first = PromptWriter(file, stored_from or store.STORED_FROM), [], 0
        for part in opened:
            counter = _Counter(islice(part.opened.rows, part.source.size))
            found, kept = Remarks(), 0
            for prompts in self._encoder(part).encode(counter, found, first=first, stored=file is not None):
                writer.add(prompts)
                kept += len(prompts)
            require_rows(counter.count, part.option, part.source.source)
            remarks += found.sentences()
            if kept < counter.count:
                length = f"more than max_prompt_length = {self.encoder.max_prompt_length} tokens"
                if not kept:
                    raise UserError(
                        f"all {counter.count} prompts of {part.source.source} have {length}; raise it, or use shorter "
                        "prompts"
                    )
                remarks.append(
                    f"dropped {counter.count - kept} of {counter.count} prompts of {part.source.source}, which have "
                    f"{length}"
                )
            sizes.append(kept)
            first += counter.count
        return writer.finish(), sizes

    def _encoder(self, part: "_Opened") -> Encoder:
        own = {name: getattr(part.source, name) for name in ("columns", "chat", "system_prompt", "rewards")}
        given = {name: value for name, value in own.items() if value is not None}
        return replace(self.encoder, source=part.name, **given)


class _Opened(NamedTuple):
    name: str
    source: Source
    opened: Opened
    option: str


class _Counter:
    """Counts the rows that are read."""

    def __init__(self, rows: Iterable[tuple[str, Any]]) -> None:
        self.rows = rows
        self.count = 0

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        for row in self.rows:
            self.count += 1
            yield row


def select(prompts: Sequence[Prompt], rows: np.ndarray, folder: Path | None = None) -> Sequence[Prompt]:
    """The prompts at the indices ``rows``; ``folder`` is that of the `PromptTable`."""
    if isinstance(prompts, PromptTable):
        return PromptTable(prompts.table, rows, folder)
    return [prompts[i] for i in rows]


def _source_names(prompts: Sequence[Prompt]) -> list[str]:
    if isinstance(prompts, PromptTable):
        return sorted(prompts.column("source").unique().to_pylist())
    return sorted({prompt.source for prompt in prompts})


def encoded(prompts: Sequence[Prompt]) -> Iterator[Encoded]:
    """What identifies each prompt."""
    return prompts.encoded() if isinstance(prompts, PromptTable) else map(identify, prompts)


def lengths(prompts: Sequence[Prompt]) -> np.ndarray:
    """Number of tokens of each prompt."""
    if isinstance(prompts, PromptTable):
        return prompts.lengths()
    return np.array([len(prompt.ids) for prompt in prompts], dtype=np.int64)


def _save(dataset: DataSet, folder: Path, train: np.ndarray, validation: np.ndarray | None) -> None:
    np.save(folder / "train.npy", train)
    if validation is not None:
        np.save(folder / "validation.npy", validation)
    facts = {name: getattr(dataset, name) for name in ("fingerprint", "sizes", "remarks", "source_names")}
    (folder / "facts.json").write_text(json.dumps(facts))


def _load(folder: Path) -> DataSet:
    facts = json.loads((folder / "facts.json").read_text())
    rows = open_table(folder / "train.arrow")
    if (folder / "validation.npy").exists():
        validation = PromptTable(rows.table, np.load(folder / "validation.npy"))
    else:
        validation = open_table(folder / "validation.arrow")
    return DataSet(PromptTable(rows.table, np.load(folder / "train.npy"), folder), validation, **facts)
