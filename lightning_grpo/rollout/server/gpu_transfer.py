"""Transfer of weights from GPU to vLLM servers: CUDA IPC on one GPU, vLLM's own transfer over NCCL between GPUs.

Weights are sent in buckets, whose description is sent over TCP or HTTP. Not run on a GPU yet.
"""

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from lightning_grpo.rollout.server.buckets import buckets, describe, send_buckets
from lightning_grpo.rollout.server.endpoint import Endpoint, EventLoop
from lightning_grpo.rollout.server.tcp import free_port
from lightning_grpo.rollout.server.transfer import collect_from_workers
from lightning_grpo.rollout.verify import StoredTensor
from lightning_grpo.rollout.vllm.isolation import isolate_vllm


class IPCTransfer:
    """For servers on this process's GPU, which read each bucket from a buffer that this process fills."""

    def send(
        self, loop: EventLoop, endpoints: Sequence[Endpoint], weights: Iterable[tuple[str, Tensor]]
    ) -> list[StoredTensor]:
        stored = collect_from_workers(
            loop, endpoints, "127.0.0.1", "receive_policy_on_gpu", lambda server: send_buckets(server, weights)
        )
        torch.cuda.ipc_collect()
        return stored


class NCCLTransfer:
    """For servers on other GPUs, here or on other machines, in one process group with this process.

    Args:
        host: address at which the servers reach this process.
    """

    def __init__(self, host: str) -> None:
        self._host = host
        self._group: Any = None
        self._members: list[str] = []

    def send(
        self, loop: EventLoop, endpoints: Sequence[Endpoint], weights: Iterable[tuple[str, Tensor]]
    ) -> list[StoredTensor]:
        self._connect(loop, endpoints)
        # After a failure the next sync creates a new group.
        members, self._members = self._members, []
        _all(loop, endpoints, "/start_weight_update")
        for bucket in buckets(weights):
            calls = _start(loop, endpoints, "/update_weights", {"update_info": describe(bucket)})
            for _, tensor in bucket:
                self._group.broadcast(tensor, src=0, stream=torch.cuda.current_stream())
            # Wait for the answers first: if a server failed, the broadcast never ends.
            for call in calls:
                call.result()
            torch.cuda.current_stream().synchronize()
        _all(loop, endpoints, "/finish_weight_update")
        self._members = members
        return collect_from_workers(loop, endpoints, self._host, "report_weights")

    def _connect(self, loop: EventLoop, endpoints: Sequence[Endpoint]) -> None:
        """Create a new group if other endpoints are in use than before."""
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
        with isolate_vllm():
            from vllm.distributed.weight_transfer.nccl_common import trainer_init

            self._group = trainer_init(where)
        for call in calls:
            call.result()
        self._members = members


def _start(loop: EventLoop, endpoints: Sequence[Endpoint], path: str, body: Any = None) -> list[Future[Any]]:
    return [loop.start(endpoint.call(path, body)) for endpoint in endpoints]


def _all(loop: EventLoop, endpoints: Sequence[Endpoint], path: str, body: Any = None) -> list[Any]:
    return [call.result() for call in _start(loop, endpoints, path, body)]
