"""Sources of rows: files, saved data sets, the hub, and procedural generators."""

import hashlib
import inspect
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from string import ascii_lowercase
from textwrap import shorten
from typing import Any, NamedTuple, TypeVar

from lightning_grpo.data.files import READERS, find_files, is_file_name, read_files
from lightning_grpo.data.rows import Row
from lightning_grpo.data.verifiers import PREFIX, verifiers_rows
from lightning_grpo.errors import UserError, optional
from lightning_grpo.policy.files import hub_reachable

KINDS = (
    "a .jsonl, .json, .csv, .parquet or .arrow file or a pattern of such files, a folder written by "
    "datasets.save_to_disk, a hub name (owner/name), reasoning_gym:TASK, verifiers:NAME, arithmetic, hidden_numbers, "
    "or letters"
)
MAX_ENUMERATED = 100_000
Rows = TypeVar("Rows", bound=Iterable)


def arithmetic(
    size: int | None,
    seed: int,
    *,
    low: int = 1,
    high: int = 20,
    operator: str = "+",
    template: str = "What is {a} {operator} {b}? Answer with just the number.",
) -> Iterator[Row]:
    """Yield distinct questions about integers a, b in [low, high] and their ``answer``; all of them if size is None.

    ``operator`` is ``+``, ``-`` or ``*`` (written ×); ``template`` contains {a}, {b} and, optionally, {operator}.
    """
    compute = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
    _require_whole({"low": low, "high": high})
    if operator not in compute:
        raise UserError(f"data.source_args.operator is {operator!r}; set one of {', '.join(compute)}")
    if high < low:
        raise UserError(f"data.source_args.high is {high}, below low = {low}; set high to {low} or more")
    try:
        template.format(a=low, b=high, operator=operator)
    except (LookupError, ValueError, AttributeError) as error:
        raise UserError(
            f"data.source_args.template is {template!r}, which can't be filled in ({type(error).__name__}: {error}); "
            "its fields are {a}, {b} and {operator}; double all other braces"
        ) from error
    width = high - low + 1
    if size is None and width**2 > MAX_ENUMERATED:
        raise UserError(f"data.size is unset, but there are {width**2:,} questions of {low} to {high}; set data.size")
    count = width**2 if size is None else size
    if count > width**2:
        raise UserError(f"data.size is {count}, but only {width**2} questions of {low} to {high} exist; set {width**2}")
    for pair in random.Random(f"arithmetic {seed}").sample(range(width**2), count):
        a, b = low + pair // width, low + pair % width
        prompt = template.format(a=a, b=b, operator=operator.replace("*", "×"))
        yield {"prompt": prompt, "answer": str(compute[operator](a, b))}


def letters(size: int | None, seed: int, *, alphabet: str = ascii_lowercase, repeats: int = 6) -> Iterator[Row]:
    """Yield rows with a letter as the prompt and the letter ``repeats`` times as ``answer``.

    A model learns this from random weights in seconds. The letters of ``alphabet`` are cycled in an order drawn from
    the seed, once if size is None.
    """
    _require_whole({"repeats": repeats}, least=1)
    if not isinstance(alphabet, str) or not alphabet:
        raise UserError(f"data.source_args.alphabet is {alphabet!r}; set a text of one or more letters")
    order = random.Random(f"letters {seed}").sample(alphabet, len(alphabet))
    for i in range(len(order) if size is None else size):
        letter = order[i % len(order)]
        yield {"prompt": letter, "answer": letter * repeats}


def hidden_numbers(
    size: int | None,
    seed: int,
    *,
    width: int = 10,
    highest: int = 100,
    template: str = "I think of a whole number from {low} to {high}. Guess it. Answer with just the number.",
) -> Iterator[Row]:
    """Yield numbers to guess: ``answer`` is one of the ``width`` numbers from ``low`` to ``high``.

    ``high`` is at most ``highest``; ``template`` contains {low} and {high}.
    """
    _require_whole({"width": width, "highest": highest}, least=1)
    if highest < width:
        raise UserError(f"data.source_args.highest is {highest}, below width = {width}; set it to {width} or more")
    if size is None:
        raise UserError("data.size is unset, but hidden_numbers can generate any number of prompts; set data.size")
    drawn = random.Random(f"hidden_numbers {seed}")
    for _ in range(size):
        low = drawn.randint(1, highest - width + 1)
        high = low + width - 1
        prompt = template.format(low=low, high=high)
        yield {"prompt": prompt, "low": low, "high": high, "answer": str(drawn.randint(low, high))}


