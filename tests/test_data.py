import copy
import json
import logging
import multiprocessing

import jsonargparse
import lightning
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_grpo.data import DifficultySampler, PassSampler, PromptBatch, PromptDataModule, sources
from lightning_grpo.data.prompts import Prompt, fingerprint, identify
from lightning_grpo.data.stream import Stream

pytestmark = [
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`"),
    pytest.mark.filterwarnings("error:You're resuming from a checkpoint that ended before the epoch"),
]
CHAT = [{"role": "user", "content": "What is 2 + 2?"}]


@pytest.fixture
def write(tmp_path):
    """Writes rows, or ready lines, as a jsonl file."""

    def as_jsonl(*rows, name="train.jsonl"):
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return str(path)

    return as_jsonl


@pytest.fixture
def load(tokenizer):
    """A data module after its setup."""

    def make(source, **options):
        data = PromptDataModule(source, tokenizer=tokenizer, **{"prompts_per_rollout": 1} | options)
        data.setup()
        return data

    return make


# Sources -------------------------------------------------------------------------------------------------------------


def test_jsonl(write, load):
    path = write({"prompt": "a", "answer": "1", "level": 2}, "", {"prompt": CHAT, "answer": "4", "level": 3})
    first, second = load(path).train
    assert (first.index, first.messages, first.columns) == (0, "a", {"answer": "1", "level": 2})
    assert (second.index, second.messages, second.columns) == (1, CHAT, {"answer": "4", "level": 3})
    assert len(load(path, size=1).train) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"prompt": "b", "answer": ', "not JSON"),
        ('["b"]', "a row must be an object with a prompt, not list"),
        ({"question": "b", "answer": "2"}, "no column 'prompt'; set data.columns.prompt to one of question, answer"),
        ({"prompt": "", "answer": "2"}, "the prompt is empty"),
        ({"prompt": 5, "answer": "2"}, "a prompt must be a string or a list of messages, not 5"),
        ({"prompt": [], "answer": "2"}, "a prompt must be a string or a list of messages"),
        ({"prompt": ["hi"], "answer": "2"}, "a message must be an object with role and content, not 'hi'"),
        (
            {"prompt": [{"role": "user", "content": None}], "answer": "2"},
            "the content of a message must be text, not None",
        ),
        ({"prompt": "b", "anwser": "2"}, "differs from the first row in the columns answer, anwser"),
        ({"prompt": "b", "answer": "2", "completions": 1}, "'completions' has the name of an argument"),
    ],
)
def test_bad_row_names_file_and_line(write, load, row, message):
    path = write({"prompt": "a", "answer": "1"}, "", row)
    with pytest.raises(ValueError, match=f"^{path}, line 3: .*{message}"):
        load(path)


def test_parquet_of_verls_convention(tmp_path, load):
    path = str(tmp_path / "train.parquet")
    rows = [
        {
            "data_source": "openai/gsm8k",
            "prompt": [{"role": "user", "content": f"{i} + 1?", "name": None}],
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": str(i + 1)},
            "extra_info": {"index": i},
        }
        for i in range(3)
    ]
    pa.parquet.write_table(pa.Table.from_pylist(rows), path)
    prompts = load(path).train
    assert prompts[2].messages == [{"role": "user", "content": "2 + 1?"}]
    assert prompts[2].columns == {
        "data_source": "openai/gsm8k",
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "3"},
        "extra_info": {"index": 2},
        "answer": "3",
    }


def test_bad_parquet_row_names_file_and_row(tmp_path, load):
    path = str(tmp_path / "train.parquet")
    pa.parquet.write_table(pa.table({"prompt": ["a", None]}), path)
    with pytest.raises(ValueError, match=f"{path}, row 1: a prompt must be a string"):
        load(path)


def test_saved_dataset(tmp_path, load):
    import datasets

    train = datasets.Dataset.from_dict({"question": ["a", "b"], "answer": ["1", "2"]})
    train.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=train, test=train.select([1])).save_to_disk(str(tmp_path / "dict"))
    columns = {"prompt": "question"}
    assert [p.messages for p in load(str(tmp_path / "one"), columns=columns).train] == ["a", "b"]
    assert [p.messages for p in load(str(tmp_path / "dict"), columns=columns).train] == ["a", "b"]
    tested = load(str(tmp_path / "dict"), columns=columns, source_args={"split": "test"})
    assert [(p.messages, p.columns) for p in tested.train] == [("b", {"answer": "2"})]
    with pytest.raises(ValueError, match=r"no split 'val'; set source_args.split to one of train, test"):
        load(str(tmp_path / "dict"), source_args={"split": "val"})
    with pytest.raises(ValueError, match=r"which was not written by datasets.save_to_disk"):
        load(str(tmp_path))


def test_hub_name_goes_to_load_dataset(monkeypatch, load):
    import datasets

    asked = {}

    def load_dataset(path, **args):
        asked.update(args, path=path)
        if path == "nobody/nothing":
            raise FileNotFoundError("no such data set")
        return [{"prompt": "a"}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(sources, "hub_reachable", lambda *name, option: True)
    assert len(load("openai/gsm8k", source_args={"name": "main", "revision": "v1"}).train) == 1
    assert asked == {"path": "openai/gsm8k", "split": "train", "name": "main", "revision": "v1"}
    with pytest.raises(ValueError, match=r"'nobody/nothing', which can't be loaded \(no such data set\); set a .jsonl"):
        load("nobody/nothing")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"source": "nowhere.jsonl"}, ValueError, "data.source is 'nowhere.jsonl', but there is no such file"),
        ({"source": "/no/folder"}, ValueError, "data.source is '/no/folder', but there is no such folder; set"),
        ({"source": "arithmetics"}, ValueError, "data.source is 'arithmetics'; set"),
        (
            {"source": "arithmetic", "source_args": {"hi": 1}},
            ValueError,
            "'hi'; its arguments are: low, high, operator",
        ),
        ({"source": "arithmetic", "source_args": {"operator": "/"}}, ValueError, r"operator is '/'; set one of \+, -"),
        ({"source": "arithmetic", "source_args": {"low": 5, "high": 4}}, ValueError, "high is 4, below low = 5"),
        ({"source": ""}, ValueError, "data.source is empty; set"),
        ({"source": "arithmetic", "source_args": {"low": "1"}}, ValueError, "low is '1'; set a whole number"),
        ({"source": "arithmetic", "source_args": {"template": "{c}"}}, ValueError, "template is '{c}', which can't be"),
        ({"source": "letters", "source_args": {"repeats": 0}}, ValueError, "repeats is 0; set 1 or more"),
        ({"source": "letters", "source_args": {"alphabet": ""}}, ValueError, "alphabet is ''; set a text"),
        (
            {"source": "letters", "size": 30, "source_args": {"alphabet": "a"}, "validation_size": 1},
            ValueError,
            "is also a held-out",
        ),
        (
            {"source": "arithmetic", "source_args": {"high": 2}, "size": 5},
            ValueError,
            "size is 5, but only 4 questions",
        ),
        ({"source": "arithmetic", "source_args": {"high": 999}}, ValueError, "998,001 questions .*; set data.size"),
        ({"source": "reasoning_gym:sums"}, ValueError, "the reasoning-gym task 'sums'; set one of ab, acre"),
        ({"source": "reasoning_gym:lcm"}, ValueError, "data.size is unset"),
        (
            {"source": "reasoning_gym:lcm", "size": 1, "source_args": {"terms": 3}},
            ValueError,
            "'terms'; it takes min_numbers, max_numbers",
        ),
        ({"source": "reasoning_gym:lcm", "size": 1, "source_args": {"min_numbers": -1}}, ValueError, "min_numbers"),
        ({"source": "letters", "validation_size": 26}, ValueError, "validation_size is 26, but 'letters' has 26"),
        (
            {"source": "letters", "prompts_per_rollout": 27},
            ValueError,
            "is 27, but .* 26 training prompts; set .* to 26",
        ),
        ({"source": "letters", "system_prompt": "Hi"}, ValueError, "system_prompt is set, .*; set data.chat to true"),
        (
            {"source": "letters", "chat_template": "none.jinja"},
            ValueError,
            "neither a file nor a Jinja template",
        ),
        (
            {"source": "letters", "columns": {"prompt": "quest"}},
            ValueError,
            "data.columns.prompt is 'quest', but the row has no such column",
        ),
        ({"source": "letters", "size": 0}, ValueError, "data.size is 0; set 1 or more"),
        ({"source": "letters", "seed": -1}, ValueError, "data.seed is -1; set 0 or more"),
        ({"source": "letters", "overlong": "cut"}, ValueError, "overlong is 'cut'; set it to drop or error"),
        (
            {"source": "letters", "validation_args": {"a": 1}},
            ValueError,
            "validation_args is set, but data.validation_source is not",
        ),
    ],
)
def test_options_that_cannot_work(load, options, error, message):
    with pytest.raises(error, match=message):
        load(**options)


@given(
    low=st.integers(-5, 5),
    width=st.integers(0, 8),
    operator=st.sampled_from("+-*"),
    seed=st.integers(0, 9),
    data=st.data(),
)
def test_arithmetic_is_right_and_distinct(low, width, operator, seed, data):
    from lightning_grpo.data.sources import read

    size = data.draw(st.none() | st.integers(1, (width + 1) ** 2))
    args = {"low": low, "high": low + width, "operator": operator, "template": "{a} {operator} {b}"}
    rows = [row for _, row in read("arithmetic", args=args, size=size, seed=seed)]
    assert len({row["prompt"] for row in rows}) == len(rows) == (size or (width + 1) ** 2)
    for row in rows:
        assert eval(row["prompt"].replace("×", "*")) == int(row["answer"])


def test_letters(load):
    prompts = load("letters", size=60, source_args={"repeats": 3}).train
    assert len({p.messages for p in prompts[:26]}) == 26
    assert all(p.columns == {"answer": p.messages * 3} and len(p.ids) == 1 for p in prompts)


def test_reasoning_gym(load):
    def make(seed):
        return load("reasoning_gym:chain_sum", size=4, source_args={"max_terms": 2}, seed=seed).train

    first = make(1)
    assert first == make(1) and first != make(2)
    for prompt in first:
        assert prompt.columns["task"] == "chain_sum" and prompt.columns["task_args"] == {"max_terms": 2}
        assert prompt.columns["entry"]["question"] == prompt.messages
        assert prompt.columns["entry"]["answer"] == prompt.columns["answer"]


def test_columns_take_new_names_and_nested_values(write, load):
    path = write({"question": "a", "label": {"value": 7}, "x.y": 1, "kept": True})
    prompt = load(path, columns={"prompt": "question", "answer": "label.value", "z": "x.y"}).train[0]
    assert prompt.messages == "a"
    assert prompt.columns == {"answer": 7, "z": 1, "label": {"value": 7}, "kept": True}


# Encoding ------------------------------------------------------------------------------------------------------------


def test_text_is_taken_as_it_is_and_messages_go_through_the_template(write, load, tokenizer):
    text, chat = load(write({"prompt": " a\n"}, {"prompt": CHAT})).train
    assert tokenizer.decode(text.ids) == " a\n"
    assert tokenizer.decode(chat.ids) == "<user>What is 2 + 2?<assistant>"


def test_chat_and_system_prompt(write, load, tokenizer):
    data = load(write({"prompt": "a"}, {"prompt": CHAT}), chat=True, system_prompt="Be brief.")
    assert [tokenizer.decode(p.ids) for p in data.train] == [
        "<system>Be brief.<user>a<assistant>",
        "<system>Be brief.<user>What is 2 + 2?<assistant>",
    ]
    assert data.train[0].messages[0] == {"role": "system", "content": "Be brief."}
    own = write({"prompt": [{"role": "system", "content": "Hi"}, *CHAT]}, name="own.jsonl")
    with pytest.raises(ValueError, match=r"own.jsonl, line 1: .*the row has its own system message"):
        load(own, system_prompt="Be brief.")


def test_assistants_opening_is_left_open(write, load, tokenizer):
    prompt = load(write({"prompt": [*CHAT, {"role": "assistant", "content": "Let me think"}]})).train[0]
    assert tokenizer.decode(prompt.ids) == "<user>What is 2 + 2?<assistant>Let me think"


def test_missing_chat_template(write, tokenizer, tmp_path):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    path = write({"prompt": "a"}, {"prompt": CHAT})
    with pytest.raises(ValueError, match=r"line 2: .*no chat template; set data.chat_template to a"):
        PromptDataModule(path, tokenizer=bare, prompts_per_rollout=1).setup()
    template = tmp_path / "chat.jinja"
    template.write_text("{{ mark }}{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    for given_template in (str(template), template.read_text()):
        data = PromptDataModule(
            path, tokenizer=bare, prompts_per_rollout=1, chat_template=given_template, chat_template_args={"mark": "!"}
        )
        data.setup()
        assert bare.decode(data.train[1].ids) == "![What is 2 + 2?]"


def test_one_beginning_and_no_end_of_sequence(write, tokenizer):
    from tokenizers.processors import TemplateProcessing

    wrapping = copy.deepcopy(tokenizer)
    wrapping.bos_token = "<unk>"
    ids = [("<unk>", wrapping.bos_token_id), ("<eos>", wrapping.eos_token_id)]
    wrapping.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A <eos>", special_tokens=ids)
    assert wrapping.decode(wrapping("a")["input_ids"]) == "<unk>a<eos>"
    rows = [{"prompt": "a"}, {"prompt": "<unk>a"}, {"prompt": "a<eos>"}, {"prompt": CHAT}]
    data = PromptDataModule(write(*rows), tokenizer=wrapping, prompts_per_rollout=1)
    data.setup()
    assert [wrapping.decode(p.ids) for p in data.train][:2] == ["<unk>a", "<unk>a"]
    assert wrapping.decode(data.train[3].ids) == "<user>What is 2 + 2?<assistant>"


def test_no_tokenizer():
    with pytest.raises(ValueError, match="no tokenizer: give the module a `tokenizer` attribute"):
        PromptDataModule("letters").setup()


def test_overlong_prompts_are_dropped_with_a_count_or_refused(write, load, caplog):
    path = write({"prompt": "a" * 4}, {"prompt": "b" * 5}, {"prompt": "c"}, {"prompt": "d" * 9})
    with caplog.at_level(logging.WARNING):
        data = load(path, max_prompt_length=4)
    assert [p.index for p in data.train] == [0, 2]
    assert f"dropped 2 of 4 prompts of {path}, which have more than max_prompt_length = 4 tokens" in caplog.text
    with pytest.raises(ValueError, match=r"line 2: the prompt has 5 tokens, above max_prompt_length = 4"):
        load(path, max_prompt_length=4, overlong="error")
    with pytest.raises(ValueError, match=r"all 4 prompts of .* have more than max_prompt_length = 1 tokens; raise it"):
        load(write(*[{"prompt": "long"}] * 4), max_prompt_length=1)


# Held-out prompts ----------------------------------------------------------------------------------------------------


def test_held_out_prompts_are_not_trained_on(load, caplog):
    with caplog.at_level(logging.WARNING):
        data = load("letters", size=52, validation_size=5, seed=3)
    asked = {p.messages for p in data.validation}
    assert len(data.validation) == 5 and asked.isdisjoint(p.messages for p in data.train)
    assert len(data.train) == 52 - 2 * len(asked)
    assert "training prompts that are also held-out prompts" in caplog.text
    again = load("letters", size=52, validation_size=5, seed=3)
    assert (again.train, again.validation) == (data.train, data.validation)
    assert load("letters", size=52, validation_size=5, seed=4).validation != data.validation


def test_validation_source(write, load):
    train = write({"prompt": "a"}, {"prompt": "b"}, {"prompt": "c"})
    held_out = write({"prompt": "c"}, {"prompt": "d"}, {"prompt": "e"}, name="val.jsonl")
    data = load(train, validation_source=held_out, validation_size=2)
    assert [p.messages for p in data.train] == ["a", "b"]
    assert [p.messages for p in data.validation] == ["c", "d"]
    assert len(load(train, validation_source=held_out).validation) == 3


def test_procedural_validation_source_has_rows_of_its_own(load):
    options = {"size": 20, "source_args": {"min_terms": 4, "max_terms": 4, "min_digits": 4}}
    same = {"validation_source": "reasoning_gym:chain_sum", "validation_args": options["source_args"]}
    data = load("reasoning_gym:chain_sum", **options, **same, validation_size=20)
    assert len(data.train) == len(data.validation) == 20


def attach(data, *, W=1, rank=0, steps_per_rollout=1):
    """A data module inside rank ``rank`` of ``W`` of a training that hasn't begun."""
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
    trainer.strategy._lightning_module = Recorder(steps_per_rollout)
    data.trainer = trainer
    type(trainer).distributed_sampler_kwargs  # noqa: B018  fails should Lightning drop what is replaced below
    trainer.__class__ = type(
        "Sharded", (lightning.Trainer,), {"distributed_sampler_kwargs": {"num_replicas": W, "rank": rank}}
    )
    return data


@pytest.mark.parametrize("W", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 5, 6, 7])
def test_validation_counts_every_prompt_once_on_any_number_of_ranks(load, n, W):
    shapes, seen = set(), []
    for rank in range(W):
        data = attach(load("letters", validation_size=n, validation_batch_size=2), W=W, rank=rank)
        loader = data.val_dataloader()
        batches = list(loader)
        assert len(loader) == len(batches)
        shapes.add(tuple(map(len, batches)))
        seen += [i for b in batches for i, real in zip(b.prompt_indices, b.real, strict=True) if real]
    assert len(shapes) == 1
    assert sorted(seen) == [p.index for p in data.validation]


# Samplers ------------------------------------------------------------------------------------------------------------

SAMPLERS = [PassSampler(), PassSampler(shuffle=False), DifficultySampler()]


@pytest.mark.parametrize("sampler", SAMPLERS)
@given(size=st.integers(1, 12), counts=st.lists(st.integers(0, 14), max_size=6), seed=st.integers(0, 5))
def test_a_rollout_never_holds_a_prompt_twice(sampler, size, counts, seed):
    taken, cursor, rates = set(), 0, torch.full((size,), torch.nan)
    for count in counts:
        rows, cursor = sampler.draw(count, size=size, seed=seed, cursor=cursor, rates=rates, taken=taken)
        assert len(rows) == len(set(rows)) == min(count, size - len(taken))
        assert taken.isdisjoint(rows) and set(rows) <= set(range(size))
        taken.update(rows)


@given(size=st.integers(1, 20), seed=st.integers(0, 5), shuffle=st.booleans(), data=st.data())
def test_every_prompt_comes_once_a_pass(size, seed, shuffle, data):
    """In rollouts that divide the data; else a prompt that meets itself at the seam is passed over."""
    count = data.draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0]))
    stream = Stream(size, seed=seed, sampler=PassSampler(shuffle=shuffle))
    passes = []
    for _ in range(2):
        rows = []
        for _ in range(size // count):
            stream.advance(count, 1)
            rows += stream.rows
        assert sorted(rows) == list(range(size))
        passes.append(rows)
    if not shuffle:
        assert passes == [list(range(size))] * 2
    elif size > 10:
        assert passes[0] != passes[1]


def test_prompts_left_over_begin_the_next_epoch():
    stream = Stream(7, seed=0, sampler=PassSampler(shuffle=False))
    served = []
    for _ in range(4):
        stream.advance(3, 1)
        served.append(stream.rows)
    assert served == [[0, 1, 2], [3, 4, 5], [6, 0, 1], [2, 3, 4]]


def test_difficulty_sampler_prefers_what_is_solved_half_of_the_time():
    sampler = DifficultySampler(floor=0.1)
    rates = torch.tensor([0.0, 0.5, 1.0, torch.nan])
    assert sampler.weights(rates).tolist() == pytest.approx([0.1, 1.0, 0.1, 1.0])
    counts = np.zeros(4)
    for cursor in range(4000):
        rows, _ = sampler.draw(1, size=4, seed=0, cursor=cursor, rates=rates, taken=set())
        counts[rows] += 1
    expected = np.array([0.1, 1, 0.1, 1]) / 2.2
    assert counts / 4000 == pytest.approx(expected, abs=5 * np.sqrt(0.25 / 4000))


def test_running_pass_rate():
    sampler = DifficultySampler(smoothing=0.25, low=-1, high=1)
    rate = sampler.update(torch.nan, 0.0)
    assert rate == 0.5
    assert sampler.update(rate, 1.0) == 0.5 + 0.25 * 0.5
    assert sampler.update(rate, 7.0) == sampler.update(rate, 1.0)


@pytest.mark.parametrize(
    "options", [{"floor": 0}, {"floor": 1.5}, {"smoothing": 0}, {"smoothing": 2}, {"low": 1.0}, {"high": -1.0}]
)
def test_difficulty_sampler_refuses(options):
    with pytest.raises(ValueError, match=r"sampler\.\w+ is .*; set"):
        DifficultySampler(**options)


# Training batches ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_any_number_of_ranks_sees_the_same_windows(load, sampler):
    """With K updates a rollout, update k has the prompts [k·B/K, (k+1)·B/K) of one process, whatever the ranks."""
    B, K, extra = 12, 2, 6
    made = {}
    for W in (1, 2, 3, 6):
        ranks = [
            attach(load("letters", prompts_per_rollout=B, sampler=sampler), W=W, rank=rank, steps_per_rollout=3)
            for rank in range(W)
        ]
        windows, extras = [], []
        for number, batches in enumerate(zip(*(data.train_dataloader() for data in ranks), strict=True)):
            if number % 3:
                continue
            for k in range(K):
                part = slice(k * B // K // W, (k + 1) * B // K // W)
                windows.append(sorted(i for batch in batches for i in batch.prompt_indices[part]))
            extras.append(sorted(i for data in ranks for i in data.more_prompts(extra).prompt_indices))
            for data in ranks:
                data._stream.observe({row: row / 26 for row in data._stream.rows})
        made[W] = windows, extras
        assert all(len(window) == B // K for window in windows) and all(len(more) == extra for more in extras)
    assert all(made[W] == made[1] for W in made)


@pytest.mark.parametrize(("count", "share"), [(0, 0), (1, 1), (3, 1), (4, 2), (21, 7), (26, 7), (99, 7)])
def test_every_rank_gets_as_many_further_prompts(load, count, share):
    """So that all of them go on, or none does. 26 prompts, 3 ranks, 3 prompts in the rollout: 23 are left."""
    ranks = [attach(load("letters", prompts_per_rollout=3), W=3, rank=rank) for rank in range(3)]
    first = [next(iter(data.train_dataloader())) for data in ranks]
    more = [data.more_prompts(count) for data in ranks]
    assert [len(batch) for batch in more] == [share] * 3
    indices = [i for batch in first + more for i in batch.prompt_indices]
    assert len(set(indices)) == len(indices)


def test_prompts_that_ranks_cannot_share(load):
    with pytest.raises(
        ValueError,
        match="prompts_per_rollout is 8, which can't be divided among 3 data-parallel ranks; set it to 6 or 9",
    ):
        attach(load("letters", prompts_per_rollout=8), W=3).train_dataloader()


def test_batches_stay_untouched_by_lightnings_conversions(load):
    from lightning.fabric.plugins.precision import HalfPrecision
    from lightning.fabric.utilities import move_data_to_device

    batch = PromptBatch(load("letters").train)
    assert move_data_to_device(HalfPrecision("bf16-true").convert_input(batch), torch.device("cpu")) is batch


# The position, under a real trainer ----------------------------------------------------------------------------------


class Recorder(lightning.LightningModule):
    """Takes note of every batch; uses at each rollout's first step all that moves the position on."""

    def __init__(self, steps_per_rollout, tokenizer=None, fail=None):
        super().__init__()
        self.steps_per_rollout = steps_per_rollout
        self.tokenizer = tokenizer
        self.fail = fail
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def configure_optimizers(self):
        # builds the loader before the checkpoint is read, as schedules do
        assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def on_train_batch_start(self, batch, batch_idx):
        extra = []
        step = batch_idx % self.steps_per_rollout
        if step == 0:
            extra = self.trainer.datamodule.more_prompts(2).prompt_indices
            indices = batch.prompt_indices + extra
            self.trainer.datamodule.observe(indices, [(i * 7 + batch.rollout_number) % 5 / 4 for i in indices])
        if self.fail == ("start", batch.rollout_number, step):
            raise RuntimeError("stopped here")
        self.noted = (batch.rollout_number, step, batch.prompt_indices, extra, batch_idx)

    def training_step(self, batch, batch_idx):
        if self.fail == ("step", batch.rollout_number, batch_idx % self.steps_per_rollout):
            raise RuntimeError("stopped here")
        return self.weight * 1.0

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.seen.append(self.noted)


STEPS, EPOCHS = 3, 3


def fit(tokenizer, folder, *, ckpt_path=None, fail=None, sampler=None, steps_per_rollout=STEPS, B=4, seed=1):
    """10 prompts, 4 a rollout: 2 rollouts of 3 steps an epoch, 18 steps in all. A checkpoint after each, or
    where it fails."""
    data = PromptDataModule("letters", size=10, prompts_per_rollout=B, sampler=sampler, seed=seed)
    keep = ModelCheckpoint(
        folder,
        filename="{step}",
        save_top_k=-1,
        every_n_train_steps=1 if fail is None else 100,
        save_on_exception=fail is not None,
    )
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=EPOCHS,
        logger=False,
        callbacks=[keep],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = Recorder(steps_per_rollout, tokenizer, fail)
    if fail is None:
        trainer.fit(module, data, ckpt_path=ckpt_path)
    else:
        with pytest.raises(RuntimeError, match="stopped here"):
            trainer.fit(module, data, ckpt_path=ckpt_path)
    return module.seen


@pytest.fixture(scope="module", params=[None, DifficultySampler(floor=0.01)], ids=["passes", "difficulty"])
def whole(request, tokenizer, tmp_path_factory):
    """The uninterrupted run: what it saw, its checkpoints, its sampler."""
    folder = tmp_path_factory.mktemp("whole")
    return fit(tokenizer, folder, sampler=request.param), folder, request.param


def test_the_whole_run(whole):
    seen, _, _ = whole
    assert [note[:2] for note in seen] == [(r, s) for r in range(6) for s in range(STEPS)]
    for rollout in range(6):
        repeats = seen[rollout * STEPS : (rollout + 1) * STEPS]
        assert len({tuple(note[2]) for note in repeats}) == 1
        assert len({*repeats[0][2], *repeats[0][3]}) == 6


@pytest.mark.parametrize("step", range(1, 2 * STEPS * EPOCHS + 1))
def test_resuming_at_any_step_goes_on_with_the_same_batches(whole, tokenizer, tmp_path, step):
    seen, folder, sampler = whole
    assert fit(tokenizer, tmp_path, ckpt_path=folder / f"step={step}.ckpt", sampler=sampler) == seen[step:]


@pytest.mark.parametrize("moment", ["start", "step"])
@pytest.mark.parametrize(("rollout", "step"), [(0, 1), (1, 2), (2, 0), (3, 0)])
def test_a_run_stopped_by_an_error_goes_on_with_the_batch_it_broke_at(
    whole, tokenizer, tmp_path, moment, rollout, step
):
    seen, _, sampler = whole
    done = rollout * STEPS + step
    assert fit(tokenizer, tmp_path, fail=(moment, rollout, step), sampler=sampler) == seen[:done]
    after = tmp_path / "after"
    assert fit(tokenizer, after, ckpt_path=tmp_path / f"step={done}.ckpt", sampler=sampler) == seen[done:]
    again = fit(tokenizer, tmp_path / "again", ckpt_path=after / f"step={done + 2}.ckpt", sampler=sampler)
    assert again == seen[done + 2 :]


def test_checkpoints_are_read_with_weights_only(whole):
    _, folder, _ = whole
    state = torch.load(folder / "step=4.ckpt", weights_only=True)
    assert state["PromptDataModule"].keys() >= {"prompts", "fingerprint"}


def test_two_runs_with_one_seed_are_the_same_and_another_seed_is_not(whole, tokenizer, tmp_path):
    seen, _, sampler = whole
    assert fit(tokenizer, tmp_path / "a", sampler=sampler) == seen
    assert fit(tokenizer, tmp_path / "b", sampler=sampler, seed=2) != seen


def test_resuming_with_other_prompts_is_refused(whole, tokenizer, tmp_path):
    _, folder, sampler = whole
    with pytest.raises(ValueError, match=r"saved with 10 training prompts, but the 10 .* are not the same"):
        fit(tokenizer, tmp_path, ckpt_path=folder / "step=3.ckpt", sampler=sampler, seed=2)


def test_the_fingerprint_sees_every_column_and_is_the_same_in_every_process(write, tokenizer):
    class Opaque:
        pass

    def of(**columns):
        return fingerprint([identify(Prompt(index=0, place="here", ids=[1, 2], messages="p", columns=columns))])

    assert of(answer="4", level=np.int64(2)) == of(level=2, answer="4")
    assert len({of(answer="4"), of(answer="5"), of(answer=4), of(answer=[4, {"a": 1}]), of(target="4"), of()}) == 6
    assert of(scores=np.array([1.0, 2.0])) != of(scores=np.array([1.0, 3.0]))
    assert of(task=Opaque()) == of(task=Opaque())


def test_validating_a_checkpoint_on_other_data(whole, tokenizer, tmp_path):
    """And without a rollout's worth of training prompts: only `fit` needs the position."""
    _, folder, _ = whole

    class Counter(Recorder):
        def validation_step(self, batch, batch_idx):
            self.seen += batch.prompt_indices

    module = Counter(STEPS, tokenizer)
    data = PromptDataModule("letters", size=6, validation_size=5, prompts_per_rollout=4)
    trainer = lightning.Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    trainer.validate(module, data, ckpt_path=folder / "step=4.ckpt", weights_only=True)
    assert module.seen == [p.index for p in data.validation] and len(module.seen) == 5


def test_longest_prompt_is_the_modules_where_unset(write, tokenizer):
    data = PromptDataModule(write({"prompt": "a" * 4}, {"prompt": "b" * 5}), tokenizer=tokenizer, prompts_per_rollout=1)
    attach(data).trainer.lightning_module.max_prompt_length = 4
    data.setup("fit")
    assert [p.index for p in data.train] == [0]


def test_resuming_within_a_rollout_with_other_batch_sizes_is_refused(whole, tokenizer, tmp_path):
    _, folder, sampler = whole
    with pytest.raises(ValueError, match="within a rollout of 3 micro-batches, but this run has 2"):
        fit(tokenizer, tmp_path, ckpt_path=folder / "step=4.ckpt", sampler=sampler, steps_per_rollout=2)


def _observe_on(rank, folder, tokenizer, answers):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    data = PromptDataModule("letters", tokenizer=tokenizer, prompts_per_rollout=4, sampler=DifficultySampler())
    data.setup()
    attach(data, W=2, rank=rank)
    batch = next(iter(data.train_dataloader()))
    data.observe(batch.prompt_indices, torch.tensor([0.25 + rank / 2, torch.nan]))
    answers.put((rank, batch.prompt_indices, data.state_dict()["observed"]))
    torch.distributed.destroy_process_group()


def test_ranks_exchange_what_they_observed(tokenizer, tmp_path):
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    ranks = [context.Process(target=_observe_on, args=(r, tmp_path, tokenizer, answers)) for r in range(2)]
    for process in ranks:
        process.start()
    (_, first, seen_0), (_, second, seen_1) = sorted(answers.get(timeout=60) for _ in ranks)
    for process in ranks:
        process.join(timeout=60)
    assert seen_0 == seen_1 == {first[0]: 0.25, second[0]: 0.75}


# The command line ----------------------------------------------------------------------------------------------------


def test_from_yaml(tmp_path):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(PromptDataModule, "data")
    parser.add_argument("--config", action="config")
    (tmp_path / "config.yaml").write_text(
        "data:\n  class_path: PromptDataModule\n  init_args:\n    source: arithmetic\n    source_args: {high: 9}\n"
        "    sampler: {class_path: DifficultySampler, init_args: {floor: 0.2}}\n"
    )
    parsed = parser.parse_args(["--config", str(tmp_path / "config.yaml"), "--data.columns", '{"answer": "label"}'])
    data = parser.instantiate(parsed).data
    assert (data.source, data.source_args, data.columns) == ("arithmetic", {"high": 9}, {"answer": "label"})
    assert data.sampler == DifficultySampler(floor=0.2)
