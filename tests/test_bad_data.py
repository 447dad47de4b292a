"""Data as it comes: what is read in any spelling, and what is refused in one line that names file and row."""

import copy
import gzip
import json
import logging
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
from conftest import char_tokenizer, tiny_llama
from fitting import fit, module
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from lightning_grpo.data import PromptDataModule, encoding
from lightning_grpo.data.encoding import CHUNK
from lightning_grpo.errors import UserError
from lightning_grpo.policy import files as model_files
from lightning_grpo.rewards import ExactMatch

GOOD = '{"prompt": "What is 1 + 1?", "answer": "2"}\n'
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
WITH_TOOLS = (
    "{% if tools %}[{{ tools | tojson }}]{% endif %}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] or '' }}"
    "{% for c in m['tool_calls'] or () %}{{ c['function']['name'] }}({{ c['function']['arguments'] | tojson }})"
    "{% endfor %}{% endfor %}{% if mood %}<{{ mood }}>{% endif %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
HISTORY = [
    {"role": "user", "content": "What is 0 + 0?"},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 0}}}]},
    {"role": "tool", "content": "0", "name": "add"},
]


@pytest.fixture
def read(tmp_path, tokenizer):
    """The prompts of a file with these bytes, text or rows."""

    def prompts(content, *, name="train.jsonl", tokenizer=tokenizer, **options):
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content)
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        data = PromptDataModule(str(path), tokenizer=tokenizer, **{"prompts_per_rollout": 1} | options)
        data.setup()
        return data.train

    return prompts


def text(prompts):
    tokenizer = char_tokenizer()
    return [tokenizer.decode(prompt.ids) for prompt in prompts]


# Files ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", '\ufeff{"prompt": "é", "answer": "2"}\n\n\ufeff{"prompt": "b", "answer": "3"}'),
        ("a.jsonl", '{"prompt": "é", "answer": "2"}\r\n{"prompt": "b", "answer": "3"}\r\n'),
        ("a.json", '\ufeff[{"prompt": "é", "answer": "2"},\n {"prompt": "b", "answer": "3"}]'),
        ("a.json", '{"prompt": "\\u00e9", "answer": "2"}\n{"prompt": "b", "answer": "3"}\n'),
        ("a.csv", '\ufeffprompt,answer\n"é",2\n\nb,3\n'),
        ("A.JSON", '[{"prompt": "é", "answer": "2"}, {"prompt": "b", "answer": "3"}]'),
    ],
)
def test_files_with_the_same_rows(read, name, content):
    assert [(p.messages, p.columns) for p in read(content, name=name)] == [
        ("é", {"answer": "2"}),
        ("b", {"answer": "3"}),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", GOOD.encode("utf-16"), r"a\.jsonl: the file is UTF-16, not UTF-8; convert it"),
        ("a.jsonl", GOOD.encode("utf-16-le"), r"a\.jsonl: the file is UTF-16"),
        ("a.csv", "prompt\nb".encode("utf-16"), r"a\.csv: the file is UTF-16"),
        ("a.jsonl", b"\0" * 99, r"a\.jsonl: the file is binary or compressed"),
        ("a.jsonl", gzip.compress(GOOD.encode(), mtime=0), r"a\.jsonl: the file is binary or compressed"),
        ("a.jsonl", GOOD.encode() + '{"prompt": "größer"}'.encode("latin-1"), r"line 2: the byte 0xf6 in column 15"),
        ("a.json", '[\n{"prompt": "größer"}]'.encode("latin-1"), r"a\.json, line 2: the byte 0xf6"),
        ("a.jsonl", GOOD + '{"prompt": "\\ud83d", "answer": "2"}', r"line 2: \\ud83d is half of a surrogate pair"),
        ("a.jsonl", GOOD + '{"prompt": "b", "answer": ["\\uDE00"]}', r"line 2: \\ude00 is half of a surrogate pair"),
        ("a.jsonl", GOOD.encode() + b'{"prompt": "\xed\xa0\xbd"}', r"line 2: the byte 0xed"),
        ("a.jsonl", GOOD + f'{{"prompt": "b", "answer": {"9" * 5000}}}', r"line 2: an integer has thousands"),
        ("a.jsonl", GOOD + '{"prompt": ' + "[" * 100_000, r"line 2: (objects and lists are nested too|not JSON)"),
        ("a.jsonl", "", "which has no rows"),
        ("a.json", "[]", "which has no rows"),
        ("a.csv", "prompt,answer\n", "which has no rows"),
        ("a.json", '[{"prompt": "b"}, 3]', r"row 1: a row must be an object with a prompt, not int"),
        ("a.json", '[{"prompt": "b"}', r"a\.json: not JSON"),
        ("a.json", '{\n "rows": []}', r"a\.json, line 1: not JSON"),
        ("a.csv", "prompt,answer\nb,1\nc,2,3\n", r"line 3: the line has 3 values for the 2 columns"),
        ("a.csv", "prompt,prompt\nb,1\n", "two columns have the same name"),
        ("a.csv", 'prompt\n"b"c\n', r"line 2: not CSV"),
        ("a.csv", 'prompt\n"[{\'role\': \'user\'}]"\n', r"line 2: the prompt is text that contains chat messages"),
        ("a.parquet", b"garbage", r"a\.parquet: the file can't be read as parquet"),
        ("a.parquet", b"", r"a\.parquet: the file can't be read as parquet"),
        ("a.txt", GOOD, r"a\.txt is not a \.jsonl, \.json, \.csv \(each also with \.gz\), \.parquet or \.arrow file"),
        ("a.jsonl.gz", GOOD, r"a\.jsonl\.gz, after line 0: the file is not gzip, or damaged"),
        ("a.jsonl.gz", gzip.compress(GOOD.encode() * 2)[:-12], r"a\.jsonl\.gz, after line \d: the file is not gzip"),
        ("a.parquet.gz", GOOD, r"a\.parquet\.gz is not a \.jsonl"),
        ("a.arrow", b"garbage", r"a\.arrow: the file can't be read as Arrow"),
        ("a.arrow", b"", r"a\.arrow: the file can't be read as Arrow"),
        ("noending", GOOD, r"noending is not a \.jsonl"),
    ],
    ids=lambda value: repr(value)[:30],
)  # fmt: skip
def test_files_that_cannot_be_read(read, name, content, message):
    with pytest.raises(UserError, match=message) as refused:
        read(content, name=name)
    assert "\n" not in str(refused.value)


