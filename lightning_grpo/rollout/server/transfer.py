"""Send the policy's weights to running vLLM servers.

A server pauses, loads the weights, discards what it computed with the earlier ones, records the new version and
resumes. From then on it reports that version for every token that it samples.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import wait

from torch import Tensor

from lightning_grpo.rollout.server.endpoint import Endpoint, EventLoop
from lightning_grpo.rollout.server.tcp import WeightServer
from lightning_grpo.rollout.verify import StoredTensor, WeightSyncError
from lightning_grpo.rollout.vllm.adapter import ADAPTER_NAME, ADAPTER_PATH


class TCPTransfer:
    """Servers fetch the weights from this process, one tensor at a time: no GPU, shared disk or common process group.

    Args:
        host: address at which the servers reach this process.
    """

    def __init__(self, host: str) -> None:
        self._host = host

    def send(
        self, loop: EventLoop, endpoints: Sequence[Endpoint], weights: Iterable[tuple[str, Tensor]]
    ) -> list[StoredTensor]:
        return collect_from_workers(loop, endpoints, self._host, "receive_policy", lambda server: server.send(weights))


def collect_from_workers(
    loop: EventLoop,
    endpoints: Sequence[Endpoint],
    host: str,
    method: str,
    serve: Callable[[WeightServer], None] = lambda server: None,
) -> list[StoredTensor]:
    """Call a method of `WeightReceiver` in all workers of all copies of the endpoints; returns the tensors they store.

    Workers answer over connections of their own, because a server with several copies returns only the reply of the
    first over HTTP.
    """
    server = WeightServer(host)
    try:
        workers = [loop.wait(e.call("/get_world_size", method="GET"))["world_size"] for e in endpoints]
        calls = []
        for endpoint in endpoints:
            body = {"method": method, "args": [server.host, str(server.port), server.token, endpoint.url]}
            calls.append(loop.start(endpoint.call("/collective_rpc", body)))

        def give_up() -> None:
            for endpoint, call in zip(endpoints, calls, strict=True):
                if call.done():
                    call.result()
                    raise WeightSyncError(f"{endpoint.url} did not connect to receive the weights")

        server.accept(sum(workers), give_up=give_up)
        try:
            serve(server)
            answers = server.answers()
        except ConnectionError:
            # Raises the reason for which a worker closed its connection.
            for call in wait(calls, timeout=10).done:
                call.result()
            raise
        for call in calls:
            call.result()
        return [StoredTensor.from_json(stored) for answer in answers for stored in answer["stored"]]
    finally:
        server.close()


async def pause(endpoints: Sequence[Endpoint], *, in_flight: bool) -> None:
    """Stop sampling: after the running requests, or (`in_flight`) in the middle of them."""
    mode = "keep" if in_flight else "wait"
    await asyncio.gather(*(endpoint.call(f"/pause?mode={mode}") for endpoint in endpoints))


async def resume(endpoints: Sequence[Endpoint], tag: str) -> None:
    """Reset the key-value caches, including those of paused requests, record the new version, and continue sampling.

    A paused request keeps its tokens and their log-probs. Its cache is recomputed, so that its next token comes from
    the new weights alone, and later requests find no cached block of the earlier ones.
    """

    async def one(endpoint: Endpoint) -> None:
        if not (await endpoint.call("/reset_prefix_cache?reset_running_requests=true"))["success"]:
            raise WeightSyncError(f"{endpoint.url} did not reset its key-value cache")
        await endpoint.call("/update_weight_version", {"new_version": tag})
        await endpoint.call("/resume")

    await asyncio.gather(*(one(endpoint) for endpoint in endpoints))


async def register_adapter(endpoints: Sequence[Endpoint]) -> None:
    """Register the adapter in the servers' memory under the name that requests use."""

    async def one(endpoint: Endpoint) -> None:
        models = (await endpoint.call("/v1/models", method="GET"))["data"]
        if ADAPTER_NAME not in [model["id"] for model in models]:
            await endpoint.call("/v1/load_lora_adapter", {"lora_name": ADAPTER_NAME, "lora_path": ADAPTER_PATH})

    await asyncio.gather(*(one(endpoint) for endpoint in endpoints))
