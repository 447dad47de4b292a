"""vLLM in another process: sampling over HTTP, weights over TCP, faults of endpoints."""

import os
from threading import Event

import pytest
import torch
from test_rollout_callback import Sampler, loader, trainer_with
from transformers import AutoModelForCausalLM

from lightning_grpo.rollout import (
    HFEngine,
    Sampling,
    SyncedEngine,
    VLLMProcessRollout,
    VLLMServerRollout,
    WeightSyncError,
    policy_weights,
    rollout_seeds,
)
from lightning_grpo.rollout.endpoint import Endpoint
from lightning_grpo.rollout.server_engine import ServerEngine
from lightning_grpo.rollout.server_process import ServerProcess
from lightning_grpo.rollout.tail import Tail

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
EOS = 1
PROMPTS = [[4, 60, 16, 5], [4, 60, 16, 5, 8, 9, 10], [7]]
SEEDS = [[rollout_seeds(1, 0, i, g) for g in range(4)] for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def server(tiny_model_path, tmp_path_factory):
    """The server that `VLLMProcessRollout` starts for a module."""
    callback = VLLMProcessRollout(dtype="float32", max_num_seqs=64, cores=sorted(os.sched_getaffinity(0)))
    module = Sampler(tiny_model_path)
    module.max_prompt_length, module.max_completion_length = 7, 245
    module.configure_model()
    trainer = trainer_with(callback, tmp_path_factory.mktemp("run"))
    built = callback.build_engine(trainer, module)
    assert built.logprobs([[4, 5, 6]])[0].shape == (2,)
    built.close()
    server = callback._server
    yield server
    callback.close()
    callback.close()
    assert server.process.returncode is not None


@pytest.fixture
def engine(server):
    engine = ServerEngine([server.url], eos_token_ids=[EOS], api_key=server.api_key)
    yield engine
    engine.close()
    engine.close()


@pytest.fixture
def policy(tiny_model_path):
    return AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)


@pytest.fixture
def synced(engine, policy):
    reference = HFEngine(policy, eos_token_ids=[EOS], pad_id=0)
    synced = SyncedEngine(
        engine,
        version=lambda: synced.turn,
        weights=lambda: policy_weights(policy),
        score=reference.logprobs,
        vocab_size=policy.config.vocab_size,
    )
    synced.turn, synced.reference = 0, reference
    return synced


def perturb(policy, scale=0.02):
    generator = torch.Generator().manual_seed(0)
    for parameter in policy.parameters():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)


def worst(synced, groups, version=None):
    """The largest |Δ log-prob| to the policy as it is now, over all tokens or those that one version sampled."""
    gaps = []
    for p, c in ((p, c) for p, group in zip(PROMPTS, groups, strict=True) for c in group):
        gap = (synced.reference.logprobs([p + c.token_ids])[0][len(p) - 1 :] - torch.tensor(c.logprobs)).abs()
        gaps.append(gap if version is None else gap[torch.tensor(c.versions) == version])
    return torch.cat(gaps).max().item()


def test_samples_follow_the_policy(synced, policy):
    heard = {}
    groups = synced.generate(PROMPTS, Sampling(), max_tokens=32, seeds=SEEDS, on_group=heard.__setitem__)
    assert [heard[i] for i in range(3)] == groups
    assert worst(synced, groups) < 1e-4
    assert synced.last_sync.compared == synced.last_sync.tensors == 20
    perturb(policy)
    synced.turn = 1
    groups = synced.generate(PROMPTS, Sampling(), max_tokens=32, seeds=SEEDS)
    assert worst(synced, groups) < 1e-4
    for c in (c for group in groups for c in group):
        assert set(c.versions) == {1}
        assert (c.finish_reason == "stop") == (c.token_ids[-1] == EOS)
    again = synced.generate(PROMPTS[1:2], Sampling(), max_tokens=32, seeds=SEEDS[1:2])
    assert [c.token_ids for c in again[0]] == [c.token_ids for c in groups[1]]


def test_sampling_ahead_keeps_its_version_while_the_policy_moves(synced, policy):
    ahead = synced.ahead(lambda: synced.generate(PROMPTS, Sampling(), max_tokens=64, seeds=SEEDS))
    perturb(policy)
    synced.turn = 1
    synced.sync()
    assert ahead.done(), "the sync must wait for what samples with the earlier weights"
    assert {v for group in ahead.result() for c in group for v in c.versions} == {0}
    groups = synced.generate(PROMPTS, Sampling(), max_tokens=8, seeds=SEEDS)
    assert worst(synced, groups) < 1e-4 < worst(synced, ahead.result())


def test_weights_updated_in_flight(synced, policy, engine, monkeypatch):
    """Completions go on with the new weights: their later tokens are the new policy's, whatever came before."""
    engine.sampling_args = {"stop_token_ids": []}
    begun, begin = Event(), Tail.begun
    monkeypatch.setattr(Tail, "begun", lambda *args: begun.set() or begin(*args))
    ahead = synced.ahead(lambda: synced.generate(PROMPTS, Sampling(), max_tokens=240, seeds=SEEDS))
    assert begun.wait(60)
    perturb(policy)
    synced.turn = 1
    assert synced.sync(in_flight=True).canary.max < 1e-4
    groups = ahead.result()
    assert all(c.versions == sorted(c.versions) and len(c.versions) == len(c.token_ids) for g in groups for c in g)
    assert any(set(c.versions) == {0, 1} for g in groups for c in g)
    assert worst(synced, groups, version=1) < 1e-4 < worst(synced, groups, version=0)
    # The cache holds nothing of the earlier weights.
    assert worst(synced, engine.generate(PROMPTS, Sampling(), max_tokens=8, seeds=SEEDS)) < 1e-4