def test_emoji_escaped_as_surrogate_pairs_are_characters(read):
    assert read('{"prompt": "\\ud83d\\ude00"}')[0].messages == "😀"


def test_parquet_with_text_that_is_not_utf8(read, tmp_path):
    broken = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff"))
    pa.parquet.write_table(pa.table({"prompt": broken}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"near row 0: a text is not UTF-8"):
        read((tmp_path / "b.parquet").read_bytes(), name="a.parquet")


def test_parquet_with_two_columns_of_one_name(read, tmp_path):
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["prompt", "prompt"])
    pa.parquet.write_table(twice, tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"two columns have the same name: prompt, prompt"):
        read((tmp_path / "b.parquet").read_bytes(), name="a.parquet")


def test_shards_and_patterns(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("data").mkdir()
    pa.parquet.write_table(pa.table({"prompt": ["c"]}), "data/train-00001-of-00002.parquet")
    pa.parquet.write_table(pa.table({"prompt": ["a", "b"]}), "data/train-00000-of-00002.parquet")
    Path("data/test.jsonl").write_text('{"prompt": "d"}')

    def prompts(source, **options):
        data = PromptDataModule(source, tokenizer=tokenizer, prompts_per_rollout=1, shuffle=False, **options)
        data.setup()
        return data

    shards = prompts("data/train-*.parquet")
    assert [(p.index, p.messages, p.place) for p in shards.train] == [
        (0, "a", "data/train-00000-of-00002.parquet, row 0"),
        (1, "b", "data/train-00000-of-00002.parquet, row 1"),
        (2, "c", "data/train-00001-of-00002.parquet, row 0"),
    ]
    assert len(prompts("data/train-*.parquet", size=2).train) == 2
    assert [p.messages for p in prompts("data/t*").train] == ["d", "a", "b", "c"]
    for source, message in {
        "data/train.json": "'data/train.json', but there is no such file",
        "data/none-*": "no file matches it",
        "data": r"set data/\*\.jsonl",
        "data/nothing/here": "there is no such folder",
    }.items():
        with pytest.raises(UserError, match=message):
            prompts(source)
    with pytest.raises(UserError, match=r"data\.validation_source is 'no\.jsonl', but there is no such file"):
        prompts("data/test.jsonl", validation_source="no.jsonl")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read any file")
def test_a_file_that_may_not_be_read(read, tmp_path):
    (tmp_path / "a.jsonl").touch(mode=0)
    with pytest.raises(UserError, match="Permission denied"):
        PromptDataModule(str(tmp_path / "a.jsonl"), tokenizer=char_tokenizer()).setup()


def test_a_data_set_that_cannot_be_reached_is_refused_after_one_request(monkeypatch, tokenizer):
    class Hub:
        def repo_info(self, name, **options):
            assert (name, options["repo_type"]) == ("nobody/nothing", "dataset")
            raise ConnectionError("no route")

    model_files.hub_reachable.cache_clear()
    monkeypatch.setattr(model_files, "HfApi", Hub)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: pytest.fail("it tries again"))
    with pytest.raises(UserError, match=r"'nobody/nothing', which can't be loaded .*the hub can't be reached"):
        PromptDataModule("nobody/nothing", tokenizer=tokenizer).setup()
    model_files.hub_reachable.cache_clear()


