"""What the package says of itself: its dependencies."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import pytest

from lightning_grpo.configure import plot
from lightning_grpo.data.sources import read
from lightning_grpo.errors import UserError
from lightning_grpo.report import command as report
from lightning_grpo.rewards.reasoning_gym import _scorer

ROOT = Path(__file__).parents[1]
NAMES = {"pyyaml": "yaml"}
"""Import names of distributions that have another name there."""
OPTIONAL = {"triton", "antlr4", "latex2sympy2_extended"}
"""Come with torch's CUDA builds, or with math-verify."""
BY_CLASS_PATH = {"tensorboard"}


EXTRAS = {
    "vllm": "vllm",
    "datasets": "datasets",
    "reasoning-gym": "reasoning_gym",
    "plot": "matplotlib",
    "report": "plotly",
    "bitsandbytes": "bitsandbytes",
    "judge": "openai",
    "verifiers": "verifiers",
}


def declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    distributions = [re.split(r"[\[<>=~! ]", line)[0].lower() for line in lines]
    return {NAMES.get(name, name).replace("-", "_") for name in distributions}


def imported() -> set[str]:
    found = set()
    for path in (ROOT / "lightning_grpo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"lightning_grpo"}


def test_every_imported_package_is_declared_and_every_declared_one_imported():
    assert imported() - OPTIONAL == declared() - BY_CLASS_PATH


@pytest.mark.parametrize(
    ("extra", "use"),
    [
        ("datasets", lambda path: read("owner/name", args={}, size=None, seed=0)),
        ("datasets", lambda path: read(str(path), args={}, size=None, seed=0)),
        ("reasoning-gym", lambda path: read("reasoning_gym:chain_sum", args={}, size=1, seed=0)),
        ("reasoning-gym", lambda path: _scorer("chain_sum", "{}")),
        ("verifiers", lambda path: read("verifiers:game", args={}, size=1, seed=0)),
        ("plot", lambda path: plot.draw(None, path / "plan")),
        ("report", lambda path: report.main([str(path)])),
    ],
    ids=["hub", "saved data set", "source", "reward", "verifiers", "plot", "report"],
)
def test_a_missing_extra_is_named(monkeypatch, tmp_path, extra, use):
    _scorer.cache_clear()
    monkeypatch.setitem(sys.modules, EXTRAS[extra], None)
    with pytest.raises(UserError, match=rf"needs {EXTRAS[extra]}.* pip install 'lightning-grpo\[{extra}\]'"):
        use(tmp_path)
