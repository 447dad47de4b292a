"""`lightning-grpo diagnose`, on runs of this package and on logs of other trainers."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from histories import INFO, healthy

from lightning_grpo.cli import main
from lightning_grpo.diagnosis.inputs import flatten, own_name, read_log

CONFIG = {
    "model": {
        "class_path": "lightning_grpo.GRPOModule",
        "init_args": {
            "num_generations": 8,
            "objective": {"loss_type": "dr_grpo", "beta": None},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 3e-6}},
        },
    },
    "trainer": {"accumulate_grad_batches": 4},
}


def metrics(steps: int, **changes: float) -> list[dict[str, float]]:
    """A healthy run, in which ``changes`` apply from step 30 on."""
    random = np.random.default_rng(0)
    return [{"step": n, **healthy(n, random), **(changes if n >= 30 else {})} for n in range(1, steps + 1)]


def write_run(folder: Path, lines: list[dict[str, float]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"format": 1, **INFO}))
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    samples = [
        {"step": n, "rollout": n - 1, "group": group, "index": index, "reward": float(group == 1 and index == 2),
         "truncated": False, "completion_ids": [1, 2]}
        for n in range(1, len(lines) + 1) for group in range(2) for index in range(4)
    ]  # fmt: skip
    (folder / "samples").mkdir()
    pq.write_table(pa.Table.from_pylist(samples), folder / "samples" / "rank0-000000.parquet")
    return folder


def diagnose(capsys, *args: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        main(["diagnose", *args])
    return int(end.value.code), capsys.readouterr().out


def test_a_healthy_run_has_no_findings(tmp_path, capsys):
    run = write_run(tmp_path / "logs" / "version_0", metrics(60))
    code, out = diagnose(capsys, str(tmp_path))
    assert code == 0
    assert out.splitlines()[0] == f"{run}: 60 steps up to step 60, no findings"
    assert "held_out_falls: the log has no val/pass@1 or val/reward" in out


def test_a_finding_has_samples_and_a_change_in_the_runs_own_values(tmp_path, capsys):
    run = write_run(tmp_path / "run", metrics(60, frac_reward_zero_std=1.0, **{"groups/all_wrong": 0.9}))
    code, out = diagnose(capsys, str(run), "--json")
    (finding,) = json.loads(out)["findings"]
    assert code == 1
    assert (finding["rule"], finding["severity"]) == ("dead_groups", "critical")
    assert finding["change"] == {"model.num_generations": 16, "trainer.accumulate_grad_batches": 8}
    # the group whose rewards are all equal
    assert finding["samples"] == [{"step": finding["step"], "rollout": finding["step"] - 1, "group": 0, "index": 0}]
    assert finding["evidence"]["frac_reward_zero_std"][-1] == [finding["step"], 1.0]


def test_ignored_rules(tmp_path, capsys):
    run = write_run(tmp_path / "run", metrics(60, frac_reward_zero_std=1.0))
    assert diagnose(capsys, str(run), "--ignore", "dead_groups")[0] == 0


def test_recorded_findings_of_the_users_own_rules_are_shown(tmp_path, capsys):
    run = write_run(tmp_path / "run", metrics(30))
    line = {"rule": "mine", "severity": "critical", "step": 7, "message": "my own finding", "change": {}}
    (run / "findings.jsonl").write_text(json.dumps(line) + "\n")
    code, out = diagnose(capsys, str(run))
    assert code == 1 and "critical mine, step 7: my own finding" in out


def collapse(n: int) -> dict[str, float]:
    return {"entropy": 1.5 * 0.75**n, "reward": 0.2 + 0.02 * (n % 3)} if n > 20 else {"entropy": 1.5, "reward": 0.2}


def test_a_log_of_trl(tmp_path, capsys):
    """TRL logs every tenth step, and evaluations as lines of their own."""
    history = [{"step": 10 * n, "epoch": 0.1, "learning_rate": 1e-5, **collapse(n)} for n in range(1, 41)]
    history += [{"step": 400, "eval_reward": 0.2}, {"step": 400, "train_runtime": 10.0, "train_loss": 0.0}]
    checkpoint = tmp_path / "out" / "checkpoint-400"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": history, "global_step": 400}))
    for path in (tmp_path / "out", checkpoint, checkpoint / "trainer_state.json"):
        code, out = diagnose(capsys, str(path))
        assert code == 1
        assert "critical entropy_collapse" in out and "set learning_rate=3.3e-06" in out
        assert "engine_mismatch, " not in out.split("not applied:")[0]


def test_a_csv_with_names_of_verl(tmp_path, capsys):
    path = tmp_path / "verl.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["Step", "run-7 - actor/entropy", "run-7 - critic/score/mean", "note"])
        writer.writeheader()
        for n in range(1, 41):
            entropy, reward = collapse(n).values()
            writer.writerow(dict(zip(writer.fieldnames, (n, entropy, reward, "text"), strict=True)))
    code, out = diagnose(capsys, str(path))
    assert code == 1 and "critical entropy_collapse" in out and "40 steps up to step 40" in out


def test_several_runs(tmp_path, capsys):
    paths = [write_run(tmp_path / name, metrics(30)) for name in "ab"]
    assert len(diagnose(capsys, *map(str, paths), "--json")[1].splitlines()) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist; name"), ("", "has no metrics; name"), ("reward;entropy\n1;2\n", "has no metrics; name")],
    ids=["no file", "empty", "semicolons"],
)
def test_files_without_metrics(tmp_path, capsys, content, message):
    path = tmp_path / "log.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SystemExit) as end:
        main(["diagnose", str(path)])
    assert end.value.code == 1 and f"error: {path} {message}" in capsys.readouterr().err


def test_an_unknown_rule_is_an_error(tmp_path, capsys):
    run = write_run(tmp_path / "run", metrics(3))
    with pytest.raises(SystemExit):
        main(["diagnose", str(run), "--ignore", "ded_groups"])
    assert "error: --ignore names 'ded_groups'; set names of rules: clipping" in capsys.readouterr().err


def test_damaged_lines_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "reward": 0.1}\n{"step": 2, "rew')
    log = read_log(path)
    assert log.lines == [{"step": 1.0, "reward": 0.1}]
    assert log.warnings == ["line 2 was left out: it is damaged or half-written"]


def test_names_and_options():
    assert [own_name(name) for name in ("train/reward", "eval_reward", "actor/lr", "reward")] == [
        "reward", "val/reward", "learning_rate", "reward",
    ]  # fmt: skip
    options = flatten(CONFIG)
    assert options["model.optimizer.lr"] == 3e-6 and options["trainer.accumulate_grad_batches"] == 4


def test_it_imports_neither_torch_nor_lightning(tmp_path):
    run = write_run(tmp_path / "run", metrics(12))
    code = (
        "import sys\nfrom lightning_grpo.cli import main\n"
        f"try:\n    main(['diagnose', {str(run)!r}])\nexcept SystemExit as end:\n    print('code', end.code)\n"
        "print(sorted({'torch', 'lightning', 'transformers'} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-2:] == ["code 0", "[]"]
