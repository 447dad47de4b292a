"""``lightning-grpo data inspect`` and ``data pass-rate``."""

import json
from itertools import combinations
from pathlib import Path

import pytest

from lightning_grpo.cli import main
from lightning_grpo.cli.data.pass_rate import different_share, verdict, write
from lightning_grpo.configure.prompts import prompt_statistics
from lightning_grpo.data import PromptDataModule

ROWS = [
    {"prompt": "2 + 2 =", "answer": "4"},
    {"prompt": "1 + 1 =\x0b", "answer": "2"},
    {"prompt": "1 + 1 =\x0b", "answer": "2"},
    {"prompt": "10 + 10 + 10 + 10 =", "answer": "40"},
]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def config(file, model, tmp_path, **data):
    path = tmp_path / "run.yaml"
    values = {
        "seed_everything": 0,
        "trainer": {"accelerator": "cpu", "devices": 1, "default_root_dir": str(tmp_path), "precision": "32-true"},
        "model": {
            "class_path": "lightning_grpo.GRPOModule",
            "init_args": {
                "model": model,
                "rewards": [{"class_path": "lightning_grpo.rewards.PrefixMatch"}],
                "num_generations": 2,
                "micro_batch_size": 2,
                "max_prompt_length": 12,
                "max_completion_length": 4,
            },
        },
        "data": {
            "class_path": "lightning_grpo.PromptDataModule",
            "init_args": {"source": str(file), "prompts_per_rollout": 2} | data,
        },
        "rollout": {"class_path": "lightning_grpo.rollout.HFRollout"},
    }
    path.write_text(json.dumps(values))
    return str(path)


def test_a_csv_file_is_data_even_if_it_is_yaml(file, tmp_path, tiny_model_path, capsys):
    table = tmp_path / "a.csv"
    table.write_text("prompt,answer\n1 + 7 =,8\n")
    main(["data", "inspect", str(table), "--model", tiny_model_path])
    assert f"{table}, line 2" in capsys.readouterr().out
    main(["data", "inspect", config(file, tiny_model_path, tmp_path, validation_source=str(table))])
    assert "can score all rows" in capsys.readouterr().out


# ── inspect ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_inspect_shows_rows_as_rendered_lengths_and_duplicates(file, tiny_model_path, capsys):
    main(["data", "inspect", str(file), "--model", tiny_model_path, "--data.chat", "true", "--rows", "2"])
    out = capsys.readouterr().out
    assert f"{file}, line 2, 10 tokens\n" in out
    assert "<user>1 + 1 =\\x0b<assistant>" in out and "\x0b" not in out
    assert "answer: 4" in out and "answer: 40" not in out
    assert "tokens     min 9 p10 10 median 10 p90 21 p99 21 max 21; 0 of 4 prompts (0.0%) exceed" in out
    assert "duplicates 1 of 4 training prompts repeat an earlier one" in out


def test_inspect_checks_a_configuration(file, tiny_model_path, tmp_path, capsys):
    path = config(file, tiny_model_path, tmp_path)
    main(["data", "inspect", path, "--rows", "1"])
    out = capsys.readouterr().out
    assert "1 of 4 prompts (25.0%) exceed max_prompt_length = 12, and are dropped or refused (data.overlong)" in out
    assert "rewards    prefix_match can score all rows" in out
    assert not (tmp_path / "logs").exists()
    file.write_text(file.read_text() + '{"prompt": "3 + 3 =", "answer": null}\n')
    with pytest.raises(SystemExit) as stop:
        main(["data", "inspect", path])
    assert stop.value.code == 1
    assert "a.jsonl, line 5: PrefixMatch.answer is 'answer', which is None" in capsys.readouterr().err


# ── pass-rate ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_pass_rate_writes_prompts_that_can_be_trained_on(file, tiny_model_path, tmp_path, capsys):
    path, out = config(file, tiny_model_path, tmp_path), tmp_path / "rates.jsonl"
    main(["data", "pass-rate", path, "--samples", "4", "--rows", "2", "--out", str(out)])
    printed = capsys.readouterr().out
    assert f"2 prompts with their pass rates: {out}" in printed
    assert "groups whose rewards are expected to differ: " in printed and "with num_generations 4" in printed
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert all({"prompt", "answer", "pass_rate", "mean_reward", "pass@2", "pass@4"} < row.keys() for row in rows)
    assert {row["samples"] for row in rows} == {4} and {row["prompt"] for row in rows} <= {r["prompt"] for r in ROWS}


