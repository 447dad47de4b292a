"""Tensors over TCP, one at a time: the trainer offers its weights, engines in other processes come and fetch them.

It needs no shared file system, no GPU and no common process group, and holds one tensor in memory on each side. Each
message is the length of a JSON header (8 bytes, big-endian), the header, and the tensor's bytes. Engines answer with
such a header.
"""

import hmac
import json
import secrets
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

TIMEOUT = 600.0
"""Seconds without a byte after which either side gives up."""


class WeightOffer:
    """The trainer's side: listens on a free port until closed.

    Args:
        host: address to listen on, as the engines reach it.
    """

    def __init__(self, host: str) -> None:
        self.token = secrets.token_hex(32)
        self._listener = socket.create_server((host, 0))
        self._listener.settimeout(1.0)
        self.host, self.port = self._listener.getsockname()[:2]
        self._receivers: list[socket.socket] = []

    def accept(self, count: int, *, give_up: Any = lambda: None) -> None:
        """Wait until `count` receivers that know the token are connected. `give_up` is called each second and raises
        where they will not come; `ConnectionError` where they did not come in time."""
        end = time.monotonic() + TIMEOUT
        while len(self._receivers) < count:
            give_up()
            if time.monotonic() > end:
                raise ConnectionError(f"{len(self._receivers)} of {count} engines came to {self.host}:{self.port}")
            try:
                connection, _ = self._listener.accept()
            except TimeoutError:
                continue
            connection.settimeout(TIMEOUT)
            if hmac.compare_digest(_receive_exactly(connection, len(self.token)), self.token.encode()):
                self._receivers.append(connection)
            else:
                connection.close()

    def send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Stream every tensor to every receiver."""
        for name, tensor in weights:
            flat = tensor.detach().cpu().contiguous()
            header = {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
            data = flat.reshape(-1).view(torch.uint8).numpy()
            for receiver in self._receivers:
                _send_header(receiver, header)
                receiver.sendall(data)
        for receiver in self._receivers:
            _send_header(receiver, {"end": True})

    def answers(self) -> list[dict[str, Any]]:
        """What each receiver answers."""
        return [_receive_header(receiver) for receiver in self._receivers]

    def close(self) -> None:
        """Stop listening; a stream cut short makes the receivers fail, not finish."""
        for connection in [self._listener, *self._receivers]:
            connection.close()


class Delivery:
    """The engine's side of an offer, a context manager."""

    def __init__(self, host: str, port: int, token: str) -> None:
        self._connection = socket.create_connection((host, port), timeout=TIMEOUT)
        self._connection.sendall(token.encode())

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The offered tensors, on the CPU.

        Raises:
            ConnectionError: where the stream ends before the offer is complete.
        """
        while "end" not in (header := _receive_header(self._connection)):
            tensor = torch.empty(header["shape"], dtype=getattr(torch, header["dtype"]))
            _receive_into(self._connection, memoryview(tensor.view(-1).view(torch.uint8).numpy()))
            yield header["name"], tensor

    def answer(self, answer: dict[str, Any]) -> None:
        _send_header(self._connection, answer)

    def __enter__(self) -> "Delivery":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()


def own_address(towards: Sequence[str]) -> str:
    """This machine's address as the given hosts see it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((towards[0], 9))
        return probe.getsockname()[0]


def free_port(host: str) -> int:
    """A port that nobody listens on at this machine's address `host`."""
    with socket.create_server((host, 0)) as probe:
        return probe.getsockname()[1]


def _send_header(connection: socket.socket, header: dict[str, Any]) -> None:
    data = json.dumps(header).encode()
    connection.sendall(len(data).to_bytes(8, "big") + data)


def _receive_header(connection: socket.socket) -> dict[str, Any]:
    return json.loads(_receive_exactly(connection, int.from_bytes(_receive_exactly(connection, 8), "big")))


def _receive_exactly(connection: socket.socket, count: int) -> bytes:
    buffer = bytearray(count)
    _receive_into(connection, memoryview(buffer))
    return bytes(buffer)


def _receive_into(connection: socket.socket, view: memoryview) -> None:
    while view:
        received = connection.recv_into(view)
        if not received:
            raise ConnectionError("the stream of weights ended early")
        view = view[received:]
