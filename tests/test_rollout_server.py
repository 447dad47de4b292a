"""vLLM in other processes: sampling over HTTP, weights over TCP, faults of endpoints."""

import os
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from threading import Barrier, current_thread

import fitting
import httpx
import psutil
import pytest
import torch
from conftest import tiny_llama
from engines import (
    EOS,
    PROMPTS,
    SEEDS,
    Sampler,
    adapted,
    assert_turns_are_completions,
    converse,
    loader,
    trainer_with,
)
from fitting import AHEAD
from transformers import AutoModelForCausalLM

from lightning_grpo.errors import RunError
from lightning_grpo.policy.load import LoRA
from lightning_grpo.rewards import LLMJudge, compute_rewards
from lightning_grpo.rollout import (
    HFEngine,
    SampleRequest,
    Sampling,
    SyncedEngine,
    Turn,
    VLLMProcessRollout,
    VLLMServerRollout,
    WeightSyncError,
    policy_weights,
)
from lightning_grpo.rollout.server.checks import as_flags
from lightning_grpo.rollout.server.cutoff import Cutoff
from lightning_grpo.rollout.server.endpoint import Endpoint
from lightning_grpo.rollout.server.engine import ServerEngine
from lightning_grpo.rollout.server.pool import Pool
from lightning_grpo.rollout.server.process import ServerProcess
from lightning_grpo.rollout.server.tcp import WeightServer
from lightning_grpo.rollout.server.transfer import TCPTransfer

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
KEY = "the key of the two servers"
LONG = 3000


def sample_request(max_tokens, sampling=Sampling()):
    return SampleRequest(prompts=PROMPTS, seeds=SEEDS, max_tokens=max_tokens, sampling=sampling)


class AdaptedSampler(Sampler):
    """`Sampler` with a LoRA adapter."""

    lora, from_scratch = LoRA(rank=4), False

    def configure_model(self):
        if self.policy is None:
            self.policy = adapted(self.model_path)


@pytest.fixture(scope="module")
def tiny_model_path(tokenizer, tmp_path_factory):
    """The tiny model with room for completions that take a while."""
    path = tmp_path_factory.mktemp("long_model")
    tiny_llama(tokenizer, max_position_embeddings=LONG + 16).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def servers(tiny_model_path, tmp_path_factory):
    """Three servers: two for whole weights, the second of them without a tokenizer, and one for adapters, which
    `VLLMProcessRollout` starts."""
    folder = tmp_path_factory.mktemp("servers")
    settings = {"dtype": "float32", "max_num_seqs": 64, "environment": {"OMP_NUM_THREADS": "1"}}
    callbacks = [VLLMProcessRollout(**settings, lora=lora) for lora in ("merged", "adapter")]
    modules = [sampler(tiny_model_path) for sampler in (Sampler, AdaptedSampler)]
    for module in modules:
        module.max_prompt_length, module.max_completion_length = 7, LONG
        module.configure_model()
    settings = callbacks[0].settings(modules[0])

    def plain(name, **engine_args):
        return ServerProcess(
            tiny_model_path,
            engine_args=settings | engine_args,
            log_file=folder / name,
            cores=sorted(os.sched_getaffinity(0)),
            environment={"VLLM_API_KEY": KEY, "OMP_NUM_THREADS": "1"},
        )

    def for_adapters():
        callbacks[1].build_engine(trainer_with(callbacks[1], folder), modules[1]).close()
        return callbacks[1]._server

    # Together they start nearly as fast as one. A server ends with the thread that started it, so the threads stay.
    with ThreadPoolExecutor(3) as pool:
        starts = [
            pool.submit(plain, "first"),
            pool.submit(plain, "second", tokens_only=True),
            pool.submit(for_adapters),
        ]
        servers = [start.result() for start in starts]
        with apart_from(servers):
            yield servers
        for server in servers:
            server.close()
        callbacks[1].close()
        callbacks[1].close()
    assert all(server.process.returncode is not None for server in servers)


@contextmanager
def apart_from(servers):
    """Engines spin while they wait for one another. Off this process's core they can't keep it from running."""
    cores = os.sched_getaffinity(0)
    mine = {min(cores)}
    for server in servers:
        parent = psutil.Process(server.process.pid)
        for process in [parent, *parent.children(recursive=True)]:
            for thread in process.threads():
                os.sched_setaffinity(thread.id, cores - mine or cores)
    os.sched_setaffinity(0, mine)
    yield
    os.sched_setaffinity(0, cores)


