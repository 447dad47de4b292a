"""Several sources with weights, further file formats, and prompts that are stored for later runs."""

import gzip
import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet
import pytest

from lightning_grpo.data import MixtureSampler, PromptDataModule, Source, dataset, encoding, store
from lightning_grpo.data.dataset import DataSetReader
from lightning_grpo.data.prompts import fingerprint
from lightning_grpo.data.stream import Stream
from lightning_grpo.errors import UserError
from lightning_grpo.rewards import Reward, as_rewards, check, compute_rewards
from lightning_grpo.rewards.check import check_rows

ROWS = [{"prompt": f"question {i}", "answer": str(i)} for i in range(5)]


def lines(rows=ROWS):
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(source, tokenizer, **options):
    data = PromptDataModule(source, tokenizer=tokenizer, **{"prompts_per_rollout": 1} | options)
    data.setup()
    return data


def contents(prompts):
    return [(p.index, p.ids, p.messages, p.columns, p.rewards, p.place) for p in prompts]


# ── Formats ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.arrow", "stream.arrow"])
def test_every_format_has_the_same_rows(name, tmp_path, tokenizer):
    path, table = tmp_path / name, pa.Table.from_pylist(ROWS)
    if name == "a.csv.gz":
        text = "prompt,answer\n" + "".join(f"{row['prompt']},{row['answer']}\n" for row in ROWS)
        path.write_bytes(gzip.compress(text.encode()))
    elif name.endswith(".gz"):
        path.write_bytes(gzip.compress((lines() if "jsonl" in name else json.dumps(ROWS)).encode()))
    else:
        new = pa.ipc.new_file if name == "a.arrow" else pa.ipc.new_stream
        with new(str(path), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    prompts = read(str(path), tokenizer).train
    assert [(p.messages, p.columns) for p in prompts] == [(row["prompt"], {"answer": row["answer"]}) for row in ROWS]
    assert "row 4" in prompts[4].place or "line" in prompts[4].place


def test_rows_with_images_are_refused(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text(lines([{"prompt": "What is on it?", "images": ["cat.png"]}]))
    with pytest.raises(UserError, match=r"line 1: the row has images in its column 'images', and only text"):
        read(str(path), tokenizer)
    path.write_text(lines([{"prompt": "What is on it?", "images": None}]))
    assert len(read(str(path), tokenizer).train) == 1


# ── Several sources ───────────────────────────────────────────────────────────────────────────────────────────────────


def two_sources(tmp_path, **first):
    (tmp_path / "a.jsonl").write_text(lines())
    rows = [{"question": f"riddle {i}", "solution": i} for i in range(3)]
    (tmp_path / "b.jsonl").write_text(lines(rows))
    return {
        "sums": Source(source=str(tmp_path / "a.jsonl"), **first),
        "riddles": Source(
            source=str(tmp_path / "b.jsonl"),
            columns={"prompt": "question"},
            chat=True,
            system_prompt="Think.",
            rewards=["b"],
        ),
    }


def test_sources_have_their_own_options(tmp_path, tokenizer):
    train = read(two_sources(tmp_path), tokenizer).train
    assert [p.index for p in train] == list(range(8))
    assert [p.source for p in train] == ["sums"] * 5 + ["riddles"] * 3
    assert train[0].messages == "question 0" and train[0].rewards is None
    assert train[5].messages[0] == {"role": "system", "content": "Think."} and train[5].rewards == ["b"]
    assert train[5].columns == {"solution": 0, "source": "riddles"}


def test_each_source_is_served_in_the_ratio_of_its_weight(tmp_path, tokenizer):
    sources = two_sources(tmp_path, weight=1.0)
    sources["riddles"].weight = 3.0
    data = read(sources, tokenizer, prompts_per_rollout=4)
    assert data.sampler.sizes == (5, 3) and data.sampler.weights == (1.0, 3.0)
    served = Counter()
    for _ in range(20):
        data._stream.advance(4, 1)
        assert len(set(data._stream.rows)) == 4
        served.update(data.train[row].source for row in data._stream.rows)
    assert served == {"sums": 20, "riddles": 60}


def test_a_mixture_continues_where_it_was(tmp_path, tokenizer):
    sampler = MixtureSampler(sizes=(5, 3), weights=(2.0, 1.0))

    def advance(stream, times):
        rows = []
        for _ in range(times):
            stream.advance(3, 1)
            rows.append(list(stream.rows))
        return rows

    whole = Stream(8, seed=3, sampler=sampler)
    expected = advance(whole, 9)
    first = Stream(8, seed=3, sampler=sampler)
    assert advance(first, 4) == expected[:4]
    second = Stream(8, seed=3, sampler=sampler)
    second.load_state_dict(first.state_dict())
    assert second.peek(3) == expected[4]
    assert advance(second, 5) == expected[4:]


def test_a_mixture_gives_all_rows_that_are_left(tokenizer):
    sampler = MixtureSampler(sizes=(5, 3), weights=(2.0, 1.0))
    rows, _ = sampler.draw(9, size=8, seed=0, cursor=0, rates=None, taken={0, 6})
    assert sorted(rows) == [1, 2, 3, 4, 5, 7]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sources": {}}, "data.source is empty"),
        ({"weight": 1.0}, "data.source.riddles has no weight, but others have one"),
        ({"weight": -1.0}, "data.source.sums.weight is -1.0; set a number above 0"),
        ({"size": 0}, "data.source.sums.size is 0; set 1 or more"),
        ({"name": "a/b"}, "data.source has a source named 'a/b'"),
        ({"options": {"size": 3}}, "data.source_args and data.size belong to a single source"),
    ],
)
def test_settings_of_sources_that_cannot_work(change, message, tmp_path, tokenizer):
    change = dict(change)
    options, name, given = change.pop("options", {}), change.pop("name", None), change.pop("sources", None)
    sources = two_sources(tmp_path, **change) if given is None else given
    if name:
        sources = {name: sources["sums"]}
    with pytest.raises(UserError, match=message):
        PromptDataModule(sources, tokenizer=tokenizer, **options)


