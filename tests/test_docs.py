"""The code blocks of the README and the docs: commands are parsed by the real command line, YAML is loaded as options,
Python is compiled and its imports resolved."""

import ast
import importlib
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from lightning_grpo.cli import convert, data, export, main
from lightning_grpo.configure import command as configure
from lightning_grpo.diagnosis import command as diagnosis
from lightning_grpo.report import command as report

ROOT = Path(__file__).parent.parent
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    language: str
    text: str
    place: str


def blocks() -> list[Block]:
    found = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text()
        for match in FENCE.finditer(text):
            line = text[: match.start()].count("\n") + 1
            found.append(Block(match[1], match[2], f"{path.name}:{line}"))
    return found


def commands() -> list[tuple[str, list[str]]]:
    """Every command line of lightning-grpo with its place, without the program's name and shell redirections."""
    found = []
    for block in blocks():
        if block.language not in ("bash", "sh", "shell"):
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\||>", line.partition(" #")[0]):
                words = shlex.split(part)
                start = next(
                    (i for i, word in enumerate(words) if word.endswith(("lightning-grpo", "lightning_grpo"))), None
                )
                if start is not None and (start == 0 or words[start - 1] == "-m"):
                    found.append((block.place, words[start + 1 :]))
    return found


def of(language: str) -> list[Block]:
    return [block for block in blocks() if block.language == language]


def ids(value: object) -> str:
    return getattr(value, "place", value if isinstance(value, str) else " ".join(value[:1]))


COMMANDS = commands()
DISTINCT = {tuple(args): (place, args) for place, args in reversed(COMMANDS)}.values()
RUNS = [(place, args) for place, args in DISTINCT if args[0] in ("fit", "validate", "test", "predict")]
OTHERS = [(place, args) for place, args in DISTINCT if (place, args) not in RUNS]
PARSERS = {
    "configure": configure.parser,
    "convert-trl": convert.parser,
    "data": data.parser,
    "diagnose": diagnosis.parser,
    "export": export.parser,
    "report": report.parser,
}
"""The parser of each subcommand that is not LightningCLI's."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the files that the docs name, apart from their own blocks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    for name in ("my_run.yaml", "my.yaml"):
        (tmp_path / name).write_text((ROOT / "configs" / "base.yaml").read_text())
    return tmp_path


@pytest.fixture
def modules(folder, monkeypatch):
    """Writes the Python blocks of a document to the modules that its YAML blocks name."""

    def write(place: str) -> None:
        own = [block.text for block in of("python") if block.place.split(":")[0] == place.split(":")[0]]
        for name in ("mine", "my_project", "my_environments"):
            monkeypatch.delitem(sys.modules, name, raising=False)
            (folder / f"{name}.py").write_text("\n".join(own))
        for block in of("yaml"):
            if block.text.startswith("# mine.yaml"):
                (folder / "mine.yaml").write_text(block.text)
        importlib.invalidate_caches()

    return write


def assert_composes(args: list[str]) -> None:
    """The parser of ``fit`` accepts the options, whose classes and files exist."""
    with pytest.raises(SystemExit) as stop:
        main([*args, "--print_config"])
    assert stop.value.code in (0, None)


@pytest.mark.parametrize(("place", "args"), RUNS, ids=ids)
def test_the_options_of_runs_exist(place, args, modules, capsys):
    modules(place)
    assert_composes(args)
    assert "class_path" in capsys.readouterr().out


@pytest.mark.parametrize(("place", "args"), OTHERS, ids=ids)
def test_the_options_of_other_commands_exist(place, args, folder):
    options, further = PARSERS[args[0]]().parse_known_args(args[1:])
    assert vars(options)
    if args[0] == "data":
        assert_composes(["predict", "--config", "my_run.yaml", *further])
    else:
        assert further == []


@pytest.mark.parametrize("block", of("yaml"), ids=ids)
def test_yaml_is_a_configuration(block, folder, modules, capsys):
    modules(block.place)
    (folder / "block.yaml").write_text(block.text)
    assert_composes(["fit", "--config", "configs/base.yaml", "--config", "block.yaml"])
    assert "class_path" in capsys.readouterr().out


@pytest.mark.parametrize("block", of("python"), ids=ids)
def test_python_compiles_and_its_imports_exist(block):
    tree = ast.parse(block.text)
    assert tree.body
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "lightning_grpo":
            module = importlib.import_module(node.module)
            assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def test_every_document_is_read():
    assert {"README.md", "data.md", "export.md"} <= {place.split(":")[0] for place, _ in COMMANDS}
    assert {args[0] for _, args in COMMANDS} == {"fit", "validate", *PARSERS}