@pytest.fixture
def server(servers):
    return servers[0]


def engine_over(*servers, **options):
    return ServerEngine([server.url for server in servers], eos_token_ids=[EOS], api_key=KEY, **options)


@pytest.fixture
def engine(server):
    engine = engine_over(server)
    yield engine
    engine.close()
    engine.close()


@pytest.fixture
def both(servers):
    """An engine over two servers."""
    engine = engine_over(*servers[:2])
    yield engine
    engine.close()


@pytest.fixture
def policy(tiny_model_path):
    return AutoModelForCausalLM.from_pretrained(tiny_model_path, dtype=torch.float32)


def synced_with(engine, policy):
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


@pytest.fixture
def synced(engine, policy):
    return synced_with(engine, policy)


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


def tokens(groups):
    return [[c.token_ids for c in group] for group in groups]


@pytest.fixture
def first_tokens(monkeypatch):
    """The endpoints' URLs, one for every completion that has begun."""
    seen, begun = [], Cutoff.begun

    def watched(cutoff, request_id, endpoint):
        seen.append(endpoint.url)
        return begun(cutoff, request_id, endpoint)

    monkeypatch.setattr(Cutoff, "begun", watched)
    return seen


def wait_for(condition):
    end = time.monotonic() + 600  # generous, since only a hang exceeds it
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def test_samples_follow_the_policy(synced, policy):
    heard = {}

    def on_group(i, completions):
        heard[i] = completions, current_thread()

    groups = synced.generate(sample_request(32), on_group)
    assert [heard[i] for i in range(3)] == [(group, current_thread()) for group in groups]
    assert worst(synced, groups) < 1e-4
    assert synced.last_sync.compared == synced.last_sync.tensors == 20
    perturb(policy)
    synced.turn = 1
    groups = synced.generate(sample_request(32))
    assert worst(synced, groups) < 1e-4
    for c in (c for group in groups for c in group):
        assert set(c.versions) == {1}
        assert (c.finish_reason == "stop") == (c.token_ids[-1] == EOS)
    again = synced.generate(SampleRequest(prompts=PROMPTS[1:2], seeds=SEEDS[1:2], max_tokens=32))
    assert tokens(again)[0] == tokens(groups)[1]


def test_sampling_ahead_keeps_its_version_while_the_policy_moves(synced, policy):
    ahead = synced.run_in_background(lambda: synced.generate(sample_request(64)))
    perturb(policy)
    synced.turn = 1
    synced.sync()
    assert ahead.done(), "the sync must wait for what samples with the earlier weights"
    assert {v for group in ahead.result() for c in group for v in c.versions} == {0}
    groups = synced.generate(sample_request(8))
    assert worst(synced, groups) < 1e-4 < worst(synced, ahead.result())


def test_weights_updated_in_flight(synced, policy, engine, first_tokens):
    """Completions go on with the new weights: their later tokens are the new policy's, whatever came before."""
    engine.sampling_args = {"stop_token_ids": []}
    ahead = synced.run_in_background(lambda: synced.generate(sample_request(600)))
    wait_for(lambda: first_tokens)
    perturb(policy)
    synced.turn = 1
    assert synced.sync(in_flight=True).mismatch.max < 1e-4
    groups = ahead.result()
    assert all(c.versions == sorted(c.versions) and len(c.versions) == len(c.token_ids) for g in groups for c in g)
    assert any(set(c.versions) == {0, 1} for g in groups for c in g)
    assert worst(synced, groups, version=1) < 1e-4 < worst(synced, groups, version=0)
    # The cache holds nothing of the earlier weights.
    assert worst(synced, engine.generate(sample_request(8))) < 1e-4


