"""The package's imports, those within functions included, obey the table in CONTRIBUTING.md."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lightning_grpo"
LIBRARIES = {"torch", "lightning", "transformers", "peft", "vllm"}
"""Libraries that a row must name before its modules may import them."""


def table() -> dict[str, set[str]]:
    """For each package or module at the top of the package, in the table's order: what it may import."""
    rows, above = {}, set()
    lines = (ROOT / "CONTRIBUTING.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.endswith("| may import |"))
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        packages, _, imports = (cell.strip() for cell in line.strip("|").split(" | "))
        names = {name.strip("/").removesuffix(".py") for name in re.findall(r"`([^`]+)`", packages)}
        allowed = set(re.findall(r"`([^`]+)`", imports)) | (above if "all above" in imports else set())
        assert allowed - LIBRARIES <= above, f"{packages} may import what comes below it: {allowed - LIBRARIES - above}"
        rows |= dict.fromkeys(names, allowed)
        above = above | names
    return rows


def place(module: str) -> str:
    """The package or module at the top of lightning_grpo, or the library, that ``module`` belongs to."""
    top, *rest = module.split(".")
    if top != PACKAGE.name:
        return top
    return rest[0] if rest else "__init__"


def imports(path: Path) -> set[str]:
    """Names of all modules that a file imports; a name imported from the package itself may be a module of it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            inner = node.module == PACKAGE.name
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if inner else {node.module}
    return found


FILES = sorted(PACKAGE.rglob("*.py"))
TOP = {path.stem if path.suffix else path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}


def test_the_table_lists_every_package_and_module():
    assert set(table()) == TOP - {"__pycache__"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_what_the_table_allows(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    used = {place(module) for module in imports(path)} - {own}
    assert used & (TOP | LIBRARIES) <= table()[own]


def test_the_command_line_alone_imports_configure():
    assert {name for name, allowed in table().items() if "configure" in allowed} <= {"cli", "__init__", "__main__"}
