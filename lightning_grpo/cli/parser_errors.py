"""Errors of the command line's parser in one line: the option, its value, the cause, and a suggestion.

The messages of jsonargparse are nested as deeply as the type of the option, with all members of a union.
"""

import difflib
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import yaml
from jsonargparse import ArgumentParser
from jsonargparse._util import import_object
from lightning.pytorch.cli import LightningArgumentParser

from lightning_grpo.cli.trl.options import ROWS
from lightning_grpo.errors import UserError

KEY = re.compile(r'Parser key "([^"]+)":\s*(.*)')
CLASS = re.compile(r"Problem with given class_path '([^']+)':")
NOISE = re.compile(
    r"Does not validate against|Subtypes: |Errors:|Expected a <class 'NoneType'>|Given value|Expected a path but"
    r"|Not a valid subclass|Subclass types expect|a class path \(str\)|a dict with|a dict without"
)
VALUE = re.compile(r"Got value: (.*)$|Given value: (.*)$|NestedArg\(key='[^']*', val=(.*)\)$")
NEAR, VERY_NEAR = 0.6, 0.9
"""Similarities from which a name is suggested, and from which it is the only one."""
TRL_NAMES = {name: row.ours.split(", ")[0] for name, row in ROWS.items() if row.ours}
"""Options named as in TRL, and the options here that correspond to them."""
SUBCOMMANDS = ["fit", "validate", "test", "predict", "export", "report", "diagnose", "convert-trl", "configure"]


SOURCES = ("source", "validation_source")
"""Options whose value may be the name of a data file."""


class OneLineParser(LightningArgumentParser):
    """A parser whose errors are one line, with a suggestion instead of the usage of all options."""

    files: ClassVar[dict[str, dict]] = {}
    """The content of the ``--config`` files by name, to name the file that contains an option."""

    def add_class_arguments(self, *args: Any, **kwargs: Any) -> list[str]:
        """Add the arguments of a class. A file that is named as a source of prompts is data, not their configuration,
        as which it would be read because of the type of `Source`."""
        added = super().add_class_arguments(*args, **kwargs)
        for action in self._actions:
            if action.dest.split(".")[-1] in SOURCES:
                vars(action)["_enable_path"] = False
        return added

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the error and end with exit code 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser = getattr(ex, "subcommand_parser", None) or self
        print(f"error: {worded(message, parser)}", file=sys.stderr)
        raise SystemExit(2)


def read_config_files(args: Iterable[str]) -> dict[str, dict]:
    """The content of the ``--config`` files among ``args``, by name.

    Raises:
        UserError: if a file is not a readable YAML mapping.
    """
    contents = {}
    for name in config_files(args):
        path = Path(name)
        if not path.exists():
            near = difflib.get_close_matches(path.name, (p.name for p in path.parent.glob("*.yaml")), 1, NEAR)
            hint = f"; did you mean {path.parent / near[0]}?" if near else "; set the path of a YAML file"
            raise UserError(f"--config {name}: there is no such file{hint}")
        if not path.is_file():
            raise UserError(f"--config {name} is not a file; set the path of a YAML file")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError as error:
            raise UserError(
                f"--config {name} is not UTF-8 text (byte {error.start} is 0x{error.object[error.start]:02x}); save it "
                "as UTF-8"
            ) from error
        except yaml.YAMLError as error:
            mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or "unreadable"
            where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
            raise UserError(f"--config {name}{where} is not valid YAML: {problem}") from error
        except OSError as error:
            raise UserError(f"--config {name} can't be read: {error.strerror}") from error
        if not isinstance(content, dict):
            what = "empty" if content is None else f"a {type(content).__name__}"
            raise UserError(
                f"--config {name} is {what}; write options as a mapping, such as trainer: {{max_steps: 100}}"
            )
        contents[name] = content
    return contents


def config_files(args: Iterable[str]) -> Iterator[str]:
    """The values of ``--config`` and ``-c``."""
    previous = None
    for arg in args:
        if previous in ("--config", "-c"):
            yield arg
        elif arg.startswith("--config="):
            yield arg.partition("=")[2]
        previous = arg