# Rows ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "", "answer": "10"}, "line 2: the prompt is empty"),
        ({"prompt": "b", "answer": "14", "hint": "x"}, "line 2: .* differs from the first row in the columns hint"),
        ({"prompt": "b"}, "line 2: .* differs from the first row in the columns answer"),
        ({"prompt": [{"role": "user", "content": " "}], "answer": ""}, "line 2: .*none of its messages has text"),
        ({"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "answer": ""},
         "line 2: a message has a part of type 'image_url'; only parts of type 'text'"),
        ({"prompt": [{"role": "user", "content": [7]}], "answer": ""}, "line 2: a message has a part of type 'int'"),
        ({"prompt": [{"role": "assistant", "content": None}], "answer": ""}, "line 2: the content of a message must"),
        ({"prompt": HISTORY[:2], "answer": ""}, "line 2: the last message calls tools"),
        ({"prompt": [HISTORY[0] | {"tool_calls": ["add"]}], "answer": ""}, "line 2: a tool call must be an object"),
        ({"prompt": '[{"role": "user", "content": "b"}]', "answer": ""}, "line 2: the prompt is text that contains"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_used(read, row, message):
    with pytest.raises(UserError, match=message):
        read([{"prompt": "a", "answer": "1"}, row])


def test_text_parts_are_joined(read):
    parts = [{"type": "text", "text": "What is 0 + 0?"}, {"type": "text", "text": "Be brief."}]
    one, two = read([{"prompt": [{"role": "user", "content": parts[:n]}]} for n in (1, 2)])
    assert text([one, two]) == ["<user>What is 0 + 0?<assistant>", "<user>What is 0 + 0?\nBe brief.<assistant>"]
    assert two.messages == [{"role": "user", "content": "What is 0 + 0?\nBe brief."}]


def test_verls_ground_truth_where_the_answer_is_null(read):
    rows = [{"prompt": "a", "answer": answer, "reward_model": {"ground_truth": "4"}} for answer in (None, "5")]
    assert [p.columns["answer"] for p in read(rows)] == ["4", "5"]


@pytest.mark.parametrize("validation", [{"validation_source": True}, {"validation_size": 2, "seed": 3}])
def test_rewards_check_held_out_rows_too_and_name_the_line(tmp_path, tiny_model_path, validation):
    train, held_out = tmp_path / "train.jsonl", tmp_path / "val.jsonl"
    rows = [json.dumps({"prompt": letter, "answer": "1"}) for letter in "abcd"]
    bad = json.dumps({"prompt": "e", "answer": ["1", "1.0"]})
    if "validation_source" in validation:
        train.write_text("\n".join(rows))
        held_out.write_text("\n".join([rows[0], bad]))
        validation, where = {"validation_source": str(held_out)}, r"val\.jsonl, line 2: "
    else:
        train.write_text("\n".join([*rows[:2], bad]))
        where = r"train\.jsonl, line 3: "
    data = PromptDataModule(str(train), prompts_per_rollout=1, **validation)
    policy = module(tiny_model_path, rewards=[ExactMatch()], micro_batch_size=4)
    with pytest.raises(UserError, match=where + ".*neither text nor"):
        fit(tmp_path / "run", policy, data, accumulate=1)


def test_tokens_that_the_embedding_lacks_are_named_with_the_row(tmp_path, tiny_model_path):
    tokenizer = char_tokenizer()
    tiny_llama(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "model")
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "a", "answer": "a"}\n{"prompt": "<new>", "answer": "b"}')
    data = PromptDataModule(str(path), prompts_per_rollout=1)
    with pytest.raises(UserError, match=r"line 2: the prompt has the token '<new>' with the id 106, .* has 106 rows"):
        fit(tmp_path / "run", module(str(tmp_path / "model"), micro_batch_size=4), data)


# Templates -----------------------------------------------------------------------------------------------------------

LOOP = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system message') }}{% endif %}" + LOOP
SYSTEM = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "b"}]
PREFILL = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "<think>\n"}]


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (NO_SYSTEM, SYSTEM, r"accepts no system message \(TemplateError: No system message\)"),
        ("{{ raise_exception('Roles must alternate') }}", SYSTEM, r"can't render this prompt \(TemplateError: Roles"),
        ("{{ messages.__class__.__mro__ }}", SYSTEM, r"can't render this prompt \(SecurityError"),
        ("{% for m in messages %}", SYSTEM, r"can't render this prompt \(TemplateSyntaxError"),
        ("{{ messages[5]['content'] + '' }}", SYSTEM, r"can't render this prompt \(UndefinedError"),
        ("{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}", PREFILL,
         r"can't render this prompt \(ValueError: continue_final_message is set but the final message does not appear"),
        (LOOP, HISTORY, r"omits the assistant's tool calls \(such as that of add\)"),
        ("no messages {{ '' }}", HISTORY, r"omits the assistant's tool calls"),
    ],
)  # fmt: skip
def test_templates_that_refuse_a_prompt(read, template, messages, message):
    with pytest.raises(UserError, match=r"train\.jsonl, line 2: .*" + message) as refused:
        read([{"prompt": "a"}, {"prompt": messages}], chat_template=template)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", ["m['content']", "m['content'] | trim"])
