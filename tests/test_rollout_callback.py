"""The callbacks that give a module its engine."""

from types import SimpleNamespace

import pytest
import torch
from engines import Sampler, loader, trainer_with
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from lightning_grpo.errors import UserError
from lightning_grpo.rollout import (
    HFEngine,
    HFRollout,
    RolloutCallback,
    Sampling,
    SyncedEngine,
    VLLMProcessRollout,
    VLLMRollout,
    VLLMServerRollout,
    WeightSyncError,
    eos_token_ids,
    mismatch,
)
from lightning_grpo.rollout.vllm import callback as vllm_rollout
from lightning_grpo.rollout.vllm import engine as vllm_engine


@pytest.fixture(params=["hf", pytest.param("vllm", marks=pytest.mark.vllm)])
def callback(request):
    if request.param == "hf":
        return HFRollout(max_num_seqs=3)
    return VLLMRollout(max_num_seqs=8, dtype="float32")


def test_every_step_samples_from_the_moved_policy(callback, tiny_model_path, tmp_path):
    module = Sampler(tiny_model_path)
    trainer_with(callback, tmp_path).fit(module, loader())
    assert [report.version for report, _ in module.rounds] == [0, 1, 2]
    assert [{v for group in groups for c in group for v in c.versions} for _, groups in module.rounds] == [
        {0},
        {1},
        {2},
    ]
    assert all(report.mismatch.max < 1e-3 for report, _ in module.rounds)
    assert module.engine is None
    assert not torch.distributed.is_initialized()
    callback.teardown(None, module, "fit")


@pytest.mark.vllm
def test_the_mismatch_of_a_bfloat16_engine_is_that_of_rounding(tiny_model_path, tmp_path):
    """The policy trains in float32. Pinned, so that a change of vLLM or of the sync that loosens it is seen."""
    module = Sampler(tiny_model_path, lr=0.0)
    trainer_with(VLLMRollout(max_num_seqs=8, dtype="bfloat16"), tmp_path, steps=1).fit(module, loader())
    ((_, groups),) = module.rounds
    rows = [(prompt, c) for prompt, group in zip(Sampler.prompts, groups, strict=True) for c in group]
    scored = module.score_tokens([prompt + c.token_ids for prompt, c in rows])
    policy = torch.cat([s[len(prompt) - 1 :] for s, (prompt, _) in zip(scored, rows, strict=True)])
    seen = mismatch(torch.tensor([logprob for _, c in rows for logprob in c.logprobs]), policy)
    assert 1e-4 < seen.mean < 0.01 and seen.max < 0.05 and 0 < seen.kl < 1e-3


@pytest.fixture
def gpt2_path(tokenizer, tmp_path):
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=64, n_layer=2, n_head=2, **ids)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return str(tmp_path / "gpt2")


@pytest.mark.vllm
@pytest.mark.parametrize(("path", "all_compared"), [("untied_model_path", True), ("gpt2_path", False)])
def test_other_models_are_synced_and_compared_as_far_as_they_can_be(path, all_compared, request, tmp_path, caplog):
    """An untied head and biases in fused layers; and a model whose matrices vLLM transposes."""
    module = Sampler(request.getfixturevalue(path))
    trainer_with(VLLMRollout(max_num_seqs=8, dtype="float32"), tmp_path, steps=2).fit(module, loader())
    assert [report.version for report, _ in module.rounds] == [0, 1]
    for report, _ in module.rounds:
        assert report.mismatch.max < 1e-3
        assert report.compared == (report.tensors if all_compared else 0)
    assert ("cannot be compared bitwise" in caplog.text) is not all_compared


def test_an_exception_in_training_closes_the_engine(callback, tiny_model_path, tmp_path):
    module = Sampler(tiny_model_path, fail_at=1)
    with pytest.raises(RuntimeError, match="a fault in training"):
        trainer_with(callback, tmp_path).fit(module, loader())
    assert module.engine is None
    assert not torch.distributed.is_initialized()


def test_validation_alone_gets_an_engine(tiny_model_path, tmp_path):
    module = Sampler(tiny_model_path)
    trainer_with(HFRollout(), tmp_path, limit_val_batches=1).validate(module, loader(), verbose=False)
    assert len(module.rounds) == 1


