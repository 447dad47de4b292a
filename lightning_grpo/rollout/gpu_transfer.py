"""Weights from GPU to GPU into vLLM servers, by vLLM's own weight transfer: CUDA IPC on one GPU, NCCL between GPUs.

They travel in buckets: what is in a bucket is told over HTTP, its bytes don't pass there. Not run on a GPU yet.
"""

import base64
import pickle
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from lightning_grpo.rollout.endpoint import Endpoint, EventLoop
from lightning_grpo.rollout.guest import guest
from lightning_grpo.rollout.proof import Held
from lightning_grpo.rollout.server_weights import meet_workers
from lightning_grpo.rollout.wire import free_port

BUCKET = 256 << 20
"""Bytes sent at a time, where no single tensor is larger."""
Bucket = list[tuple[str, Tensor]]


class IPCTransfer:
    """For servers on this process's own GPU: they read each bucket from a buffer that this process fills.

    They unpickle where the buffer lies, so they have VLLM_ALLOW_INSECURE_SERIALIZATION=1 in their environment.
    """

    def send(self, loop: EventLoop, endpoints: Sequence[Endpoint], weights: Iterable[tuple[str, Tensor]]) -> list[Held]:
        device = torch.cuda.current_device()
        gpu = str(torch.cuda.get_device_properties(device).uuid)
        _all(loop, endpoints, "/init_weight_transfer_engine", {"init_info": {"packed": True}})
        _all(loop, endpoints, "/start_weight_update")
        buffer = torch.empty(0, dtype=torch.uint8, device=device)
        place = ""
        for bucket in buckets(weights):
            parts = [tensor.reshape(-1).view(torch.uint8) for _, tensor in bucket]
            sizes = [part.numel() for part in parts]
            if sum(sizes) > buffer.numel():
                buffer = torch.empty(max(BUCKET, sum(sizes)), dtype=torch.uint8, device=device)
                place = base64.b64encode(pickle.dumps({gpu: reduce_tensor(buffer)[1]})).decode()
            for room, part in zip(buffer[: sum(sizes)].split(sizes), parts, strict=True):
                room.copy_(part)
            torch.cuda.current_stream().synchronize()
            contents = describe(bucket) | {"tensor_sizes": sizes, "ipc_handles_pickled": place}
            _all(loop, endpoints, "/update_weights", {"update_info": contents})
        _all(loop, endpoints, "/finish_weight_update")
        torch.cuda.ipc_collect()
        return meet_workers(loop, endpoints, "127.0.0.1", "tell_policy")


class NCCLTransfer:
    """For servers on other GPUs, here or on other machines: one group of this process and all their workers.

    Args:
        host: address at which the servers reach this process.
    """

    def __init__(self, host: str) -> None:
        self._host = host
        self._group: Any = None
        self._members: list[str] = []

    def send(self, loop: EventLoop, endpoints: Sequence[Endpoint], weights: Iterable[tuple[str, Tensor]]) -> list[Held]:
        self._meet(loop, endpoints)
        _all(loop, endpoints, "/start_weight_update")
        for bucket in buckets(weights):
            calls = _start(loop, endpoints, "/update_weights", {"update_info": describe(bucket)})
            for _, tensor in bucket:
                self._group.broadcast(tensor, src=0, stream=torch.cuda.current_stream())
            # The servers' answers first: where one failed, the broadcast never ends.
            for call in calls:
                call.result()
            torch.cuda.current_stream().synchronize()
        _all(loop, endpoints, "/finish_weight_update")
        return meet_workers(loop, endpoints, self._host, "tell_policy")

    def _meet(self, loop: EventLoop, endpoints: Sequence[Endpoint]) -> None:
        """Make the group anew where other endpoints are in use than before."""
        members = [endpoint.url for endpoint in endpoints]
        if members == self._members:
            return
        _all(loop, endpoints, "/shutdown_weight_transfer_engine")
        workers = [loop.wait(e.call("/get_world_size", method="GET"))["world_size"] for e in endpoints]
        where = {"master_address": self._host, "master_port": free_port(self._host), "world_size": 1 + sum(workers)}
        calls = []
        for i, endpoint in enumerate(endpoints):
            body = {"init_info": where | {"rank_offset": 1 + sum(workers[:i]), "packed": False}}
            calls.append(loop.start(endpoint.call("/init_weight_transfer_engine", body)))
        with guest():
            from vllm.distributed.weight_transfer.nccl_common import trainer_init

            self._group = trainer_init(where)
        for call in calls:
            call.result()
        self._members = members


def buckets(weights: Iterable[tuple[str, Tensor]], size: int = BUCKET) -> Iterator[Bucket]:
    """The tensors in lists of at most `size` bytes, or of one tensor that is larger; contiguous, on this GPU."""
    bucket: Bucket = []
    room = size
    for name, tensor in weights:
        tensor = tensor.detach().to("cuda" if torch.cuda.is_available() else "cpu").contiguous()
        if bucket and tensor.nbytes > room:
            yield bucket
            bucket, room = [], size
        bucket.append((name, tensor))
        room -= tensor.nbytes
    if bucket:
        yield bucket


def describe(bucket: Bucket) -> dict[str, Any]:
    """What vLLM has to know of a bucket."""
    return {
        "names": [name for name, _ in bucket],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
    }


def _start(loop: EventLoop, endpoints: Sequence[Endpoint], path: str, body: Any = None) -> list[Future[Any]]:
    return [loop.start(endpoint.call(path, body)) for endpoint in endpoints]


def _all(loop: EventLoop, endpoints: Sequence[Endpoint], path: str, body: Any = None) -> list[Any]:
    return [call.result() for call in _start(loop, endpoints, path, body)]
