"""Tensors over TCP, one at a time: the trainer serves its weights, engines in other processes fetch them.

This needs no shared file system, GPU or common process group, and memory for one tensor on each side. Each message
consists of the length of a JSON header (8 bytes, big-endian), the header, and the tensor's bytes. Engines answer with
such a header.
"""

import json
import secrets
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_grpo.rollout.server.handshake import Handshakes

TIMEOUT = 600.0
"""Seconds without a byte after which either side gives up."""


class WeightServer:
    """The trainer's side: listens on a free port until it is closed.

    Args:
        host: address to listen on, at which the engines reach it.
    """

    def __init__(self, host: str) -> None:
        self.token = secrets.token_hex(32)
        self._listener = socket.create_server((host, 0), family=_family(host))
        self._handshakes = Handshakes(self._listener, self.token)
        self.host, self.port = self._listener.getsockname()[:2]
        self._receivers: list[socket.socket] = []

    def accept(self, count: int, *, give_up: Callable[[], None] = lambda: None) -> None:
        """Wait until ``count`` receivers that know the token are connected. Other connections are closed.

        Args:
            count: the number of receivers.
            give_up: called at least once per second; raises an error when the receivers will not connect.

        Raises:
            ConnectionError: too few connected in time.
        """
        end = time.monotonic() + TIMEOUT
        while len(self._receivers) < count:
            give_up()
            if time.monotonic() > end:
                raise ConnectionError(
                    f"{len(self._receivers)} of {count} engines connected to {self.host}:{self.port} within "
                    f"{TIMEOUT:.0f} s"
                )
            for receiver in self._handshakes.admitted(seconds=1.0):
                receiver.settimeout(TIMEOUT)
                self._receivers.append(receiver)

    @property
    def receivers(self) -> int:
        """The number of connected receivers."""
        return len(self._receivers)

    def send(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Stream every tensor to every receiver."""
        for name, tensor in weights:
            flat = tensor.detach().cpu().contiguous()
            header = {"name": name, "dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape)}
            data = flat.reshape(-1).view(torch.uint8).numpy().data
            for receiver in self._receivers:
                _send_header(receiver, header)
                receiver.sendall(data)
        self.send_headers([{"end": True}] * self.receivers)

    def send_headers(self, headers: Sequence[dict[str, Any]]) -> None:
        """Send each receiver its own header."""
        for receiver, header in zip(self._receivers, headers, strict=True):
            _send_header(receiver, header)

    def answers(self) -> list[dict[str, Any]]:
        """Wait for one answer from each receiver."""
        return [_receive_header(receiver) for receiver in self._receivers]

    def close(self) -> None:
        """Stop listening; a stream cut short makes the receivers fail, not finish."""
        self._handshakes.close()
        for connection in [self._listener, *self._receivers]:
            connection.close()


class WeightClient:
    """The engine's side of a `WeightServer`, a context manager."""

    def __init__(self, host: str, port: int, token: str) -> None:
        self._connection = socket.create_connection((host, port), timeout=TIMEOUT)
        self._connection.sendall(token.encode())

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors that the server sends, on the CPU.

        Raises:
            ConnectionError: the stream ended before all tensors arrived.
        """
        while "end" not in (header := self.header()):
            tensor = torch.empty(header["shape"], dtype=getattr(torch, header["dtype"]))
            _receive_into(self._connection, tensor.view(-1).view(torch.uint8).numpy().data)
            yield header["name"], tensor

    def header(self) -> dict[str, Any]:
        """The next header from the server."""
        return _receive_header(self._connection)

    def answer(self, answer: dict[str, Any]) -> None:
        _send_header(self._connection, answer)

    def __enter__(self) -> "WeightClient":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()


def own_address(towards: Sequence[str]) -> str:
    """This machine's address from the point of view of the given hosts."""
    with socket.socket(_family(towards[0]), socket.SOCK_DGRAM) as probe:
        probe.connect((towards[0], 9))
        return probe.getsockname()[0]


def free_port(host: str) -> int:
    """A free port at this machine's address `host`."""
    with socket.create_server((host, 0), family=_family(host)) as probe:
        return probe.getsockname()[1]


def _family(host: str) -> socket.AddressFamily:
    """IPv4 if the host has such an address, else IPv6."""
    families = {address[0] for address in socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)}
    return socket.AF_INET if socket.AF_INET in families else socket.AF_INET6


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