def test_dropout_does_not_disturb_the_proof(tiny_model_path, tmp_path):
    class WithDropout(Sampler):
        def configure_model(self):
            super().configure_model()
            for layer in self.policy.model.layers:
                layer.self_attn.attention_dropout = 0.5
            self.policy.train()

        @torch.no_grad()
        def score_tokens(self, sequences):
            logits = [self.policy(torch.tensor([s])).logits[0, :-1] for s in sequences]
            ids = [torch.tensor(s[1:])[:, None] for s in sequences]
            return [z.log_softmax(-1).gather(-1, i)[:, 0] for z, i in zip(logits, ids, strict=True)]

    module = WithDropout(tiny_model_path)
    trainer_with(HFRollout(), tmp_path).fit(module, loader())
    assert len(module.rounds) == 3 and module.policy.training


def test_a_policy_that_lies_about_its_weights_stops_the_run(tiny_model_path, tmp_path):
    class Liar(Sampler):
        def score_tokens(self, sequences):
            return [scores + 0.01 * (self.trainer.global_step > 0) for scores in super().score_tokens(sequences)]

    module = Liar(tiny_model_path)
    with pytest.raises(WeightSyncError, match="after the sync to policy version 1"):
        trainer_with(HFRollout(), tmp_path).fit(module, loader())
    assert len(module.rounds) == 1


def test_an_engine_in_the_trainers_process_does_not_sample_in_the_background(tiny_model_path):
    engine = HFEngine(AutoModelForCausalLM.from_pretrained(tiny_model_path), eos_token_ids=[1], pad_id=0)
    synced = SyncedEngine(engine, version=lambda: 0, weights=list, score=engine.logprobs, vocab_size=106)
    with pytest.raises(TypeError, match="VLLMProcessRollout or VLLMServerRollout"):
        synced.run_in_background(lambda: None)


@pytest.mark.parametrize(
    ("version", "error", "message"),
    [(None, ValueError, r"pip install 'lightning-grpo\[vllm\]'"), ("0.29.1", ValueError, "vLLM 0.29.1")],
)
def test_a_missing_or_other_vllm_is_refused_at_start(version, error, message, monkeypatch, tiny_model_path, tmp_path):
    monkeypatch.setattr(vllm_engine, "vllm_version", lambda: version)
    with pytest.raises(error, match=message):
        trainer_with(VLLMRollout(), tmp_path).fit(Sampler(tiny_model_path), loader())


def test_lengths_beyond_the_model_are_refused(tiny_model_path, tmp_path):
    module = Sampler(tiny_model_path)
    module.max_completion_length = 300
    with pytest.raises(ValueError, match="max_prompt_length 16 \\+ max_completion_length 300 = 316"):
        trainer_with(HFRollout(), tmp_path).fit(module, loader())


def test_too_little_memory_is_refused_with_the_numbers(tiny_model_path, tmp_path, monkeypatch):
    available = type("Memory", (), {"available": 1000})
    monkeypatch.setattr(vllm_rollout.psutil, "virtual_memory", lambda: available)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MemoryError, match=r"one sequence of 41 tokens needs .* GiB .* lower max_completion_length"):
        trainer_with(VLLMRollout(), tmp_path).fit(Sampler(tiny_model_path), loader())