@pytest.mark.parametrize("beginning", ["<think>\n", "Let me think", " So"])
def test_a_beginning_is_kept_to_the_character(read, content, beginning):
    template = LOOP.replace("m['content']", content) + "<eos>"
    messages = [PREFILL[0], {"role": "assistant", "content": beginning}]
    kept = beginning if "trim" not in content else beginning.lstrip()
    assert text(read([{"prompt": messages}], chat_template=template)) == [f"<user>b<assistant>{kept}"]


def test_a_null_content_is_kept_for_templates_that_test_for_it(read):
    tests = "{% for m in messages %}{% if m['content'] is none %}{{ m['tool_calls'] }}{% endif %}{% endfor %}"
    assert "add" in text(read([{"prompt": HISTORY}], chat_template=tests))[0]
    strict = LOOP.replace("{{ m['content'] }}", "{{ m['content'] + (m['tool_calls'] | string) }}")
    assert "add" in text(read([{"prompt": HISTORY}], chat_template=strict))[0]


def test_arguments_of_tool_calls_may_be_json_text(read):
    as_text = copy.deepcopy(HISTORY)
    as_text[1]["tool_calls"][0]["function"]["arguments"] = '{"a": 0}'
    prompts = read([{"prompt": HISTORY}, {"prompt": as_text}], chat_template=WITH_TOOLS)
    assert text(prompts) == ['<user>What is 0 + 0?<assistant>add({"a": 0})<tool>0<assistant>'] * 2


