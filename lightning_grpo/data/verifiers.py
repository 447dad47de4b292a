"""Environments of the package verifiers, and the rows of their data sets."""

import json
import signal
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from lightning_grpo.data.rows import Row
from lightning_grpo.errors import UserError, optional

PREFIX = "verifiers:"
SPLITS = ("train", "eval")


def load_verifiers(name: str, args: Mapping[str, Any], option: str) -> Any:
    """Return the environment that ``verifiers.load_environment`` loads; the same object for equal arguments.

    Args:
        name: the environment's name on the hub of environments, whose package is installed, or the name of a module
            with a function ``load_environment``.
        args: arguments of that function.
        option: name of the option, for messages.

    Raises:
        UserError: if verifiers or the environment is not installed, or it can't be loaded.
    """
    verifiers = optional("verifiers", "verifiers", option)
    if not hasattr(verifiers, "MultiTurnEnv"):
        raise UserError(
            f"{option} needs verifiers 0.1.10, but version {verifiers.__version__} is installed, which has no "
            "MultiTurnEnv; run pip install 'lightning-grpo[verifiers]'"
        )
    try:
        return _load(name, json.dumps(args, sort_keys=True))
    except Exception as error:
        causes = [error, *filter(None, [error.__cause__])]
        raise UserError(f"{option}: {'; '.join(map(str, causes))}") from error


@lru_cache
def _load(name: str, args: str) -> Any:
    from verifiers import load_environment

    # its environments install signal handlers, which would replace those that save a checkpoint
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return load_environment(name, **json.loads(args))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def verifiers_rows(name: str, args: Mapping[str, Any]) -> Iterator[Row]:
    """Yield the rows of an environment's data set.

    Args:
        name: as for `load_verifiers`.
        args: its arguments, and ``split``: ``train``, the default, or ``eval``.
    """
    split = args.get("split", "train")
    if split not in SPLITS:
        raise UserError(f"source_args.split is {split!r}; set {' or '.join(SPLITS)}")
    given = {key: value for key, value in args.items() if key != "split"}
    environment = load_verifiers(name, given, f"data.source {PREFIX}{name}")
    try:
        rows = environment.get_eval_dataset() if split == "eval" else environment.get_dataset()
    except ValueError as error:
        raise UserError(f"data.source {PREFIX}{name} has no data set for the split {split}: {error}") from error
    for row in rows:
        # a column of messages has all their keys in each of them
        prompt = [{key: value for key, value in message.items() if value is not None} for message in row["prompt"]]
        yield row | {"prompt": prompt}