def _require_whole(arguments: dict[str, Any], least: int | None = None) -> None:
    for name, value in arguments.items():
        if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
            wanted = "a whole number" if least is None else f"{least} or more"
            raise UserError(f"data.source_args.{name} is {value!r}; set {wanted}")


def reasoning_gym(task: str, size: int | None, seed: int, args: dict[str, Any]) -> Iterator[Row]:
    """Yield questions of a reasoning-gym task, with ``answer``, ``task``, ``task_args`` and ``entry`` for scoring.

    ``args`` configure the task, such as its difficulty.
    """
    gym = optional("reasoning_gym", "reasoning-gym", f"data.source reasoning_gym:{task}")
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise UserError(f"data.source names the reasoning-gym task {task!r}; set one of {', '.join(sorted(DATASETS))}")
    if size is None:
        raise UserError(
            f"data.size is unset, but reasoning_gym:{task} can generate any number of prompts; set data.size"
        )
    try:
        dataset = gym.create_dataset(task, **args, size=size, seed=seed)
    except (TypeError, ValueError, AssertionError) as error:
        known = [name for name in inspect.signature(DATASETS[task][1]).parameters if name not in ("seed", "size")]
        raise UserError(f"data.source_args for reasoning_gym:{task}: {error}; it takes {', '.join(known)}") from error
    for i in range(size):
        entry = dataset[i]
        yield {"prompt": entry["question"], "answer": entry["answer"], "task": task, "task_args": args, "entry": entry}


def saved(option: str, source: str, /, split: str = "train") -> Iterable[Row]:
    """Read a folder written by ``datasets.save_to_disk``; ``split`` selects one of several splits."""
    optional("datasets", "datasets", f"{option} {source}")
    from datasets import DatasetDict, load_from_disk

    path = Path(source).expanduser()
    try:
        dataset = load_from_disk(str(path))
    except FileNotFoundError as error:
        kinds = sorted({file.suffix for file in path.iterdir()} & set(READERS))
        advice = f"; set {source.rstrip('/')}/*{kinds[0]} to read the files in it" if kinds else ""
        raise UserError(
            f"{option} is the folder {source}, which was not written by datasets.save_to_disk{advice}"
        ) from error
    except Exception as error:
        raise UserError(f"{option} is the folder {source}, which can't be loaded ({_reason(error)})") from error
    if not isinstance(dataset, DatasetDict):
        return dataset
    if split not in dataset:
        raise UserError(f"{source} has no split {split!r}; set source_args.split to one of {', '.join(dataset)}")
    return dataset[split]


def hub(option: str, source: str, /, split: str = "train", **args: Any) -> Iterable[Row]:
    """Load a data set from the Hugging Face hub, or from the local cache if the hub can't be reached.

    ``args`` are arguments of ``datasets.load_dataset`` (``name``, ``revision``, …).
    """
    optional("datasets", "datasets", f"{option} {source}")
    from datasets import load_dataset

    reachable = hub_reachable(source, "dataset", option=option)
    try:
        with nullcontext() if reachable else offline():
            return load_dataset(source, split=split, **args)
    except Exception as error:
        where = "" if reachable else "; the hub can't be reached from this machine"
        raise UserError(
            f"{option} is {source!r}, which can't be loaded ({_reason(error)}){where}; set {KINDS}"
        ) from error


