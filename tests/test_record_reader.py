"""The reader of a run's folder: resumed runs, damaged files, files of other versions."""

import json
import math
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_grpo.errors import UserError
from lightning_grpo.record import read_run
from lightning_grpo.record.schema import COLUMNS


def write_lines(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))


def write_samples(folder, number, steps, *, rank=0, **columns):
    """Two completions per step, as one rank would write them."""
    rows = [
        {"step": step, "rollout": step // 2, "rank": rank, "group": rank, "index": i, "completion": f"{step}.{i}"}
        for step in steps
        for i in range(2)
    ]
    table = pa.Table.from_pylist(rows, schema=COLUMNS)
    for name, values in columns.items():
        table = table.append_column(name, pa.array(values))
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / "samples" / f"rank{rank}-{number:06d}.parquet")


def write_run(folder, steps, **info):
    write_lines(folder / "run.json", {"format": 1} | info)
    write_lines(folder / "metrics.jsonl", *({"step": step, "time": 0.0, "reward": step / 10} for step in steps))
    write_samples(folder, 0, steps)


def steps_of(run):
    return run.samples(["step"])["step"].to_pylist()


def test_a_resumed_run_has_every_step_once(tmp_path):
    first, second, third = (tmp_path / "logs" / f"version_{n}" for n in (0, 1, 2))
    write_run(first, [1, 2, 3, 4])
    write_run(second, [3, 4, 5], resumed_from={"folder": "../version_0", "step": 2})
    write_run(third, [5, 6], resumed_from={"folder": "../version_1", "step": 4})
    write_lines(first / "findings.jsonl", {"step": 2, "rule": "kept", "change": None}, {"step": 3, "rule": "lost"})
    run = read_run(tmp_path)
    assert run.folder == third
    assert [line["step"] for line in run.metrics] == [1, 2, 3, 4, 5, 6]
    assert steps_of(run) == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    assert run.findings == [{"step": 2, "rule": "kept", "change": None}]
    assert run.warnings == []
    # a run that was resumed from an earlier step than its parent's start has nothing of the parent
    write_run(third, [2, 3], resumed_from={"folder": "../version_1", "step": 1})
    assert steps_of(read_run(third)) == [1, 1, 2, 2, 3, 3]


def test_a_missing_or_circular_parent_is_a_warning_or_an_end(tmp_path):
    write_run(tmp_path / "a", [3], resumed_from={"folder": "../gone", "step": 2})
    run = read_run(tmp_path / "a")
    assert steps_of(run) == [3, 3]
    assert "missing: ../gone" in run.warnings[0]
    write_run(tmp_path / "b", [3], resumed_from={"folder": ".", "step": 2})
    assert steps_of(read_run(tmp_path / "b")) == [3, 3]


def test_damaged_files_are_left_out(tmp_path):
    write_run(tmp_path, [1, 2])
    write_samples(tmp_path, 1, [3])
    write_samples(tmp_path, 2, [4])
    damaged = tmp_path / "samples" / "rank0-000001.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    (tmp_path / "samples" / ".rank0-000003.parquet.part").write_bytes(b"PAR1")
    write_lines(tmp_path / "run.json", "{")
    write_lines(tmp_path / "config.yaml", "a: [")
    write_lines(
        tmp_path / "metrics.jsonl",
        {"step": 1, "time": 0.0, "reward": None},
        "\x00\x00\n",
        "[1]\n",
        {"step": "2"},
        {"step": 2, "val/reward": 0.5},
        '{"step": 3, "rew',
    )
    run = read_run(tmp_path)
    assert math.isnan(run.metrics[0]["reward"])
    assert len(run.metrics) == 1
    assert run.held_out == [{"step": 2, "val/reward": 0.5}]
    assert run.info == run.config == {}
    assert steps_of(run) == [1, 1, 2, 2, 4, 4]
    text = "\n".join(run.warnings)
    assert len(run.warnings) == 7, text
    for name in ("run.json", "config.yaml", "line 2", "line 3", "line 4", "line 6", "rank0-000001.parquet"):
        assert name in text


def test_columns_of_different_files_are_united(tmp_path):
    write_run(tmp_path, [1])
    write_samples(tmp_path, 1, [2], **{"rewards/a": [1.0, None], "extra/x": [1.5, None]})
    write_samples(tmp_path, 0, [2], rank=1, **{"extra/x": ["text", "other"]})
    run = read_run(tmp_path)
    table = run.samples()
    assert table["extra/x"].to_pylist() == [None, None, "1.5", None, "text", "other"]
    assert table["rewards/a"].to_pylist() == [None, None, 1.0, None, None, None]
    assert table["completion"].to_pylist() == ["1.0", "1.1", "2.0", "2.1", "2.0", "2.1"]
    assert run.samples(["completion", "nothing"], steps={1}).to_pydict() == {
        "completion": ["1.0", "1.1"],
        "nothing": [None, None],
    }
    assert run.samples(["rank"], steps=range(2, 9))["rank"].to_pylist() == [0, 0, 1, 1]
    assert run.samples(steps=[]).num_rows == 0
    assert [path.name for path in run.sample_files()] == [
        f"rank{n}.parquet" for n in ("0-000000", "0-000001", "1-000000")
    ]


def test_a_run_without_records_is_read_from_its_csv(tmp_path):
    write_lines(tmp_path / "metrics.csv", "step,reward,val/reward\n", "0,0.5,\n", "1,nan,\n", "1,,0.25\n", "2,0.")
    run = read_run(tmp_path)
    assert [line["step"] for line in run.metrics] == [1, 2, 3]
    assert run.metrics[0] == {"step": 1, "reward": 0.5}
    assert run.held_out == [{"step": 2, "val/reward": 0.25}]
    assert run.samples().schema.names == COLUMNS.names


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"has no metrics\.jsonl, metrics\.csv or run\.json; name the folder of a run"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        read_run(tmp_path / "none")
    for number in (2, 10):
        write_run(tmp_path / "logs" / f"version_{number}", [number])
    assert read_run(tmp_path).folder.name == read_run(tmp_path / "logs").folder.name == "version_10"


def test_a_folder_above_several_runs_names_them(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path / name / "logs" / "version_0", [1])
    with pytest.raises(UserError, match=r"contains several runs; name \S+/a or \S+/b$"):
        read_run(tmp_path)


def test_a_folder_of_trl_names_the_command_that_reads_it(tmp_path):
    (tmp_path / "trainer_state.json").write_text("{}")
    with pytest.raises(UserError, match="`lightning-grpo diagnose` reads"):
        read_run(tmp_path)


def test_reading_needs_no_torch():
    code = "import sys, lightning_grpo.record.reader; sys.exit('torch' in sys.modules or 'lightning' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