def test_pass_rate_samples_episodes_of_an_environment(tiny_model_path, tmp_path, capsys):
    path = config("hidden_numbers", tiny_model_path, tmp_path, source_args={"template": "hi"}, size=6, chat=True)
    run, out = json.loads(Path(path).read_text()), tmp_path / "rates.jsonl"
    game = {"class_path": "lightning_grpo.environments.GuessNumber", "init_args": {"max_turns": 2}}
    run["model"]["init_args"] |= {"rewards": [], "environment": game, "max_completion_length": 10}
    Path(path).write_text(json.dumps(run))
    main(["data", "pass-rate", path, "--samples", "4", "--rows", "2", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "pass rate 0.0% over 4 completions per prompt" in printed
    assert "raise model.max_completion_length, or max_turn_tokens of the environment" in printed
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["prompt"] for row in rows] == [[{"role": "user", "content": "hi"}]] * 2
    assert all({"low", "high", "answer", "pass_rate", "pass@4"} < row.keys() for row in rows)


def measured(*rights, totals=None, truncated=False):
    return [
        {
            "row": {"prompt": f"question {i}", "answer": i},
            "right": list(map(bool, right)),
            "totals": list(map(float, right)) if totals is None else totals,
            "truncated": [truncated] * len(right),
            "completion": "so \x1b[31m",
        }
        for i, right in enumerate(rights)
    ]


@pytest.mark.parametrize("totals", [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0], [0.5, 1.0, 0.5, 0.0, 1.0]], ids=str)
@pytest.mark.parametrize("G", [2, 3, 5])
def test_the_share_of_groups_with_different_rewards_is_that_over_all_groups(totals, G):
    groups = list(combinations(totals, G))
    assert different_share(totals, G) == pytest.approx(sum(len(set(group)) > 1 for group in groups) / len(groups))


@pytest.mark.parametrize("name", ["rates.jsonl", "rates.parquet"])
def test_written_prompts_are_read_by_runs_and_by_configure(name, tmp_path, tokenizer, tiny_model_path):
    write(measured([1, 0, 0, 0], [1, 1, 1, 1]), tmp_path / name)
    data = PromptDataModule(str(tmp_path / name), tokenizer=tokenizer, prompts_per_rollout=1)
    data.setup()
    assert [prompt.columns["pass_rate"] for prompt in data.train] == [0.25, 1.0]
    assert [prompt.columns["pass@2"] for prompt in data.train] == [0.5, 1.0]
    assert prompt_statistics(str(tmp_path / name), tiny_model_path).pass_rates == (0.25, 1.0)


@pytest.mark.parametrize(
    ("prompts", "G", "expected"),
    [
        (measured([1, 0, 1, 0]), 2, ["GRPO can learn from these prompts: 67% of the groups of 2 carry a gradient"]),
        (
            measured(*[[0] * 8] * 3, [1] + [0] * 7),
            2,
            ["GRPO can learn only slowly", "only 6% of the groups of 2", "use easier prompts", "pass_rate is between"],
        ),
        (measured([1, 0, 0, 0, 0, 0, 0, 0]), 2, ["set model.num_generations to 4, for which 50% of the groups differ"]),
        (measured([1] * 4), 4, ["GRPO can hardly learn", "use harder prompts", "check that the reward finds"]),
        (
            measured([0] * 4, truncated=True),
            4,
            ["100% of the prompts are never solved", "raise model.max_completion_length: 100%", r"'so \\x1b[31m'"],
        ),
    ],
    ids=["enough", "few", "larger groups", "solved", "truncated"],
)
def test_the_verdict_names_what_to_change(prompts, G, expected):
    text = "\n".join(verdict(prompts, G, "rates.jsonl"))
    assert [part for part in expected if part not in text] == []


# ── Wrong inputs ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "the following arguments are required: {inspect,pass-rate}"),
        (["inspect", "a.jsonl"], "a.jsonl is rendered and encoded for a model; set --model"),
        (["inspect", "no.yaml"], "no.yaml is not a file; name a configuration"),
        (["pass-rate", "a.jsonl"], "a.jsonl is not a configuration of fit (.yaml)"),
        (["pass-rate", "RUN", "--samples", "0"], "'0' is not a count; set 1 or more"),
        (["pass-rate", "RUN", "--samples", "1"], "--samples is 1, fewer than model.num_generations = 2"),
        (["pass-rate", "RUN", "--out", "rates.csv"], "--out is rates.csv; set a .jsonl or .parquet file"),
        (["pass-rate", "RUN", "--out", "no/rates.jsonl"], "there is no folder no; create it"),
        (["pass-rate", "RUN", "--sample", "4"], "--sample"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_inputs_end_with_a_message(args, message, file, tiny_model_path, tmp_path, capsys):
    run = config(file, tiny_model_path, tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["data", *(run if arg == "RUN" else arg for arg in args)])
    assert stop.value.code not in (0, None)
    assert message in capsys.readouterr().err