@contextmanager
def offline() -> Iterator[None]:
    """Make ``datasets`` use only its cache, instead of trying the hub six times per file."""
    import datasets
    import huggingface_hub

    modules: tuple[Any, ...] = (datasets.config, huggingface_hub.constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value


def _reason(error: Exception) -> str:
    return shorten(str(error), 400, placeholder=" …") or type(error).__name__


def _call(source: str, make: Callable[..., Rows], *fixed: Any, args: dict[str, Any]) -> Rows:
    try:
        inspect.signature(make).bind(*fixed, **args)
    except TypeError as error:
        known = list(inspect.signature(make).parameters)[len(fixed) :]
        options = ", ".join(known) if known else "none"
        raise UserError(f"source_args of {source}: {error}; its arguments are: {options}") from error
    return make(*fixed, **args)


class Opened(NamedTuple):
    """A source whose rows can be read."""

    rows: Iterable[tuple[str, Row]]
    """Each with its location ("train.jsonl, line 7")."""
    identity: str | None
    """A hash of the rows, or of the files that contain them. None if the rows are generated."""


def open_source(
    source: str,
    *,
    args: dict[str, Any],
    size: int | None,
    seed: int,
    option: str = "data.source",
    hashed: bool = True,
) -> Opened:
    """Find a source. Its rows are read when they are iterated over.

    Args:
        hashed: compute the identity of files.
        option: name of the option whose value is ``source``, for messages.
    """
    if not source:
        raise UserError(f"{option} is empty; set {KINDS}")
    path = Path(source).expanduser()
    if source.startswith("reasoning_gym:"):
        rows = reasoning_gym(source.removeprefix("reasoning_gym:"), size, seed, args)
        return Opened(_numbered(source, rows), None)
    if source.startswith(PREFIX):
        return Opened(_numbered(source, verifiers_rows(source.removeprefix(PREFIX), args)), None)
    if source in PROCEDURAL:
        return Opened(_numbered(source, _call(source, PROCEDURAL[source], size, seed, args=args)), None)
    if path.is_dir():
        dataset = _call(source, saved, option, source, args=args)
        return Opened(_numbered(source, dataset), digest(sorted(path.rglob("*"))) if hashed else None)
    if is_file_name(source):
        files = find_files(option, source)  # first, since source_args may be left over from another source
        located = _call(source, read_files, option, source, args=args)
        return Opened(located, digest(files) if hashed else None)
    if source.count("/") == 1 and not source.startswith((".", "/", "~")):
        dataset = _call(source, hub, option, source, args=args)
        return Opened(_numbered(source, dataset), getattr(dataset, "_fingerprint", None))
    why = ", but there is no such folder" if "/" in source else ""
    raise UserError(f"{option} is {source!r}{why}; set {KINDS}")


def read(
    source: str, *, args: dict[str, Any], size: int | None, seed: int, option: str = "data.source"
) -> list[tuple[str, Row]]:
    """Return all rows, or the first ``size``, each with its location; see `open_source`."""
    opened = open_source(source, args=args, size=size, seed=seed, option=option)
    taken = list(islice(opened.rows, size))
    require_rows(len(taken), option, source)
    return taken


def stream_rows(source: str, *, args: dict[str, Any], size: int | None) -> Iterator[tuple[str, Row]]:
    """Yield the rows of files, a saved data set or one on the hub, or the first ``size``, while they are read."""
    if source.startswith(("reasoning_gym:", PREFIX)) or source in PROCEDURAL:
        raise UserError(f"data.streaming is true, but {source} generates its rows; set streaming to false")
    if not is_file_name(source) and not Path(source).expanduser().is_dir():
        args = args | {"streaming": True}
    return islice(open_source(source, args=args, size=size, seed=0, hashed=False).rows, size)


def require_rows(count: int, option: str, source: str) -> None:
    """Raise `UserError` if a source has no rows."""
    if not count:
        raise UserError(f"{option} is {source!r}, which has no rows; add prompts to it, or set another source")


def digest(files: Iterable[Path]) -> str:
    """Return a hash of the names and contents of files."""
    hashed = hashlib.sha256()
    for path in files:
        if path.is_file():
            hashed.update(f"{path.name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                hashed.update(hashlib.file_digest(file, "sha256").digest())
    return hashed.hexdigest()


def _numbered(source: str, rows: Iterable[Row]) -> Iterator[tuple[str, Row]]:
    return ((f"{source}, row {i}", row) for i, row in enumerate(rows))


PROCEDURAL: dict[str, Callable[..., Iterable[Row]]] = {
    "arithmetic": arithmetic,
    "hidden_numbers": hidden_numbers,
    "letters": letters,
}