@pytest.mark.parametrize("spelled", [lambda value: value, json.dumps], ids=["objects", "json"])
def test_tools_and_template_arguments_of_a_row(read, spelled):
    user = [{"role": "user", "content": "b"}]
    rows = [
        {"prompt": user, "tools": spelled([TOOL]), "chat_template_kwargs": spelled({"mood": "calm"})},
        {"prompt": user, "tools": None, "chat_template_kwargs": None},
    ]
    with_tools, without = text(read(rows, chat_template=WITH_TOOLS, chat_template_args={"mood": "any"}))
    assert with_tools == f"[{json.dumps([TOOL])}]<user>b<calm><assistant>"
    assert without == "<user>b<any><assistant>"


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("tools", ["add"], "line 1: the column tools must be a list of JSON schemas"),
        ("tools", "{", "line 1: the text in the column tools is not JSON"),
        ("chat_template_kwargs", [1], "line 1: the column chat_template_kwargs must be an object"),
        ("chat_template_kwargs", {"tokenize": True}, "line 1: .*tokenize"),
    ],
)
def test_tools_and_template_arguments_that_are_none(read, column, value, message):
    with pytest.raises(UserError, match=message):
        read([{"prompt": [{"role": "user", "content": "b"}], column: value}], chat_template=WITH_TOOLS)


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([{"prompt": [*HISTORY[:1], {"role": "assistant", "content": "It is 0."}]}] * 2, {},
         "2 prompts end with an assistant message, which the completion will continue"),
        ([{"prompt": HISTORY[:1], "tools": [TOOL]}] * 2, {}, "the chat template omits the tools (add)"),
        ([{"prompt": "b", "tools": [TOOL]}] * 2, {}, "the prompt is plain text, so its tools"),
        ([{"prompt": HISTORY[:1]}] * 2, {"chat_template_args": {"enable_thinking": False}},
         "the chat template has no variable 'enable_thinking'"),
        ([{"prompt": SYSTEM}] * 2, {"chat_template": "{{ messages[-1]['content'] }}"},
         "omits or changes a message with the role 'system'"),
    ],
)  # fmt: skip
def test_what_is_probably_not_meant_is_said_once(read, caplog, rows, options, said):
    with caplog.at_level(logging.WARNING):
        read(rows, **options)
    assert caplog.text.count(said) == 1 and "line 1" in caplog.text


# Token ids -----------------------------------------------------------------------------------------------------------


def wrapping():
    """Puts <unk> before a text and <eos> after it."""
    tokenizer = char_tokenizer()
    tokenizer.bos_token = "<unk>"
    ids = [("<unk>", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<unk> $A <eos>", special_tokens=ids)
    return tokenizer


def test_a_beginning_of_sequence_token_of_the_prompts_own_is_not_doubled(read):
    prompts = read([{"prompt": begun} for begun in ("a", "<unk>a", " \n<unk>a", "a<unk>", " a")], tokenizer=wrapping())
    assert text(prompts) == ["<unk>a", "<unk>a", "<unk>a", "<unk>a<unk>", "<unk> a"]


PROMPTS = st.lists(
    st.one_of(
        st.text("ab <>", min_size=1, max_size=9),
        st.sampled_from(["<unk>a", " <unk>b", "a<eos>", "<pad>"]),
        st.just([{"role": "user", "content": "a"}]),
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=50)
@given(prompts=PROMPTS, chunk=st.integers(1, 5), wrapped=st.booleans())
def test_rows_encoded_together_have_the_ids_of_each_alone(prompts, chunk, wrapped):
    tokenizer = wrapping() if wrapped else char_tokenizer()
    rows = [(f"row {i}", {"prompt": prompt}) for i, prompt in enumerate(prompts)]
    encoder = encoding.Encoder(tokenizer=tokenizer)
    alone = [next(encoder.encode([row]))[0].ids for row in rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "CHUNK", chunk)
        together = [prompt for prompts in encoder.encode(rows) for prompt in prompts]
    assert [prompt.ids for prompt in together] == alone
    assert [prompt.index for prompt in together] == list(range(len(rows)))


def test_more_rows_than_are_encoded_at_once(read):
    rows = [{"prompt": f"{i:05}"} for i in range(2 * CHUNK + 1)]
    prompts = read(rows)
    assert text(prompts) == [row["prompt"] for row in rows]
