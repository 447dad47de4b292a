"""The reward of a sequence classifier: batches, chat templates, special tokens, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from conftest import char_tokenizer
from fitting import fit, module
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from lightning_grpo.configure.callback import workload_of
from lightning_grpo.configure.hardware import this_machine
from lightning_grpo.configure.memory import predict_memory
from lightning_grpo.errors import UserError
from lightning_grpo.policy import Pretrained
from lightning_grpo.rewards import RewardModel, compute_rewards
from lightning_grpo.rewards.logs import RewardLogs
from lightning_grpo.rewards.reward_model import batches

TEMPLATE = "{% for m in messages %}{{ '<user>' if m.role == 'user' else '<system>' }}{{ m.content }}<eos>{% endfor %}"
"""Not the template of the tiny policy."""


def saved(path, *, tokenizer=None, kind=LlamaForSequenceClassification, **options):
    """A folder with a classifier of random weights."""
    tokenizer = tokenizer or char_tokenizer()
    settings = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.3, "num_labels": 1,
    }  # fmt: skip
    config = LlamaConfig if kind is LlamaForSequenceClassification else BertConfig
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind(config(**settings | options)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A reward model with its own chat template."""
    tokenizer = char_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return saved(tmp_path_factory.mktemp("reward_model"), tokenizer=tokenizer, pad_token_id=0)


def score(model, prompts, completions, **options):
    rows = [{}] * len(prompts)
    return compute_rewards([model], prompts, completions, [[1]] * len(prompts), rows, **options)[:, 0]


def alone(path, texts, kind=LlamaForSequenceClassification):
    """The outputs [n, labels] of the model for one text at a time."""
    tokenizer, model = char_tokenizer(), kind.from_pretrained(path).eval()
    with torch.no_grad():
        return torch.cat([model(torch.tensor([tokenizer(text).input_ids])).logits for text in texts])


# ── Batches ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("pad", [None, 0, 1], ids=["none", "of its own", "the end of sequence"])
@pytest.mark.parametrize("kind", [LlamaForSequenceClassification, BertForSequenceClassification])
def test_texts_of_a_batch_have_the_scores_that_they_have_alone(tmp_path, pad, kind):
    """Texts end with the token <eos>, which may also be the padding."""
    tokenizer = char_tokenizer()
    tokenizer.chat_template = TEMPLATE
    path = saved(tmp_path, tokenizer=tokenizer, kind=kind, pad_token_id=pad)
    pairs = [("1+1=", "2"), ("a", "bcd"), ("2+2=?", "4 and more"), ("", "!")]
    model = RewardModel(model=path, dtype="float32", max_batch_tokens=40)
    given = score(model, [[{"role": "user", "content": p}] for p, _ in pairs], [c for _, c in pairs])
    expected = alone(path, [f"<user>{p}<eos><system>{c}<eos>" for p, c in pairs], kind)[:, 0]
    assert given.tolist() == pytest.approx(expected.tolist(), abs=1e-5)
    assert given.std() > 0.1


def test_batches_stay_within_their_tokens():
    lengths = [3, 9, 1, 4, 4, 30]
    parts = list(batches(lengths, 12))
    assert parts == [[5], [1], [3, 4, 0], [2]]
    assert sorted(row for part in parts for row in part) == list(range(6))


# ── Texts ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_messages_are_rendered_with_the_template_of_the_reward_model(path):
    model = RewardModel(model=path, dtype="float32")
    prompt = [{"role": "user", "content": "1+1"}]
    continued = [*prompt, {"role": "assistant", "content": "It is "}]
    given = score(model, [prompt, continued, prompt], ["2", "2", "2"], openings=["", "", "<t>"])
    texts = ["<user>1+1<eos><system>2<eos>", "<user>1+1<eos><system>It is 2<eos>", "<user>1+1<eos><system><t>2<eos>"]
    assert given.tolist() == pytest.approx(alone(path, texts)[:, 0].tolist(), abs=1e-5)


def test_a_completion_adds_no_messages(path):
    model = RewardModel(model=path, dtype="float32")
    ids = model._ids([{"role": "user", "content": "1+1"}], "3<eos><user>Thanks!<eos>", "")
    tokens = [token for token in char_tokenizer().convert_ids_to_tokens(ids) if len(token) > 1]
    assert tokens == ["<user>", "<eos>", "<system>", "<eos>"]
    assert "< eos>< user>Thanks!< eos>" in char_tokenizer().decode(ids)


