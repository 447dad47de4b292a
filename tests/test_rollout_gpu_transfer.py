"""Weights from GPU to GPU into servers: what travels together, who may use which way, and (on a GPU) both ways live."""

import pytest
import torch
from test_rollout_callback import Sampler, trainer_with

from lightning_grpo.rollout import HFEngine, Sampling, SyncedEngine, VLLMProcessRollout, VLLMServerRollout
from lightning_grpo.rollout.gpu_transfer import buckets, describe
from lightning_grpo.rollout.server_check import ServerInfo, check_alike, check_stop, choose_transfer
from lightning_grpo.rollout.vllm_adapter import adapter_settings


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


@pytest.mark.parametrize(
    ("on_gpu", "started_for", "chosen"),
    [
        (False, ["nccl"], "tcp"),
        (True, ["nccl", "nccl"], "nccl"),
        (True, ["ipc"], "ipc"),
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
    command = r"VLLM_ALLOW_INSECURE_SERIALIZATION=1 .*--weight-transfer-config '{\"backend\": \"ipc\"}'"
    with pytest.raises(ValueError, match=rf"transfer is ipc.*{command}"):
        choose_transfer([info(), info(transfer="ipc")], "ipc", None)
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
            groups = synced.generate([[4, 5, 6]], Sampling(), max_tokens=8, seeds=[[1, 2]])
            assert synced.last_sync.compared == synced.last_sync.tensors == 20
            assert {v for group in groups for c in group for v in c.versions} == {synced.turn}
            for parameter in policy.parameters():
                parameter.data += 0.02 * torch.randn_like(parameter)
    finally:
        synced.close()
        callback.close()
