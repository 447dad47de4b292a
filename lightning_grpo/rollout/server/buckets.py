"""Tensors in buckets, and their transfer to another process through a buffer on a GPU that both share.

The buffer's handle is sent as JSON by a `WeightServer`; nothing is unpickled. Each receiver gets an export of its own:
torch counts the references to an export, and two receivers would release the same one twice.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import rebuild_cuda_tensor, reduce_tensor

from lightning_grpo.errors import UserError
from lightning_grpo.rollout.server.tcp import WeightClient, WeightServer

BUCKET = 256 << 20
"""Bytes per bucket, unless a single tensor is larger."""
Bucket = list[tuple[str, Tensor]]


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
    """Names, dtypes and shapes, under the names that vLLM gives them."""
    return {
        "names": [name for name, _ in bucket],
        "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
        "shapes": [list(tensor.shape) for _, tensor in bucket],
    }


def send_buckets(server: WeightServer, weights: Iterable[tuple[str, Tensor]], size: int = BUCKET) -> None:
    """Send the weights to all receivers that are connected to the server and call `fetch_buckets`."""
    buffer = torch.empty(0, dtype=torch.uint8)
    places: list[dict[str, Any]] = []
    for bucket in buckets(weights, size):
        parts = [tensor.reshape(-1).view(torch.uint8) for _, tensor in bucket]
        sizes = [part.numel() for part in parts]
        if sum(sizes) > buffer.numel():
            buffer = torch.empty(max(size, sum(sizes)), dtype=torch.uint8, device=parts[0].device)
            places = [export(buffer) for _ in range(server.receivers)]
        for room, part in zip(buffer[: sum(sizes)].split(sizes), parts, strict=True):
            room.copy_(part)
        _synchronize(buffer.device)
        server.send_headers([describe(bucket) | {"place": place} for place in places])
        # Every receiver has copied the bucket; the buffer is free for the next.
        server.answers()
    server.send_headers([{"end": True}] * server.receivers)


def fetch_buckets(client: WeightClient, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """The tensors that `send_buckets` sends, copied to storage of their own on ``device``.

    Raises:
        ValueError: if the sender's GPU is another one.
    """
    place: dict[str, Any] | None = None
    buffer = torch.empty(0)
    while "end" not in (header := client.header()):
        if header["place"] != place:
            place = header["place"]
            buffer = open_export(place, device)
        start = 0
        tensors = []
        for name, dtype_name, shape in zip(header["names"], header["dtype_names"], header["shapes"], strict=True):
            dtype = getattr(torch, dtype_name)
            stop = start + torch.Size(shape).numel() * dtype.itemsize
            tensors.append((name, buffer[start:stop].clone().view(dtype).view(shape)))
            start = stop
        _synchronize(device)
        client.answer({})
        yield from tensors


def export(buffer: Tensor) -> dict[str, Any]:
    """The handle of a one-dimensional buffer of bytes on this process's GPU, as JSON values."""
    _, arguments = reduce_tensor(buffer)
    return {
        "gpu": _gpu(buffer.device),
        "size": buffer.numel(),
        # After tensor type, size, stride, offset, storage type and dtype: device, handle, …
        "arguments": [{"hex": a.hex()} if isinstance(a, bytes) else a for a in arguments[6:]],
    }


def open_export(place: dict[str, Any], device: torch.device) -> Tensor:
    """The buffer that another process exported.

    Raises:
        ValueError: if it lies on another GPU than ``device``.
    """
    if place["gpu"] != _gpu(device):
        raise UserError(
            f"transfer is ipc, but the trainer's GPU ({place['gpu']}) is not this server's ({_gpu(device)}); set "
            "transfer to nccl or tcp"
        )
    _, *arguments = (bytes.fromhex(a["hex"]) if isinstance(a, dict) else a for a in place["arguments"])
    size = torch.Size([place["size"]])
    return rebuild_cuda_tensor(Tensor, size, (1,), 0, torch.storage.TypedStorage, torch.uint8, device.index, *arguments)


def _gpu(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
