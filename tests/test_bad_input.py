"""Bad input on the command line ends with one line that names option or file, value, cause and remedy.

A row is what is wrong with a run that is otherwise `configs/smoke.yaml`, and what its message must contain. ``{tmp}``
in an option is the test's folder, where ``files`` are written first.
"""

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from lightning_grpo.cli import main

ROOT = Path(__file__).parent.parent


@dataclass
class Row:
    name: str
    options: list[str]
    fragments: list[str]
    command: str = "fit"
    files: dict[str, bytes] = field(default_factory=dict)


OPTIONS = [
    Row("one generation", ["--model.num_generations", "1"], ["num_generations is 1", "set 2 or more"]),
    Row("no prompts per rollout", ["--data.prompts_per_rollout", "0"], ["prompts_per_rollout is 0", "set 1 or more"]),
]

DATA: list[Row] = []

MODEL: list[Row] = []


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    # Lightning's log handler keeps the stderr of the first test
    monkeypatch.setattr("logging.raiseExceptions", False)


@pytest.mark.parametrize("row", [*OPTIONS, *DATA, *MODEL], ids=lambda row: row.name)
def test_bad_input_ends_with_one_line(row, tmp_path, capsys):
    for name, content in row.files.items():
        (tmp_path / name).write_bytes(content)
    options = [option.replace("{tmp}", str(tmp_path)) for option in row.options]
    base = ["--config", str(ROOT / "configs/smoke.yaml"), "--trainer.default_root_dir", str(tmp_path / "runs")]
    with pytest.raises(SystemExit) as stop:
        main([row.command, *base, "--trainer.max_steps", "1", *options])
    assert stop.value.code in (1, 2)
    err = capsys.readouterr().err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and err.rstrip().endswith(errors[0]), err
    assert "Traceback" not in err
    for fragment in row.fragments:
        assert fragment in errors[0]
