"""The benchmark of the diagnosis, end to end: real runs with a fault are reported, and a healthy one is not."""

from dataclasses import replace
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    """The benchmark's modules; the one of its name is `diagnosis`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        import diagnosis
        import diagnosis_cases
        import diagnosis_runs

        yield diagnosis, diagnosis_cases, diagnosis_runs


@pytest.fixture(scope="module")
def models(benchmark, tmp_path_factory) -> Path:
    """A model that answers some prompts right."""
    *_, runs = benchmark
    path = tmp_path_factory.mktemp("models")
    runs.write_prompts(path)
    runs.pretrain(path / "base", noise=0.12, steps=100)
    return path


def report(benchmark, models: Path, folder: Path, kind: str, name: str, **changes):
    """What the benchmark reports about the run of this name, made shorter."""
    diagnosis, cases, _ = benchmark
    run = replace(next(run for run in getattr(cases, kind) if run.name == name), **changes)
    diagnosis.train_run(run, models, folder)
    return run, diagnosis.diagnose(run, folder)


def test_a_fault_that_the_rules_name(benchmark, models, tmp_path):
    run, found = report(benchmark, models, tmp_path, "FAULTS", "completions cut too short", at=12, steps=20)
    assert found.named(run.names)[0] == "truncation"
    assert found.steps(run.names) <= 10


def test_a_fault_that_ends_the_run(benchmark, models, tmp_path):
    run, found = report(benchmark, models, tmp_path, "FAULTS", "NaN in a gradient", at=4, steps=8)
    assert found.named(run.names) == ("nonfinite", 4)
    assert found.refused == 4


def test_a_healthy_run(benchmark, models, tmp_path):
    _, found = report(benchmark, models, tmp_path, "CLEAN", "0/1 reward", steps=16)
    assert not [finding for finding in found.findings if finding[1] == "critical"]
    assert found.refused is None