def worded(message: str, parser: OneLineParser) -> str:
    """The parser's ``message`` in one line."""
    keys, classes, causes, value = _read(message)
    prefix = ".".join(keys)
    known = list(_options(parser, keys[0] if keys else None, classes[0] if classes else None))
    cause = causes[0] if causes else "can't be used"
    if unknown := _unknown_option(cause):
        name = ".".join(part for part in (prefix, unknown) if part)
        return _no_such(name, known, parser.files)
    if match := re.match(r"ambiguous option: --([\w.]+)\S* could match (.*)", cause):
        name = ".".join(part for part in (prefix, match[1]) if part)
        options = [f"--{prefix}.{other.strip().removeprefix('--')}" for other in match[2].split(",")]
        return f"--{name}: no such option; did you mean {_either(options)}?"
    if match := re.match(r"the following arguments are required: (.*)", cause):
        missing = [f"--{prefix}.{name.strip()}" if prefix else f"--{name.strip()}" for name in match[1].split(",")]
        verb, them = ("is", "it") if len(missing) == 1 else ("are", "them")
        return f"{' and '.join(missing)} {verb} missing; set {them} on the command line or in a --config file"
    if match := re.match(r"unrecognized arguments: (\S+)", cause):
        return f"{match[1]}: unexpected argument; options begin with --"
    if match := re.match(r"(?:argument )?(--?[\w.]+)(?:/\S+)?: (.*)", cause):
        return f"{match[1]}: {_expected([match[2]], known, [])}"
    if match := re.match(r"argument subcommand: invalid choice: '([^']*)'", cause):
        return _no_such_command(match[1])
    if cause.startswith('expected "subcommand"'):
        return f"no subcommand was given; use {_either(SUBCOMMANDS)} (see lightning-grpo --help)"
    if not prefix:
        return cause
    if prefix == "model.rewards" and causes[:1] == ["Expected a <class 'list'>"] and value is not None:
        return f"--model.rewards is {value}, but it is a list; set it to [{value}]"
    shown = f"--{prefix}" + (f" is {value}" if value is not None else "")
    return f"{shown}: {_expected(causes, known, classes)}"


def _read(message: str) -> tuple[list[str], list[str], list[str], str | None]:
    """Keys from the outermost to the innermost option, class paths, innermost causes, and the given value."""
    keys: list[str] = []
    classes: list[str] = []
    causes: list[str] = []
    value = None
    for raw in message.splitlines():
        line = raw.strip().removeprefix("- ").strip()
        if found := VALUE.search(line):
            given = next(group for group in found.groups() if group is not None)
            value = given if value is None or len(given) < len(value) else value
            line = line[: found.start()].strip().rstrip(".")
        if match := KEY.match(line):
            keys.append(match[1])
            line = match[2]
        if match := CLASS.match(line):
            classes.append(match[1])
            continue
        if line and not NOISE.search(line):
            causes.append(line)
    if value is not None and (nested := re.match(r"NestedArg\(key='[^']*', val=(.*)\)$", value)):
        value = nested[1]
    if value is not None and (len(value) > 80 or "init_args" in value):
        value = None
    return keys, classes, causes, value


def _unknown_option(cause: str) -> str | None:
    for pattern in (
        r".*Option '([^']+)' is not accepted",
        r"Subcommand '[^']+' does not accept option '([^']+)'",
        r"unrecognized arguments: --?([\w.+-]+)",
    ):
        if match := re.match(pattern, cause):
            return match[1]
    if match := re.match(r"Group '([^']+)' does not accept option '([^']+)'", cause):
        return f"{match[1]}.{match[2]}"
    return None


def _no_such(name: str, known: list[str], files: dict[str, dict]) -> str:
    known = [option for option in known if not option.endswith(".help") or name.endswith(".help")]
    last = name.rpartition(".")[2]
    near = [TRL_NAMES[name]] if name in TRL_NAMES else []
    near = near or [option for option in known if option.rpartition(".")[2] == last and option != name][:3]
    near = near or difflib.get_close_matches(name, known, 1, NEAR)
    near = near or [o for o in known if o.rpartition(".")[2] in difflib.get_close_matches(last, _lasts(known), 1, 0.75)]
    near = [option for option in near if not name.startswith(f"{option}.")]
    hint = f"; did you mean {_either([f'--{option}' for option in near[:3]])}?" if near else ""
    return f"--{name}{_place(name, files)}: no such option{hint or ' (see --help)'}"