@pytest.mark.vllm
@pytest.mark.parametrize("size", [1 << 50, 1])
def test_a_cache_that_does_not_fit_is_refused_with_the_setting(size, tiny_model_path, tmp_path):
    callback = VLLMRollout(kv_cache_memory_bytes=size)
    with pytest.raises(MemoryError, match=f"kv_cache_memory_bytes={size}.*max_completion_length.*vllm-0.log"):
        trainer_with(callback, tmp_path).fit(Sampler(tiny_model_path), loader())
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: VLLMRollout(max_num_seqs=0), "max_num_seqs is 0"),
        (lambda: VLLMRollout(gpu_memory_utilization=1.5), "gpu_memory_utilization is 1.5"),
        (lambda: VLLMServerRollout([]), "urls is empty"),
    ],
)
def test_options_are_checked(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.vllm
def test_an_engine_over_more_ranks_than_there_are_is_refused(tiny_model_path, tmp_path):
    with pytest.raises(ValueError, match="tensor_parallel_size is 2, but the trainer has 1 ranks"):
        trainer_with(VLLMRollout(tensor_parallel_size=2), tmp_path).fit(Sampler(tiny_model_path), loader())


@pytest.mark.vllm
def test_an_engine_that_ranks_share_is_refused_with_an_environment(tiny_model_path, tmp_path):
    module = Sampler(tiny_model_path)
    module.environment = object()
    with pytest.raises(ValueError, match=r"tensor_parallel_size is 2: .*model.environment.* use VLLMProcessRollout"):
        trainer_with(VLLMRollout(tensor_parallel_size=2), tmp_path).fit(module, loader())


def test_stop_strings_reach_the_engine(callback, tiny_model_path, tmp_path):
    """A stop string of one frequent character cuts nearly every completion of the same seeds short."""
    module = Sampler(tiny_model_path, lr=0.0)
    module.sampling = Sampling(stop=list("0123456789abcdefghijklmnopqrstuvwxyz"))
    trainer_with(callback, tmp_path, steps=1).fit(module, loader())
    ((_, groups),) = module.rounds
    for c in (c for group in groups for c in group):
        text = module.tokenizer.decode(c.token_ids[:-1])
        assert c.finish_reason in ("stop", "length")
        assert not any(s in text for s in module.sampling.stop)
    assert any(c.finish_reason == "stop" and c.token_ids[-1] != 1 for group in groups for c in group)


def test_every_end_of_sequence_token_counts(tiny_model_path, tokenizer):
    policy = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    policy.generation_config.eos_token_id = [1, 5]
    assert eos_token_ids(policy, tokenizer) == [1, 5]
    policy.generation_config.eos_token_id = 7
    assert eos_token_ids(policy, tokenizer) == [1, 7]


def test_a_callback_without_an_engine_cannot_be_made():
    with pytest.raises(TypeError, match="build_engine"):
        RolloutCallback()


@pytest.mark.parametrize("make", [VLLMRollout, lambda **kw: VLLMServerRollout(urls=["http://localhost:1"], **kw)])
def test_sampling_arguments_that_bias_the_gradient_are_refused(make, monkeypatch):
    monkeypatch.setattr("lightning_grpo.rollout.vllm.callback.require_vllm", lambda: None)
    callback = make(sampling_args={"min_tokens": 8, "seed": 1})
    trainer = SimpleNamespace(precision="32-true")
    plain = SimpleNamespace(objective=SimpleNamespace(rollout_correction=None))
    with pytest.raises(ValueError, match="sampling_args has min_tokens"):
        callback.setup(trainer, plain, "fit")
    callback.setup(trainer, plain, "validate")
    callback.setup(trainer, SimpleNamespace(objective=SimpleNamespace(rollout_correction=object())), "fit")


@pytest.mark.parametrize("kind", [VLLMRollout, VLLMProcessRollout])
@pytest.mark.parametrize(
    ("named", "sampling", "held_out", "sampling_args"),
    [
        (r"model\.sampling\.min_p is 0\.1", Sampling(min_p=0.1), Sampling(), {}),
        (r"model\.validation_sampling\.min_p is 0\.2", Sampling(), Sampling(min_p=0.2), {}),
        (r"sampling_args\.logit_bias is \{7: 1\.0\}", Sampling(), Sampling(), {"logit_bias": {7: 1.0}}),
    ],
)
def test_what_vllm_cannot_speculate_with_is_refused_at_start(
    kind, named, sampling, held_out, sampling_args, monkeypatch
):
    monkeypatch.setattr("lightning_grpo.rollout.vllm.callback.require_vllm", lambda: None)
    module = SimpleNamespace(sampling=sampling, validation_sampling=held_out)
    trainer = SimpleNamespace(precision="32-true")
    speculates = kind(engine_args={"speculative_config": {"method": "ngram"}}, sampling_args=sampling_args)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match=named):
        speculates.setup(trainer, module, "validate")
    kind(sampling_args=sampling_args).setup(trainer, module, "validate")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="on a CPU vLLM then samples from another distribution"):
        speculates.setup(trainer, module, "validate")


@pytest.mark.parametrize("kind", [VLLMRollout, VLLMProcessRollout])
def test_an_engine_too_short_for_prompt_and_completion_is_refused_at_start(kind, monkeypatch):
    monkeypatch.setattr("lightning_grpo.rollout.vllm.callback.require_vllm", lambda: None)
    module = SimpleNamespace(max_prompt_length=33, max_completion_length=8)
    with pytest.raises(ValueError, match=r"engine_args.max_model_len is 37, but .* = 41 tokens"):
        kind(engine_args={"max_model_len": 37}).setup(SimpleNamespace(precision="32-true"), module, "fit")
    for enough in (41, -1):
        kind(engine_args={"max_model_len": enough}).setup(SimpleNamespace(precision="32-true"), module, "fit")
