"""Prompts that are read while they are served: their order, several passes, exact resume, and what is refused."""

import json

import pytest
from fitting import fit, module
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_grpo.data import DifficultySampler, PromptDataModule, Source, encoding
from lightning_grpo.errors import UserError


@pytest.fixture
def file(tmp_path, monkeypatch):
    """Seven rows, of which one is too long and one is held out."""
    monkeypatch.setattr(encoding, "SMALL_CHUNK", 2)
    monkeypatch.setattr("lightning_grpo.data.dataset.FIRST", 3)
    prompts = ["a", "b", "c" * 9, "d", "e", "f", "g"]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "answer": p}) + "\n" for p in prompts))
    (tmp_path / "held_out.jsonl").write_text(json.dumps({"prompt": "e", "answer": "e"}) + "\n")
    return path


def streamed(file, tokenizer, **options):
    data = PromptDataModule(
        str(file),
        streaming=True,
        validation_source=str(file.with_name("held_out.jsonl")),
        max_prompt_length=8,
        tokenizer=tokenizer,
        **{"prompts_per_rollout": 2} | options,
    )
    data.setup()
    return data


def serve(data, count, *, steps=1):
    """The prompts of the next ``count`` steps, of which every rollout has ``steps``."""
    served = []
    for _ in range(count):
        data._stream.advance(data.prompts_per_rollout, steps)
        data.train.forget(min(data._stream.rows))
        served.append("".join(data.train[i].messages for i in data._stream.rows))
    return served


def test_prompts_come_in_order_pass_after_pass_without_held_out_and_long_ones(file, tokenizer):
    data = streamed(file, tokenizer)
    assert serve(data, 6) == ["ab", "df", "ga", "bd", "fg", "ab"]
    assert len(data.train._prompts) <= 2 + encoding.SMALL_CHUNK
    assert [p.messages for p in data.validation] == ["e"]


def test_only_rows_near_the_served_ones_are_read(file, tokenizer):
    good = file.read_text()
    file.write_text(good + "not a row\n")
    data = streamed(file, tokenizer)
    assert serve(data, 2) == ["ab", "df"]
    with pytest.raises(UserError, match=r"a.jsonl, line 8: not JSON"):
        serve(data, 1)


@pytest.mark.parametrize("unfinished", [0, 1])
@pytest.mark.parametrize("done", [1, 2, 3, 4, 7])
def test_a_stream_continues_where_it_was(file, tokenizer, done, unfinished):
    whole = serve(streamed(file, tokenizer), 12, steps=2)
    first = streamed(file, tokenizer)
    assert serve(first, done, steps=2) == whole[:done]
    second = streamed(file, tokenizer)
    second.load_state_dict(first.state_dict(unfinished))
    served = done - unfinished
    assert serve(second, 12 - served, steps=2) == whole[served:]


def test_a_run_that_is_resumed_trains_on_the_same_prompts(tmp_path, tiny_model_path, file):
    def run(folder, **options):
        prompts = PromptDataModule(str(file), streaming=True, prompts_per_rollout=2, max_prompt_length=8, seed=1)
        saved = ModelCheckpoint(tmp_path / "saved", filename="{step}", every_n_train_steps=1, save_top_k=-1)
        policy = module(tiny_model_path, num_generations=2, micro_batch_size=2)
        return fit(
            folder, policy, prompts, steps=5, accumulate=2, callbacks=[saved], enable_checkpointing=True, **options
        )

    whole = run(tmp_path / "whole")
    rest = run(tmp_path / "rest", ckpt_path=str(tmp_path / "saved" / "step=3.ckpt"))
    assert len(whole["loss"]) == 5
    assert rest["loss"] == whole["loss"][3:]
    assert rest["completions/mean_length"] == whole["completions/mean_length"][3:]


def test_the_length_of_a_streamed_run_must_be_given(tmp_path, tiny_model_path, file):
    prompts = PromptDataModule(str(file), streaming=True, prompts_per_rollout=2, max_prompt_length=8)
    policy = module(tiny_model_path, num_generations=2, micro_batch_size=2)
    with pytest.raises(UserError, match=r"set trainer.max_steps"):
        fit(tmp_path, policy, prompts, steps=-1, accumulate=2, max_epochs=1)


def test_a_checkpoint_of_another_stream_is_refused(file, tokenizer):
    state = streamed(file, tokenizer).state_dict()
    file.write_text(file.read_text().replace('"answer": "b"', '"answer": "x"'))
    with pytest.raises(UserError, match="are not the same"):
        streamed(file, tokenizer).load_state_dict(state)


def test_a_size_limits_the_pass(file, tokenizer):
    assert serve(streamed(file, tokenizer, size=4), 3) == ["ab", "da", "bd"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampler": DifficultySampler()}, "unset data.sampler"),
        ({"source": {"a": Source(source="x.jsonl")}}, "needs a single data.source"),
        ({"validation_size": 2}, "set data.validation_source"),
    ],
    ids=["sampler", "sources", "held out"],
)
def test_options_that_cannot_be_streamed(options, message, tokenizer):
    with pytest.raises(UserError, match=message):
        PromptDataModule(**{"source": "a.jsonl", "streaming": True} | options)


def test_sources_that_cannot_be_streamed(file, tokenizer):
    with pytest.raises(UserError, match="letters generates its rows"):
        PromptDataModule("letters", streaming=True, tokenizer=tokenizer).setup()
    with pytest.raises(UserError, match="has no prompt of at most max_prompt_length = 0 tokens"):
        data = PromptDataModule(str(file), streaming=True, tokenizer=tokenizer, max_prompt_length=1)
        data.max_prompt_length = 0
        data.setup()