def test_turns_are_sampled_as_completions_are(both, policy, first_tokens, monkeypatch):
    synced = synced_with(both, policy)
    places, room = [], Pool.room

    def watched(pool, key=None):
        if key is not None:
            places.append((key, pool.alive[key % 2]))
        return room(pool, key)

    monkeypatch.setattr(Pool, "room", watched)
    beginnings = [prompt for prompt in PROMPTS for _ in range(2)]
    sampled, _ = converse(synced, beginnings)
    assert len(sampled) == 18
    assert Counter(first_tokens) == Counter(endpoint.url for _, endpoint in places)
    assert_turns_are_completions(synced, sampled)
    both.sampling_args = {"stop_token_ids": []}
    with both.turns(Sampling()) as turns:
        turns.submit(Turn(key=0, token_ids=PROMPTS[0], seed=0, max_tokens=LONG))
        turns.submit(Turn(key=1, token_ids=PROMPTS[0], seed=0, max_tokens=2))
        ended = []
        while not ended:
            ended = turns.step()
        assert [key for key, _ in ended] == [1] and turns.running == 1
    wait_for(lambda: all(endpoint.in_flight == 0 for endpoint in both.endpoints))


def test_turns_go_on_with_weights_updated_in_flight(synced, policy, engine, first_tokens):
    engine.sampling_args = {"stop_token_ids": []}
    ahead = synced.run_in_background(lambda: converse(synced, PROMPTS, num_turns=2, max_tokens=400))
    wait_for(lambda: first_tokens)
    perturb(policy)
    synced.turn = 1
    synced.sync(in_flight=True)
    sampled, _ = ahead.result()
    assert len(sampled) == 6 and all(c.versions == sorted(c.versions) for _, c in sampled)
    assert any(set(c.versions) == {0, 1} for _, c in sampled)
    for turn, c in sampled:
        scored = synced.reference.logprobs([[*turn.token_ids, *c.token_ids]])[0][len(turn.token_ids) - 1 :]
        gap = (scored - torch.tensor(c.logprobs)).abs()[torch.tensor(c.versions) == 1]
        assert gap.numel() == 0 or gap.max() < 1e-4


def test_requests_of_one_rank_are_not_sampled_with_the_next_weights_of_another(server, policy, first_tokens):
    """The rank that sends weights waits for the others, one of which requests one completion at a time."""
    barrier = Barrier(2)
    ranks = [
        engine_over(server, run="run", barrier=lambda: barrier.wait(600), pushes=pushes, max_in_flight=room)
        for pushes, room in ((True, 8), (False, 1))
    ]
    with ThreadPoolExecutor(1) as sender, ThreadPoolExecutor(1) as sampler:
        update = sender.submit(ranks[0].update_weights, policy_weights(policy), 0)
        ranks[1].update_weights(policy_weights(policy), 0)
        update.result()
        perturb(policy)
        ahead = sampler.submit(ranks[1].generate, sample_request(32))
        wait_for(lambda: first_tokens)
        update = sender.submit(ranks[0].update_weights, policy_weights(policy), 1)
        groups = ahead.result()
        ranks[1].update_weights(policy_weights(policy), 1)
        update.result()
    assert {v for group in groups for c in group for v in c.versions} == {0}
    groups = ranks[1].generate(sample_request(2))
    assert {v for group in groups for c in group for v in c.versions} == {1}
    for rank in ranks:
        rank.close()


def test_the_last_completions_are_cut_off(synced, engine):
    # An end is seldom and the limit is far: when the first has ended, on a busy machine too, others still run.
    engine.sampling_args = {"logit_bias": {EOS: -3}}
    everything = synced.generate(sample_request(400))
    groups = synced.generate(sample_request(LONG, Sampling(cutoff=0.01)))
    pairs = list(zip(chain(*groups), chain(*everything), strict=True))
    aborted = [(cut, whole) for cut, whole in pairs if cut.finish_reason == "abort"]
    # 0.01 · 12 rounded up is waited for.
    assert len(pairs) == 12 and 1 <= len(aborted) <= 11
    for cut, whole in aborted:
        assert 1 <= len(cut.token_ids) == len(cut.logprobs) == len(cut.versions) < LONG
        assert cut.token_ids[: len(whole.token_ids)] == whole.token_ids[: len(cut.token_ids)]
        assert cut.logprobs[:400] == pytest.approx(whole.logprobs[: len(cut.logprobs)], abs=1e-4)
    assert all(endpoint.in_flight == 0 for endpoint in engine.endpoints)


