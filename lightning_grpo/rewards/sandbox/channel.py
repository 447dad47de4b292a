"""Messages between the run and a worker, none of which can make the run wait longer than it is willing to."""

import select
import socket
import struct
import time

_LENGTH = struct.Struct("!i")
"""What precedes a message, as `multiprocessing.connection.Connection` writes it."""


class Channel:
    """The run's end of the connection to a worker, which can be hostile, stopped, or gone.

    Args:
        link: a connected stream socket.
        max_size: bytes of a message that is received, at most.
    """

    def __init__(self, link: socket.socket, max_size: int) -> None:
        self._link, self._max_size = link, max_size

    def send(self, message: bytes, seconds: float) -> None:
        """Send a message. Raises TimeoutError if the worker has not taken all of it within this time, OSError if it is
        gone."""
        self._link.settimeout(seconds)
        self._link.sendall(_LENGTH.pack(len(message)) + message)

    def poll(self, seconds: float) -> bool:
        """Wait until something can be received, at most this long."""
        readable = select.poll()
        readable.register(self._link, select.POLLIN)
        return bool(readable.poll(1000 * seconds))

    def receive(self, seconds: float) -> bytes:
        """The next message. Raises TimeoutError if it is not complete within this time, EOFError if the worker is gone,
        ValueError if it is too long."""
        deadline = time.monotonic() + seconds
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size, deadline))
        if not 0 <= length <= self._max_size:
            raise ValueError(f"a message of {length} bytes")
        return self._read(length, deadline)

    def _read(self, size: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < size:
            self._link.settimeout(max(deadline - time.monotonic(), 1e-3))
            part = self._link.recv(size - len(data))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    def close(self) -> None:
        self._link.close()
