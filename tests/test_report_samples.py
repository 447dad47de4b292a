"""The samples of a report: what the page contains of them."""

import base64
import itertools
import json
import re
import zlib
from html.parser import HTMLParser

import pytest
from conftest import char_tokenizer
from sample_files import HOSTILE, rows, sample, write_samples

from lightning_grpo.record import read_run
from lightning_grpo.report import samples
from lightning_grpo.report.page import page


def contents(html):
    """What `samples.js` unpacks: an object per run."""
    (packed,) = re.findall(r'id="samples-data">([^<]*)</script>', html)
    return json.loads(zlib.decompress(base64.b64decode(packed)))


def groups(run):
    return list(zip(run["step"], run["group"], strict=True))


class Tags(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, attributes))


def test_nothing_that_a_model_wrote_is_part_of_the_html(tmp_path):
    write_samples(tmp_path / "tame", [sample(1, 0, 0, **{"extra/tame": "a", "rewards/tame": 1.0})])
    hostile = [
        sample(1, 0, i, prompt=text, completion=text, source=text, finish_reason=text)
        | {"extra/<b>": text, "rewards/</script>": 1.0}
        for i, text in enumerate(HOSTILE.values())
    ]
    write_samples(tmp_path / "hostile", hostile)
    html = page([read_run(tmp_path / "hostile")])
    assert Tags(html).found == Tags(page([read_run(tmp_path / "tame")])).found
    (run,) = contents(html)
    assert run["completion"] == list(HOSTILE.values())
    assert [run["prompts"][i] for i in run["prompt"]] == list(HOSTILE.values())
    assert list(run["extras"]) == ["<b>"]
    assert list(run["rewards"]) == ["</script>"]


def test_a_page_has_at_most_the_given_number_of_samples_in_whole_groups_over_all_steps(tmp_path):
    write_samples(tmp_path, list(rows(20, groups=4, size=4)))
    html = samples.render([read_run(tmp_path)], 50)
    (run,) = contents(html)
    assert "48 of 320 samples" in html
    assert all(groups(run).count(group) == 4 for group in groups(run))
    steps = sorted(set(run["step"]))
    assert (steps[0], steps[-1]) == (1, 20)
    assert max(after - before for before, after in itertools.pairwise(steps)) <= 2


def test_all_samples_are_there_if_they_are_few(tmp_path):
    write_samples(tmp_path, list(rows(3)))
    html = samples.render([read_run(tmp_path)])
    assert len(contents(html)[0]["step"]) == 24
    assert "whole groups" not in html


def test_groups_that_a_finding_names_are_among_the_samples(tmp_path):
    write_samples(tmp_path, list(rows(20, groups=4, size=4)))
    named = {"step": 7, "rollout": 7, "group": 2, "index": 1}
    (tmp_path / "findings.jsonl").write_text(
        json.dumps({"step": 9, "rule": "x", "samples": [named, "damaged", {"step": []}]}) + "\n"
    )
    (run,) = contents(samples.render([read_run(tmp_path)], 8))
    assert set(groups(run)) == {(7, 2), (1, 0)}


def test_long_completions_lower_the_number_of_samples(tmp_path, monkeypatch):
    write_samples(tmp_path, [sample(step, 0, 0, completion="x" * 1000) for step in range(1, 101)])
    monkeypatch.setattr(samples, "SIZE", 20_000)
    (run,) = contents(samples.render([read_run(tmp_path)]))
    assert 10 <= len(run["step"]) < 20


def test_several_runs_share_the_number_of_samples(tmp_path):
    for name in ("a", "b"):
        write_samples(tmp_path / name, list(rows(10)))
    runs = contents(samples.render([read_run(tmp_path / name) for name in ("a", "b")], 40))
    assert [(run["name"], len(run["step"])) for run in runs] == [("a", 20), ("b", 20)]


def test_figures_that_json_lacks_are_named(tmp_path):
    rewards = [float("nan"), float("inf"), -float("inf"), None, 0.123456789]
    write_samples(tmp_path, [sample(1, 0, i, reward=reward) for i, reward in enumerate(rewards)])
    (run,) = contents(samples.render([read_run(tmp_path)]))
    assert run["reward"] == ["NaN", "Infinity", "-Infinity", None, 0.12346]


def test_log_probs_come_with_the_texts_of_their_tokens(tmp_path):
    tokenizer = char_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    ids = tokenizer("a b")["input_ids"]
    logged = {"completion_ids": ids, "engine_logprobs": [-0.5, -1.25, None], "trainer_logprobs": None}
    write_samples(tmp_path, [sample(1, 0, 0, **logged)])
    (tmp_path / "run.json").write_text(json.dumps({"model": str(tmp_path / "model")}))
    (run,) = contents(samples.render([read_run(tmp_path)]))
    assert run["logprobs"] == {"engine": [[-500, -1250, None]]}
    assert [run["token_texts"][str(token)] for token in run["completion_ids"][0]] == ["a", " ", "b"]


def test_what_the_policy_did_not_sample_is_set_apart_and_not_counted(tmp_path):
    dialogue = {"completion": "hi🙂<ok>bye", "part_lengths": [3, 4, 3], "sampled": [True, False, True]}
    write_samples(tmp_path, [sample(1, 0, 0, **dialogue), sample(1, 0, 1)])
    (run,) = contents(samples.render([read_run(tmp_path)]))
    assert run["part_lengths"] == [[4, 4, 3], None], "JavaScript counts an emoji as two"
    assert run["tokens"] == [2, 3]


@pytest.mark.parametrize("content", [b"", b"PAR1 half-written"])
def test_a_damaged_file_is_left_out_with_a_warning(tmp_path, content):
    write_samples(tmp_path, list(rows(2)))
    write_samples(tmp_path, list(rows(2)), number=1).write_bytes(content)
    html = samples.render([read_run(tmp_path)])
    assert len(contents(html)[0]["step"]) == 16
    assert "rank0-000001.parquet was left out" in html


@pytest.mark.parametrize("limit", [0, 100])
def test_there_is_no_section_without_samples(tmp_path, limit):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    if not limit:
        write_samples(tmp_path, list(rows(2)))
    assert samples.render([read_run(tmp_path)], limit) == ""
