"""Weights from GPU to GPU into servers: what travels together, who may use which way, and (on a GPU) both ways live."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from engines import Sampler, trainer_with

from lightning_grpo.rollout import HFEngine, SampleRequest, SyncedEngine, VLLMProcessRollout, VLLMServerRollout
from lightning_grpo.rollout.server import buckets as gpu_buckets
from lightning_grpo.rollout.server.buckets import buckets, describe, fetch_buckets, send_buckets
from lightning_grpo.rollout.server.checks import ServerInfo, check_alike, check_stop, choose_transfer
from lightning_grpo.rollout.server.tcp import WeightClient, WeightServer
from lightning_grpo.rollout.vllm.adapter import adapter_settings


def info(url="http://a", **changes):
    settings = {"dtype": torch.bfloat16, "max_num_seqs": 8, "copies": 1, "has_tokenizer": True, "adapter_rank": None}
    return ServerInfo(**settings | {"transfer": None, "url": url} | changes)


def test_buckets_hold_all_tensors_in_order_and_no_more_than_they_may():
    weights = [(str(n), torch.full((n,), float(n))) for n in (3, 1, 2, 9, 1, 1)]
    packed = list(buckets(iter(weights), size=4 * 6))
    assert [[name for name, _ in bucket] for bucket in packed] == [["3", "1", "2"], ["9"], ["1", "1"]]
    assert all(
        torch.equal(a.cpu(), b)
        for bucket, start in zip(packed, (0, 3, 4), strict=True)
        for (_, a), (_, b) in zip(bucket, weights[start:], strict=False)
    )
    assert list(buckets([])) == []


def test_a_bucket_is_described_for_vllm():
    bucket = [("a", torch.zeros(2, 3, dtype=torch.bfloat16)), ("b", torch.zeros(4))]
    expected = {"names": ["a", "b"], "dtype_names": ["bfloat16", "float32"], "shapes": [[2, 3], [4]]}
    assert describe(bucket) == expected
    sent = list(buckets([("t", torch.arange(6.0).view(2, 3).T)]))
    assert sent[0][0][1].is_contiguous() and sent[0][0][1].tolist() == [[0, 3], [1, 4], [2, 5]]


WEIGHTS = [
    ("odd", torch.arange(7, dtype=torch.uint8)),
    ("matrix", torch.arange(6.0).view(2, 3).T),
    ("half", torch.randn(5).bfloat16()),
    ("scalar", torch.tensor(2.5, dtype=torch.float64)),
    ("large", torch.randn(40)),
]


def fetch(offer, device):
    """What a worker makes of an offer. Kept until the end: a buffer that is used again must not change it."""
    with WeightClient(offer.host, offer.port, offer.token) as delivery:
        received = list(fetch_buckets(delivery, device))
        delivery.answer({"tensors": len(received)})
        return [(name, tensor.cpu()) for name, tensor in received]


def assert_same(received):
    assert [name for name, _ in received] == [name for name, _ in WEIGHTS]
    for (_, mine), (_, theirs) in zip(received, WEIGHTS, strict=True):
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)


def test_buckets_reach_workers_through_buffers_of_their_own(monkeypatch):
    """All but the export itself, which only a GPU has: what is in a bucket, when the buffer is filled again."""
    exports = []
    monkeypatch.setattr(
        gpu_buckets, "export", lambda buffer: {"export": exports.append(buffer) or len(exports) - 1, "gpu": "cpu"}
    )
    monkeypatch.setattr(gpu_buckets, "open_export", lambda place, device: exports[place["export"]])
    offer = WeightServer("127.0.0.1")
    with ThreadPoolExecutor(2) as pool:
        workers = [pool.submit(fetch, offer, torch.device("cpu")) for _ in range(2)]
        offer.accept(2)
        send_buckets(offer, iter(WEIGHTS), size=48)
        assert offer.answers() == [{"tensors": 5}] * 2
        for worker in workers:
            assert_same(worker.result())
    offer.close()
    # Two buffers, for the tensor that is larger than a bucket a new one; an export per worker of each.
    assert [buffer.numel() for buffer in exports] == [48, 48, 160, 160]


def as_lists(weights):
    return [(name, str(tensor.dtype), tensor.tolist()) for name, tensor in weights]


def fetch_in_another_process(host, port, token, results):
    with WeightClient(host, port, token) as delivery:
        received = [(name, tensor.cpu()) for name, tensor in fetch_buckets(delivery, torch.device("cuda", 0))]
        delivery.answer({})
    results.put(
        [(name, tensor.view(torch.uint8).tolist() if tensor.ndim else tensor.item()) for name, tensor in received]
    )


@pytest.mark.gpu
def test_buckets_reach_two_processes_on_this_gpu():
    torch.cuda.init()
    before = torch.cuda.memory_allocated()
    context = torch.multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    offer = WeightServer("127.0.0.1")
    arguments = (offer.host, offer.port, offer.token, results)
    workers = [context.Process(target=fetch_in_another_process, args=arguments) for _ in range(2)]
    for worker in workers:
        worker.start()
    offer.accept(2)
    send_buckets(offer, ((name, tensor.cuda()) for name, tensor in WEIGHTS), size=48)
    offer.answers()
    assert [results.get() for _ in workers] == [as_lists(WEIGHTS)] * 2
    for worker in workers:
        worker.join()
    offer.close()
    # Both workers have released their export, so that the buffers come back.
    torch.cuda.ipc_collect()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize(
    ("on_gpu", "started_for", "chosen"),
    [
        (False, ["nccl"], "tcp"),
        (True, ["nccl", "nccl"], "nccl"),
        (True, ["ipc"], "tcp"),
        (True, ["nccl", None], "tcp"),
        (True, [None], "tcp"),
        (True, ["sparse_nccl"], "tcp"),
    ],
)
def test_auto_takes_what_all_servers_were_started_for(monkeypatch, on_gpu, started_for, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    infos = [info(f"http://{i}", transfer=transfer) for i, transfer in enumerate(started_for)]
    assert choose_transfer(infos, "auto", None) == chosen
    assert choose_transfer(infos, "tcp", None) == "tcp"
    assert choose_transfer(infos, "auto", adapter_settings(4, ["q_proj"])) == "tcp"


def test_a_transfer_that_servers_were_not_started_for_is_refused():
    command = r"VLLM_API_KEY=KEY .*--weight-transfer-config '{\"backend\": \"nccl\"}'"
    with pytest.raises(ValueError, match=rf"transfer is nccl.*{command}"):
        choose_transfer([info(), info(transfer="nccl")], "nccl", None)
    assert choose_transfer([info(), info(transfer="nccl")], "ipc", None) == "ipc"
    with pytest.raises(ValueError, match="adapter goes to servers over tcp alone"):
        choose_transfer([info(transfer="nccl")], "nccl", adapter_settings(4, ["q_proj"]))


def test_servers_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match=r"http://b computes in torch.float16, http://a in torch.bfloat16"):
        check_alike([info(), info("http://b", dtype=torch.float16)], None)
    adapter = adapter_settings(12, ["layers.0.q_proj"])
    check_alike([info(adapter_rank=16)], adapter)
    with pytest.raises(ValueError, match=r"http://b takes no adapters of rank 16.*--lora-target-modules q_proj"):
        check_alike([info(adapter_rank=16), info("http://b", adapter_rank=8)], adapter)
    check_stop([info(has_tokenizer=False)], [])
    with pytest.raises(ValueError, match=r"sampling.stop is \['x'\].*http://a"):
        check_stop([info(has_tokenizer=False)], ["x"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_transfers_between_gpus_need_one():
    with pytest.raises(ValueError, match=r"transfer is nccl.*none here; set tcp"):
        VLLMServerRollout(["http://a"], transfer="nccl")
    with pytest.raises(ValueError, match="transfer is ipc"):
        VLLMProcessRollout(transfer="ipc")
    assert VLLMProcessRollout().transfer == "auto"


@pytest.mark.gpu
@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("transfer", ["ipc", "nccl"])
def test_weights_reach_a_server_from_gpu_to_gpu(transfer, tiny_model_path, tmp_path):
    if transfer == "nccl" and torch.cuda.device_count() < 2:
        pytest.skip("NCCL connects two GPUs")
    environment = {"CUDA_VISIBLE_DEVICES": "1"} if transfer == "nccl" else None
    callback = VLLMProcessRollout(
        dtype="float32", gpu_memory_utilization=0.2, transfer=transfer, environment=environment, enforce_eager=True
    )
    module = Sampler(tiny_model_path)
    module.configure_model()
    policy = module.policy.cuda()
    engine = callback.build_engine(trainer_with(callback, tmp_path), module)
    reference = HFEngine(policy, eos_token_ids=[1], pad_id=0)
    synced = SyncedEngine(
        engine,
        version=lambda: synced.turn,
        weights=module.policy_weights,
        score=reference.logprobs,
        vocab_size=policy.config.vocab_size,
    )
    try:
        for synced.turn in range(3):
            groups = synced.generate(SampleRequest(prompts=[[4, 5, 6]], seeds=[[1, 2]], max_tokens=8))
            assert synced.last_sync.compared == synced.last_sync.tensors == 20
            assert {v for group in groups for c in group for v in c.versions} == {synced.turn}
            for parameter in policy.parameters():
                parameter.data += 0.02 * torch.randn_like(parameter)
    finally:
        synced.close()
        callback.close()