def _lasts(known: list[str]) -> list[str]:
    return [option.rpartition(".")[2] for option in known]


def _place(name: str, files: dict[str, dict]) -> str:
    """The file that sets an option, as `` in FILE``, or an empty string."""
    for file, content in files.items():
        found: Any = content
        for part in name.split("."):
            if isinstance(found, dict) and part not in found and isinstance(found.get("init_args"), dict):
                found = found["init_args"]
            if not isinstance(found, dict) or part not in found:
                break
            found = found[part]
        else:
            return f" in {file}"
    return ""


def _no_such_command(name: str) -> str:
    near = difflib.get_close_matches(name, SUBCOMMANDS, 1, NEAR)
    hint = f"; did you mean {near[0]}?" if near else f"; use {_either(SUBCOMMANDS)}"
    return f"{name}: no such subcommand{hint}"


def _expected(causes: list[str], known: list[str], classes: list[str]) -> str:
    types = [match[1] for cause in causes if (match := re.match(r"Expected a <class '([\w.]+)'>", cause))]
    literals = [item for cause in causes for item in _literals(cause)]
    named = next((m[1] for cause in causes if (m := re.match(r"Expected a dot import path string: (.*)", cause))), None)
    if named is not None:
        known_classes = _class_names()
        near = difflib.get_close_matches(named, known_classes, 1, VERY_NEAR)
        near = near or difflib.get_close_matches(named, known_classes, 3, NEAR)
        names = (
            f"one of {', '.join(dict.fromkeys(literals))}, or a class as module.Class"
            if literals
            else "it as module.Class"
        )
        hint = f"did you mean {_either(near)}?" if near else f"set {names}"
        return f"there is no class {named}; {hint}"
    if literals:
        return f"expected one of {', '.join(dict.fromkeys(literals))}"
    if types:
        return f"expected {_either([_type_name(name) for name in types])}"
    words = "; ".join(dict.fromkeys(causes)) or "the value can't be used"
    return f"{words} (in {classes[-1]})" if classes and "No module named" not in words else words


def _literals(cause: str) -> list[str]:
    match = re.match(r"Expected a typing.Literal\[(.*)\]", cause)
    return [item.strip().strip("'\"") for item in match[1].split(",")] if match else []


def _type_name(name: str) -> str:
    return {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text"}.get(
        name, name.rpartition(".")[2]
    )


def _class_names() -> list[str]:
    """Names of imported classes that an option may be set to."""
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.loggers import Logger
    from torch.optim import Optimizer

    from lightning_grpo.rewards import Reward
    from lightning_grpo.training.schedules import Schedule

    found: set[str] = set()
    queue: list[type] = [Callback, Logger, Optimizer, Reward, Schedule]
    while queue:
        kinds: list[type] = queue.pop().__subclasses__()
        queue += kinds
        found.update(kind.__name__ for kind in kinds if not kind.__name__.startswith("_"))
    return sorted(found)


def _options(parser: ArgumentParser, group: str | None, class_path: str | None) -> Iterator[str]:
    """Dotted names of all options of the parser and of the configured classes for model, data and rollout."""
    defaults = {
        "model": "lightning_grpo.module.GRPOModule",
        "data": "lightning_grpo.data.PromptDataModule",
        "rollout": "lightning_grpo.rollout.VLLMRollout",
    }
    if group in defaults and class_path:
        defaults[group] = class_path
    for action in parser._actions:
        yield from (option.removeprefix("--") for option in action.option_strings if option.startswith("--"))
    for key, path in defaults.items():
        try:
            inner = ArgumentParser(exit_on_error=False)
            inner.add_class_arguments(import_object(path), key, fail_untyped=False, sub_configs=True)
        except Exception:  # suggestions only
            continue
        for action in inner._actions:
            yield from (o.removeprefix("--") for o in action.option_strings if o.startswith(f"--{key}."))


def _either(options: list[str]) -> str:
    options = list(dict.fromkeys(options))
    return " or ".join([", ".join(options[:-1]), options[-1]] if len(options) > 1 else options)