def test_a_sampler_beside_weights_is_refused(tmp_path, tokenizer):
    from lightning_grpo.data import DifficultySampler

    sources = {"sums": Source(source=str(tmp_path / "a.jsonl"), weight=1.0)}
    with pytest.raises(UserError, match=r"data.sampler and the weights of data.source exclude each other"):
        PromptDataModule(sources, tokenizer=tokenizer, sampler=DifficultySampler())


def test_only_the_rewards_of_a_source_score_its_prompts(tmp_path, tokenizer):
    train = read(two_sources(tmp_path), tokenizer).train
    scored: list[list] = []

    def a(completions, answer):
        scored.append(answer)
        return [1.0] * len(completions)

    async def b(completions, **columns):
        return [2.0] * len(completions)

    rewards = as_rewards([a, b])
    prompts = [train[0], train[5], train[1]]
    values = compute_rewards(
        rewards,
        [p.messages for p in prompts],
        ["x", "y", "z"],
        [[1], [2], [3]],
        [p.columns for p in prompts],
        applicable=[p.rewards for p in prompts],
    )
    assert values.nan_to_num(nan=-1).tolist() == [[1, 2], [-1, 2], [1, 2]]
    assert scored == [["0", "1"]]
    check_rows(rewards, prompts)
    with pytest.raises(UserError, match=r"b.jsonl, line 1: the rewards of its source include 'b', but .* are a; set"):
        check_rows(rewards[:1], prompts)


# ── Stored prompts ────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file whose prompts are stored in an empty folder."""
    monkeypatch.setenv("LIGHTNING_GRPO_PROMPTS", str(tmp_path / "stored"))
    monkeypatch.setattr(store, "STORED_FROM", 3)
    monkeypatch.setattr(encoding, "CHUNK", 2)
    path = tmp_path / "a.jsonl"
    path.write_text(lines([*ROWS, {"prompt": "question 1", "answer": "again"}]))
    return path


def count_divisions(monkeypatch):
    calls = []
    divide = DataSetReader._divide
    monkeypatch.setattr(DataSetReader, "_divide", lambda self, *args: calls.append(1) or divide(self, *args))
    return calls


@pytest.mark.parametrize(
    "options", [{}, {"validation_size": 2}, {"validation_size": 3, "validation_source": "SAME"}], ids=str
)
def test_stored_prompts_are_those_that_were_read(options, large, tokenizer, monkeypatch):
    if "validation_source" in options:
        options = options | {"validation_source": str(large)}
    calls = count_divisions(monkeypatch)
    without = read(str(large), tokenizer, cache=False, **options)
    first = read(str(large), tokenizer, **options)
    assert len(calls) == 2
    second = read(str(large), tokenizer, **options)
    assert len(calls) == 2
    for data in (first, second):
        assert isinstance(data.train, store.PromptTable)
        assert contents(data.train) == contents(without.train)
        assert contents(data.validation) == contents(without.validation)
        assert data._fingerprint == without._fingerprint
    assert contents(second.train[1:3]) == contents(without.train)[1:3]


def test_stored_prompts_are_not_used_for_other_data_or_options(large, tokenizer, monkeypatch):
    calls = count_divisions(monkeypatch)
    read(str(large), tokenizer)
    read(str(large), tokenizer, chat=True)
    read(str(large), tokenizer, max_prompt_length=100)
    read(str(large), tokenizer, validation_size=1, seed=5)
    tokenizer.chat_template, before = "{{ messages[0]['content'] }}", tokenizer.chat_template
    read(str(large), tokenizer)
    tokenizer.chat_template = before
    large.write_text(large.read_text().replace("again", "other"))  # a column that only rewards read
    assert read(str(large), tokenizer).train[5].columns == {"answer": "other"}
    assert len(calls) == 6