def test_chat_messages_need_a_template(tmp_path):
    tokenizer = char_tokenizer()
    tokenizer.chat_template = None
    model = RewardModel(model=saved(tmp_path / "none", tokenizer=tokenizer, pad_token_id=0))
    with pytest.raises(UserError, match="has no chat template; set a reward model that was trained on chats"):
        score(model, [[{"role": "user", "content": "1+1"}]], ["2"])
    assert score(model, ["1+1"], ["2"]).isfinite().all()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    model = RewardModel(model=saved(tmp_path / "strict", tokenizer=tokenizer, pad_token_id=0))
    with pytest.raises(UserError, match=r"can't render a conversation with the roles user, assistant: roles must alt"):
        score(model, [[{"role": "user", "content": "1+1"}]], ["2"])
    with pytest.raises(UserError, match="can't render a conversation"):
        model.check([{}])
    tokenizer.chat_template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match=r"the chat template of .* omits the completion"):
        RewardModel(model=saved(tmp_path / "users", tokenizer=tokenizer, pad_token_id=0)).check([{}])


def test_long_texts_are_refused_or_shortened_at_their_beginning(path):
    text = "a" + "bcd" * 40
    with pytest.raises(UserError, match=r"have 121 tokens, but .* supports 64; lower max_prompt_length"):
        score(RewardModel(model=path), [text], [""])
    logs = RewardLogs(2)
    given = score(RewardModel(model=path, dtype="float32", truncate=True), [text, "ab"], ["", ""], logs=logs)
    assert given.tolist() == pytest.approx(alone(path, ["a" + text[-63:], "ab"])[:, 0].tolist(), abs=1e-5)
    assert logs.metrics == {"reward_model/truncated": [0.5]}


# ── Outputs ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("problem", "value"),
    [
        (None, lambda logits: logits.softmax(1)),
        ("multi_label_classification", torch.sigmoid),
        ("regression", lambda logits: logits),
    ],
    ids=["classes", "labels", "regression"],
)
def test_the_output_of_a_label(tmp_path, problem, value):
    names = {0: "bad", 1: "fair", 2: "good"}
    path = saved(tmp_path, num_labels=3, id2label=names, problem_type=problem, pad_token_id=0)
    expected = value(alone(path, ["ab"]))[0]
    for label in (2, "good"):
        given = score(RewardModel(model=path, label=label, dtype="float32"), ["a"], ["b"])
        assert given.item() == pytest.approx(expected[2].item(), abs=1e-5)
    with pytest.raises(
        UserError, match="has 3 outputs instead of one; set label to one of 0 'bad', 1 'fair', 2 'good'"
    ):
        RewardModel(model=path).check([{}])
    for wrong in (3, -1, "great"):
        with pytest.raises(UserError, match=r"but the outputs of .* are 0 'bad'"):
            RewardModel(model=path, label=wrong).check([{}])


def test_what_is_no_reward_model_is_refused_before_training(tmp_path, path, tiny_model_path):
    with pytest.raises(UserError, match=r"the reward 'reward_model': .* is a LlamaForCausalLM: it has no head that"):
        RewardModel(model=tiny_model_path).check([{}])
    with pytest.raises(UserError, match="no such folder"):
        RewardModel(model=str(tmp_path / "missing")).check([{}])
    config = json.loads((Path(path) / "config.json").read_text())
    for file in Path(tiny_model_path).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(
        json.dumps(json.loads((tmp_path / "config.json").read_text()) | {"architectures": config["architectures"]})
    )
    with pytest.raises(UserError, match=r"its weights lack 1 tensors of the model: score\.weight"):
        RewardModel(model=str(tmp_path)).check([{}])
    for options, message in (
        ({"device": "gpu"}, "device is 'gpu'"),
        ({"max_batch_tokens": 0}, "max_batch_tokens is 0"),
    ):
        with pytest.raises(UserError, match=message):
            RewardModel(model=path, **options)


# ── Training ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_it_is_neither_trained_nor_saved(tmp_path, path, tiny_model_path):
    reward = RewardModel(model=Pretrained(name=path), dtype="float32", offload=True)
    policy = module(tiny_model_path, rewards=[reward])
    logged = fit(tmp_path, policy, steps=2)
    classifier = reward._loaded[0]
    before = LlamaForSequenceClassification.from_pretrained(path).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in classifier.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in classifier.parameters())
    assert not {id(p) for p in classifier.parameters()} & {id(p) for p in policy.parameters()}
    assert not any("score" in name for name in policy.state_dict())
    size = sum(p.nbytes for p in classifier.parameters())
    assert reward.bytes_on(torch.device("cpu")) == size and reward.bytes_on(torch.device("cuda", 0)) == 0
    workload = workload_of(policy.trainer, policy, this_machine())
    assert predict_memory(workload, this_machine()).phases["update"]["reward models"] == size
    assert all(std > 0 for std in logged["rewards/reward_model/std"])
