"""What is imported when: help and single rooms of the package load nothing that they don't need."""

import subprocess
import sys

import pytest

import lightning_grpo
import lightning_grpo.configure

HEAVY = ("torch", "lightning", "transformers", "peft", "matplotlib", "httpx", "vllm")


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import lightning_grpo", HEAVY),
        ("from lightning_grpo.configure.command import parser; parser().format_help()", HEAVY),
        ("from lightning_grpo.cli.export import parser; parser().format_help()", HEAVY),
        ("from lightning_grpo.objective import policy_loss", HEAVY[1:]),
        ("from lightning_grpo import GRPOModule", ("lightning_grpo.configure", "lightning_grpo.cli", "vllm")),
    ],
)
def test_nothing_is_imported_before_it_is_needed(statement, absent):
    code = f"{statement}\nimport sys\nprint(*(name for name in {absent} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("package", [lightning_grpo, lightning_grpo.configure], ids=lambda package: package.__name__)
def test_every_public_name_is_there_and_others_are_not(package):
    for name in package.__all__:
        assert getattr(package, name) is not None
        assert name in dir(package)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018