def test_the_last_completions_are_cut_off(synced, engine):
    everything = synced.generate(PROMPTS, Sampling(), max_tokens=200, seeds=SEEDS)
    groups = synced.generate(PROMPTS, Sampling(cutoff=0.25), max_tokens=200, seeds=SEEDS)
    pairs = [(cut, whole) for g, w in zip(groups, everything, strict=True) for cut, whole in zip(g, w, strict=True)]
    aborted = [(cut, whole) for cut, whole in pairs if cut.finish_reason == "abort"]
    assert 1 <= len(aborted) <= 9
    for cut, whole in aborted:
        assert 1 <= len(cut.token_ids) == len(cut.logprobs) == len(cut.versions) <= len(whole.token_ids)
        assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert worst(synced, groups) < 1e-4
    assert all(endpoint.in_flight == 0 for endpoint in engine.endpoints)


def test_weights_of_another_run_are_not_sampled_from(synced, engine, server):
    synced.sync()
    other = ServerEngine([server.url], eos_token_ids=[EOS], api_key=server.api_key)
    other.update_weights(synced._weights(), 0)
    other.close()
    with pytest.raises(ConnectionError, match="another run uses it"):
        engine.generate(PROMPTS, Sampling(), max_tokens=4, seeds=SEEDS)


def test_a_tensor_altered_on_its_way_is_named(synced, policy, engine, monkeypatch):
    update = engine.update_weights
    name = "model.layers.1.mlp.up_proj.weight"

    def faulty(weights, version):
        update(((n, w + 1e-6 if n == name else w) for n, w in weights), version)

    monkeypatch.setattr(engine, "update_weights", faulty)
    with pytest.raises(WeightSyncError, match=rf"{name} \(altered in model.layers.1.mlp.gate_up_proj at http"):
        synced.generate(PROMPTS, Sampling(), max_tokens=4, seeds=SEEDS)


def test_a_stale_endpoint_is_named(synced, policy, engine, server, monkeypatch):
    """The endpoint says that it took the weights, and still computes with others."""
    synced.sync()
    monkeypatch.setattr(engine, "update_weights", lambda weights, version: [None for _ in weights])
    monkeypatch.setattr(engine, "held", [])
    perturb(policy)
    synced.turn = 1
    with pytest.raises(WeightSyncError, match=f"at {server.url} differ"):
        synced.generate(PROMPTS, Sampling(), max_tokens=4, seeds=SEEDS)


def test_a_lost_endpoint_is_replaced_by_another(synced, engine, server):
    """The second endpoint dies after the start: its share goes to the first, with the same samples."""
    expected = synced.generate(PROMPTS, Sampling(), max_tokens=8, seeds=SEEDS)
    gone = Endpoint("http://127.0.0.1:9")
    engine.endpoints.insert(0, gone)
    groups = synced.generate(PROMPTS, Sampling(), max_tokens=8, seeds=SEEDS)
    assert gone.lost is not None and gone.in_flight == 0
    assert [[c.token_ids for c in g] for g in groups] == [[c.token_ids for c in g] for g in expected]
    engine.endpoints[1].lost = "for this test"
    with pytest.raises(ConnectionError, match="no vLLM endpoint is left"):
        synced.generate(PROMPTS, Sampling(), max_tokens=8, seeds=SEEDS)


def test_a_module_trains_against_running_servers(server, tiny_model_path, tmp_path, monkeypatch):
    monkeypatch.setenv("KEY_OF_THE_SERVERS", server.api_key)
    module = Sampler(tiny_model_path)
    callback = VLLMServerRollout([server.url], api_key_variable="KEY_OF_THE_SERVERS")
    trainer_with(callback, tmp_path).fit(module, loader())
    assert [report.version for report, _ in module.rounds] == [0, 1, 2]
    assert all(report.canary.max < 1e-3 and report.compared == 20 for report, _ in module.rounds)


def test_a_wrong_api_key_is_refused_at_start(server):
    with pytest.raises(PermissionError, match="api_key"):
        ServerEngine([server.url], eos_token_ids=[EOS], api_key="wrong")


def test_a_server_named_twice_is_refused():
    with pytest.raises(ValueError, match="more than once"):
        ServerEngine(["http://127.0.0.1:9", "http://127.0.0.1:9/"], eos_token_ids=[EOS])


def test_no_server_is_an_error_at_start():
    with pytest.raises(ConnectionError, match="is the vLLM server up"):
        ServerEngine(["http://127.0.0.1:9"], eos_token_ids=[EOS])


def test_a_server_that_does_not_start_shows_its_log(tiny_model_path, tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)vLLM server ended.*no-such-option"):
        ServerProcess(tiny_model_path, engine_args={"no_such_option": 1}, log_file=tmp_path / "log")
