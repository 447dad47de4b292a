"""What the package says of itself: its dependencies."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMES = {"pyyaml": "yaml"}
"""Import names of distributions that have another name there."""
# matplotlib's, tensorboard's and reasoning-gym's users are configure --plot, a logger and a reward; triton comes with
# torch's CUDA builds alone, and vllm is an extra
OPTIONAL = {"triton", "vllm"}
BY_CLASS_PATH = {"tensorboard"}


def declared() -> set[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    distributions = [re.split(r"[\[<>=~! ]", line)[0].lower() for line in project["dependencies"]]
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