def test_stop_strings_end_completions(synced, tokenizer):
    stop = [*"0123456789abcdefghijklmnopqrstuvwxyz", "AB"]
    everything = synced.generate(sample_request(32))
    groups = synced.generate(sample_request(32, Sampling(stop=stop)))
    for c, whole in zip(chain(*groups), chain(*everything), strict=True):
        assert not any(s in tokenizer.decode(c.token_ids[:-1]) for s in stop)
        assert c.token_ids == whole.token_ids[: len(c.token_ids)]
        assert len(c.logprobs) == len(c.token_ids)
        found = any(tokenizer.decode(c.token_ids).endswith(s) for s in stop)
        assert c.finish_reason == ("stop" if found else whole.finish_reason)
    assert worst(synced, groups) < 1e-4


def test_stop_strings_need_servers_with_a_tokenizer(servers, tiny_model_path, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    module = Sampler(tiny_model_path)
    module.sampling = Sampling(stop=["x"])
    callback = VLLMServerRollout([server.url for server in servers[:2]])
    with pytest.raises(ValueError, match=f"{servers[1].url} was started without a tokenizer.*--enable-scale-out"):
        trainer_with(callback, tmp_path).fit(module, loader())


def test_a_server_with_another_tokenizer_is_refused(server, tiny_model_path, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    module = Sampler(tiny_model_path)
    module.tokenizer.add_tokens(["and one more"])
    with pytest.raises(ValueError, match=f"{server.url} has another tokenizer than the trainer .vocabulary size"):
        trainer_with(VLLMServerRollout([server.url]), tmp_path).fit(module, loader())


def test_adapters_alone_go_to_servers_that_take_them(servers, tiny_model_path, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", servers[2].api_key)
    module = AdaptedSampler(tiny_model_path)
    trainer_with(VLLMServerRollout([servers[2].url], lora="adapter"), tmp_path).fit(module, loader())
    assert [report.version for report, _ in module.rounds] == [0, 1, 2]
    assert all(report.mismatch.max < 1e-3 and report.compared == report.tensors == 28 for report, _ in module.rounds)
    assert [len(report.moved) for report, _ in module.rounds] == [28, 28, 28]
    with pytest.raises(ValueError, match="takes adapters; set rollout lora: adapter"):
        trainer_with(VLLMServerRollout([servers[2].url]), tmp_path).fit(AdaptedSampler(tiny_model_path), loader())


def test_adapters_are_refused_by_servers_that_do_not_take_them(server, tiny_model_path, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    callback = VLLMServerRollout([server.url], lora="adapter")
    with pytest.raises(ValueError, match=r"takes no adapters of rank 8.*--enable-lora .*--max-lora-rank 8"):
        trainer_with(callback, tmp_path).fit(AdaptedSampler(tiny_model_path), loader())


def test_a_tensor_altered_on_its_way_is_named(synced, policy, engine, monkeypatch):
    update = engine.update_weights
    name = "model.layers.1.mlp.up_proj.weight"

    def faulty(weights, version, in_flight):
        update(((n, w + 1e-6 if n == name else w) for n, w in weights), version)

    monkeypatch.setattr(engine, "update_weights", faulty)
    with pytest.raises(WeightSyncError, match=rf"{name} \(altered in model.layers.1.mlp.gate_up_proj at http"):
        synced.generate(sample_request(4))


def test_two_servers_share_the_work(both, policy, servers, first_tokens):
    assert [endpoint.room for endpoint in both.endpoints] == [64, 64]
    synced = synced_with(both, policy)
    groups = synced.generate(sample_request(32))
    assert Counter(first_tokens) == {server.url: 6 for server in servers[:2]}
    assert worst(synced, groups) < 1e-4
    stored = Counter(h.place.partition(" at ")[2] for h in both.stored)
    assert stored[servers[0].url] == stored[servers[1].url] >= 20
    both.endpoints[1].lost = "for this test"
    assert tokens(synced.generate(sample_request(32))) == tokens(groups)


@pytest.mark.parametrize("fault", ["dropped", "altered"])
def test_one_of_two_servers_with_other_weights_is_named(both, policy, servers, monkeypatch, fault):
    """The second says that it took the weights: it never got them, or one tensor of them differs by 1e-6."""
    synced = synced_with(both, policy)
    synced.sync()
    send = TCPTransfer.send

    def faulty(self, loop, endpoints, weights):
        weights = list(weights)
        stored = send(self, loop, endpoints[:1], weights)
        if fault == "altered":
            stored += send(self, loop, endpoints[1:], [(n, w + 1e-6 * (n == "model.norm.weight")) for n, w in weights])
        return stored

    monkeypatch.setattr(TCPTransfer, "send", faulty)
    perturb(policy)
    synced.turn = 1
    named = {"dropped": "log-probs at {} differ", "altered": r"model.norm.weight \(altered in model.norm at {}\)"}
    with pytest.raises(WeightSyncError, match=named[fault].format(servers[1].url)):
        synced.generate(sample_request(4))


@pytest.mark.parametrize("parallel, second", [("tensor", "worker 1"), ("data", "copy 1")])
def test_every_worker_of_a_server_proves_what_it_holds(
    tiny_model_path, policy, tmp_path, monkeypatch, parallel, second
):
    """Two that share a model, or have a copy each."""
    module = Sampler(tiny_model_path)
    module.configure_model()
    callback = VLLMProcessRollout(
        **{f"{parallel}_parallel_size": 2},
        dtype="float32",
        enforce_eager=True,
        environment={"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    )
    engine = callback.build_engine(trainer_with(callback, tmp_path), module)
    try:
        synced = synced_with(engine, policy)
        groups = synced.generate(sample_request(4))
        assert synced.last_sync.compared == synced.last_sync.tensors == 20
        assert sum(second in stored.place for stored in engine.stored) == len(engine.stored) / 2 >= 20
        assert len(engine.replica_logprobs(PROMPTS[:1])) == (2 if parallel == "data" else 1)
        assert worst(synced, groups) < 1e-4
        send, name = WeightServer.send, "model.layers.1.mlp.down_proj.weight"

        def faulty(offer, weights):
            """The worker that came second gets other values of one tensor, too little for a log-prob to show it."""
            weights, (first, second) = list(weights), offer._receivers
            offer._receivers = [first]
            send(offer, weights)
            offer._receivers = [second]
            send(offer, [(n, w + 1e-7 if n == name else w) for n, w in weights])
            offer._receivers = [first, second]

        monkeypatch.setattr(WeightServer, "send", faulty)
        perturb(policy)
        synced.turn = 1
        with pytest.raises(
            WeightSyncError, match=rf"{name} \(altered in .*down_proj at http://[^ ,]*(, (worker|copy) \d)?\)"
        ):
            synced.generate(sample_request(4))
    finally:
        engine.close()
        callback.close()


def test_weights_of_another_run_are_not_sampled_from(both, policy, servers, first_tokens):
    """Another run gives one of the servers weights of its own: that server is left out, and nothing of it is used."""
    synced = synced_with(both, policy)
    synced.sync()
    other = engine_over(servers[1])
    perturb(policy)
    other.update_weights(policy_weights(policy), 0)
    other.close()
    perturb(policy, -0.02)
    groups = synced.generate(sample_request(8))
    assert servers[1].url in first_tokens and "another run uses it" in both.endpoints[1].lost
    assert worst(synced, groups) < 1e-4


def test_an_unreachable_server_is_left_out(synced, engine):
    expected = synced.generate(sample_request(8))
    gone = Endpoint("http://127.0.0.1:9")
    engine.endpoints.insert(0, gone)
    groups = synced.generate(sample_request(8))
    assert gone.lost is not None and gone.in_flight == 0
    assert tokens(groups) == tokens(expected)
    engine.endpoints[1].lost = "for this test"
    with pytest.raises(ConnectionError, match="no vLLM endpoint is left"):
        synced.generate(sample_request(8))


def test_an_error_in_a_callback_ends_the_call(synced, engine):
    def on_group(i, completions):
        raise KeyError("a fault in a reward")

    with pytest.raises(KeyError, match="a fault in a reward"):
        synced.generate(sample_request(32), on_group)
    wait_for(lambda: engine.endpoints[0].in_flight == 0)
    assert worst(synced, synced.generate(sample_request(8))) < 1e-4


def test_closing_ends_what_runs_in_the_background(synced, engine, first_tokens):
    ahead = synced.run_in_background(lambda: synced.generate(sample_request(240)))
    wait_for(lambda: first_tokens)
    synced.close()
    assert ahead.exception() is not None


def test_a_module_trains_against_running_servers(servers, tiny_model_path, tmp_path, monkeypatch):
    monkeypatch.setenv("KEY_OF_THE_SERVERS", KEY)
    module = Sampler(tiny_model_path)
    callback = VLLMServerRollout([s.url for s in servers[:2]], api_key_variable="KEY_OF_THE_SERVERS")
    trainer_with(callback, tmp_path).fit(module, loader())
    assert [report.version for report, _ in module.rounds] == [0, 1, 2]
    assert all(report.mismatch.max < 1e-3 and report.compared == 20 for report, _ in module.rounds)


@pytest.mark.parametrize("in_flight", [False, True], ids=["in turn", "in flight"])
def test_a_policy_trains_while_servers_sample_its_next_rollout(
    servers, tiny_model_path, tmp_path, monkeypatch, in_flight
):
    monkeypatch.setenv("VLLM_API_KEY", KEY)
    policy = fitting.module(tiny_model_path, **AHEAD, in_flight_updates=in_flight)
    rollout = VLLMServerRollout([s.url for s in servers[:2]])
    record = fitting.fit(tmp_path, policy, steps=6, accumulate=2, rollout=rollout)
    # Two optimizer steps a rollout. Samples are of the step at which the rollout before began, or later.
    assert record["staleness_max"][:2] == [0, 1]
    assert all(0 < newest <= oldest for newest, oldest in zip(record["staleness_max"][2:], [2, 3, 2, 3], strict=True))
    assert in_flight or record["staleness_max"][2:] == [2, 3, 2, 3]
    assert record["sampling/sampling_logp_difference/mean"][0] < 1e-4
    assert all(gap > 1e-4 for gap in record["sampling/sampling_logp_difference/mean"][2:])


def test_a_wrong_api_key_is_refused_at_start(server):
    with pytest.raises(PermissionError, match="api_key"):
        ServerEngine([server.url], eos_token_ids=[EOS], api_key="wrong")


def test_every_route_of_a_server_asks_for_the_key(server):
    """vLLM itself guards sampling alone, and leaves open what takes weights and commands."""
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"}) as client:
        routes = [(m, path) for path, methods in client.get("/openapi.json").json()["paths"].items() for m in methods]
    routes += [("get", path) for path in ("/openapi.json", "/docs", "/metrics", "/ping", "/no-such-path", "/health/")]
    control = {"/collective_rpc", "/update_weights", "/init_weight_transfer_engine", "/pause", "/sleep", "/server_info"}
    assert control <= {path for _, path in routes}
    for authorization in ("", "Bearer", "Bearer wrong", KEY, f"Basic {KEY}"):
        with httpx.Client(base_url=server.url, headers={"Authorization": authorization}) as client:
            codes = {(method, path): client.request(method, path).status_code for method, path in routes}
        assert codes.pop(("get", "/health")) == 200
        assert set(codes.values()) == {401}, authorization
    assert psutil.Process(server.process.pid).environ().get("VLLM_ALLOW_INSECURE_SERIALIZATION") is None


def test_a_server_named_twice_is_refused():
    with pytest.raises(ValueError, match="more than once"):
        ServerEngine(["http://127.0.0.1:9", "http://127.0.0.1:9/"], eos_token_ids=[EOS])


def test_no_server_is_an_error_at_start():
    with pytest.raises(ConnectionError, match="is the vLLM server up"):
        ServerEngine(["http://127.0.0.1:9"], eos_token_ids=[EOS])


def test_engine_arguments_become_flags():
    settings = {"max_num_seqs": 64, "enforce_eager": True, "enable_prefix_caching": False, "seed": None}
    flags = ["--max-num-seqs", "64", "--enforce-eager", "--no-enable-prefix-caching"]
    assert as_flags(settings) == flags
    assert as_flags({"lora_target_modules": ["q", "k"]}) == ["--lora-target-modules", "q", "k"]
    assert as_flags({"hf_overrides": {"head_dtype": "float32"}}) == ["--hf-overrides", '{"head_dtype": "float32"}']


def test_a_server_that_does_not_start_shows_its_log(tiny_model_path, tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)vLLM server ended.*no-such-option"):
        ServerProcess(tiny_model_path, engine_args={"no_such_option": 1}, log_file=tmp_path / "log")


class Breaking(httpx.AsyncHTTPTransport):
    """Breaks the connections of the first requests for completions, some of them after the first tokens."""

    def __init__(self, times):
        super().__init__()
        self.times = times

    async def handle_async_request(self, request):
        breaks = request.url.path == "/inference/v1/generate" and self.times > 0
        self.times -= breaks
        if breaks and self.times % 2:
            raise httpx.ConnectTimeout("")
        response = await super().handle_async_request(request)
        return httpx.Response(response.status_code, stream=Broken(response.stream)) if breaks else response


class Broken(httpx.AsyncByteStream):
    def __init__(self, stream):
        self.stream = stream

    async def __aiter__(self):
        async for chunk in self.stream:
            yield chunk
            raise httpx.ReadError("")

    async def aclose(self):
        await self.stream.aclose()


def test_a_broken_connection_costs_no_endpoint(engine):
    expected = engine.generate(sample_request(32))
    (endpoint,) = engine.endpoints
    endpoint.client._transport = Breaking(times=5)
    groups = engine.generate(sample_request(32))
    assert endpoint.client._transport.times == 0 and endpoint.lost is None and endpoint.in_flight == 0
    assert tokens(groups) == tokens(expected)
    endpoint.client._transport = Breaking(times=5)
    sampled, _ = converse(engine, PROMPTS)
    assert endpoint.client._transport.times == 0 and endpoint.lost is None
    assert_turns_are_completions(engine, sampled)
    # Where every connection breaks, it is given up.
    endpoint.client._transport = Breaking(times=10**6)
    with pytest.raises(ConnectionError, match=f"no vLLM endpoint is left: {endpoint.url}: (ReadError|ConnectTimeout)"):
        engine.generate(sample_request(32))
    with pytest.raises(ConnectionError, match="no vLLM endpoint is left"):
        converse(engine, PROMPTS)


def test_a_judge_is_served_by_vllm(server, synced, policy, tokenizer, tiny_model_path, monkeypatch):
    synced.sync()  # other tests send other weights
    monkeypatch.setenv("JUDGE_KEY", KEY)
    options = {"base_url": f"{server.url}/v1", "model": tiny_model_path, "api_key_env": "JUDGE_KEY"}
    chances = []
    for completion in ("4", "5"):
        message = [{"role": "user", "content": f"Grade {completion}"}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            likely = (policy(torch.tensor([ids])).logits[0, -1] / 0.25).softmax(-1).topk(20)
        chances.append(
            dict(zip(tokenizer.convert_ids_to_tokens(likely.indices.tolist()), likely.values.tolist(), strict=True))
        )
    letters = {letter: i / 7 for i, letter in enumerate("@6jxJ0yM2V")}
    words = LLMJudge(**options, template="Grade {completion}", answers=letters, request={"temperature": 0.25})
    words.check([{}])
    values = compute_rewards([words], ["?", "?"], ["4", "5"], [[1], [1]], [{}, {}])[:, 0].tolist()
    for value, chance in zip(values, chances, strict=True):
        total = sum(chance.get(letter, 0.0) for letter in letters)
        expected = sum(chance.get(letter, 0.0) * reward for letter, reward in letters.items()) / total
        assert value == pytest.approx(expected if total >= 0.5 else 0.0, abs=1e-3)
    assert max(values) > 0
    grades = LLMJudge(**options, template="Grade {completion}", pattern="(.)", max_tokens=8)
    with pytest.raises(RunError, match="gives no grade"):
        compute_rewards([grades], ["?", "?"], ["a", "b"], [[1], [1]], [{}, {}])


def test_the_work_of_a_killed_server_is_done_by_the_other(both, policy, servers, first_tokens):
    """Last in this file: the second server is gone afterwards."""
    synced = synced_with(both, policy)
    synced.sync()
    both.sampling_args = {"stop_token_ids": []}
    expected = synced.generate(sample_request(240))
    first_tokens.clear()
    ahead = synced.run_in_background(lambda: synced.generate(sample_request(240)))
    wait_for(lambda: servers[1].url in first_tokens)
    os.killpg(servers[1].process.pid, signal.SIGKILL)
    assert tokens(ahead.result()) == tokens(expected)
    assert both.endpoints[1].lost is not None
    perturb(policy)
    synced.turn = 1
    groups = synced.generate(sample_request(8))
    assert worst(synced, groups) < 1e-4