def test_few_held_out_prompts_of_another_file_are_stored_beside_many(large, tokenizer, tmp_path, monkeypatch):
    (tmp_path / "test.jsonl").write_text(lines([{"prompt": "held out", "answer": "1"}]))
    calls = count_divisions(monkeypatch)
    first, second = (read(str(large), tokenizer, validation_source=str(tmp_path / "test.jsonl")) for _ in range(2))
    assert len(calls) == 1
    assert contents(first.validation) == contents(second.validation) and second.validation[0].messages == "held out"


def test_damaged_stored_prompts_are_read_again(large, tokenizer, tmp_path):
    expected = contents(read(str(large), tokenizer).train)
    (facts,) = (tmp_path / "stored").glob("*/facts.json")
    facts.write_text(facts.read_text()[:10])
    assert contents(read(str(large), tokenizer).train) == expected
    (table,) = (tmp_path / "stored").glob("*/train.arrow")
    table.write_bytes(table.read_bytes()[:-20])
    assert contents(read(str(large), tokenizer).train) == expected


class Counting(Reward):
    """Records how many rows it is asked to check."""

    def __init__(self, column: str = "answer", seen: list | None = None):
        super().__init__()
        self.column = column
        Counting.seen = [] if seen is None else seen

    def __call__(self, completions, **columns):
        return [0.0] * len(completions)

    def check(self, columns):
        self.seen.append(len(columns))
        if missing := [row for row in columns if self.column not in row]:
            raise ValueError(f"{missing[0]} has no {self.column}")


def test_rewards_check_stored_prompts_once(large, tokenizer, monkeypatch):
    monkeypatch.setattr(check, "FIRST", 2)
    seen: list[int] = []
    for expected in (6, 2, 2):
        check_rows([Counting(seen=seen)], read(str(large), tokenizer).prompts_to_check)
        assert seen[-1] == expected
    # with other options, and beside another reward, nothing is known
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: .* has no level"):
        check_rows([Counting("level", seen)], read(str(large), tokenizer).prompts_to_check)
    assert seen[3] == 6
    check_rows([Counting(seen=seen), *as_rewards([contents])], read(str(large), tokenizer).prompts_to_check)
    assert seen[-1] == 6


def test_what_a_reward_rejected_is_checked_again(large, tokenizer):
    for _ in range(2):
        with pytest.raises(UserError, match=r"line 1: .* has no level"):
            check_rows([Counting("level")], read(str(large), tokenizer).prompts_to_check)


def test_rewards_without_a_description_are_checked_every_time(large, tokenizer, monkeypatch):
    monkeypatch.setattr(check, "FIRST", 2)
    seen: list[int] = []
    for _ in range(2):
        reward = Counting(seen=seen)
        reward.parser = json  # a module: whether it is the same one is unknown
        check_rows([reward], read(str(large), tokenizer).prompts_to_check)
    assert seen == [6, 6]


def test_facts_of_stored_prompts_are_those_of_prompts_in_memory(large, tokenizer):
    stored, plain = (read(str(large), tokenizer, cache=cache, validation_size=1).train for cache in (True, False))
    assert isinstance(stored, store.PromptTable)
    assert dataset.lengths(stored).tolist() == dataset.lengths(plain).tolist() == [len(p.ids) for p in plain]
    assert fingerprint(dataset.encoded(stored)) == fingerprint(dataset.encoded(plain))
    shuffled = store.PromptTable(stored.table, stored.rows[[3, 0, 2, 1]])
    assert contents(shuffled) == [contents(plain)[i] for i in (3, 0, 2, 1)]
    assert [p.row for p in dataset.encoded(shuffled)] == [plain[i].index for i in (3, 0, 2, 1)]


def test_remarks_are_repeated_for_stored_prompts(large, tokenizer, caplog):
    for _ in range(2):
        caplog.clear()
        read(str(large), tokenizer, validation_size=4)
        assert "training prompts that are also held-out prompts" in caplog.text or "held-out" in caplog.text


def test_rows_that_json_cannot_store_stay_in_memory(tmp_path, tokenizer, monkeypatch):
    import datetime

    monkeypatch.setattr(store, "STORED_FROM", 2)
    monkeypatch.setattr(encoding, "CHUNK", 2)
    days = [None, None, None, datetime.date(2026, 1, 1), None]
    table = pa.table({"prompt": [row["prompt"] for row in ROWS], "day": pa.array(days, pa.date32())})
    pa.parquet.write_table(table, tmp_path / "a.parquet")
    train = read(str(tmp_path / "a.parquet"), tokenizer).train
    assert [p.columns["day"] for p in train] == days


def test_several_processes_encode_as_one_does(large, tokenizer, monkeypatch):
    expected = contents(read(str(large), tokenizer, cache=False).train)
    monkeypatch.setattr(encoding, "PARALLEL_FROM", 2)
    assert contents(read(str(large), tokenizer, cache=False).train) == expected
    large.write_text(large.read_text() + '{"prompt": "", "answer": "7"}\n')
    with pytest.raises(UserError, match="line 7: the prompt is empty"):
        read(str(large), tokenizer, cache=False)
