"""Authentication of connections: those that send a token in time are accepted, others are closed without a delay."""

import hmac
import selectors
import socket
import time
from dataclasses import dataclass, field
from typing import Any

HANDSHAKE_TIMEOUT = 10.0
"""Seconds that a connection has for the token."""
MAX_PENDING = 64
"""The largest number of pending connections; the oldest is closed for a new one."""


@dataclass
class _Pending:
    received: bytearray = field(default_factory=bytearray)
    deadline: float = field(default_factory=lambda: time.monotonic() + HANDSHAKE_TIMEOUT)


class Handshakes:
    """Reads the token from all connections of a listener at the same time, so that none delays another.

    Args:
        listener: a listening socket; it becomes non-blocking.
        token: the bytes that a connection must send first.
    """

    def __init__(self, listener: socket.socket, token: str) -> None:
        self._token = token.encode()
        self._listener = listener
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._pending: dict[socket.socket, _Pending] = {}

    def admitted(self, seconds: float) -> list[socket.socket]:
        """The connections that sent the whole token, after waiting at most ``seconds`` for an event."""
        admitted = []
        for key, _ in self._selector.select(seconds):
            connection: Any = key.fileobj
            if connection is self._listener:
                self._accept()
            elif connection in self._pending and self._has_sent_token(connection):
                self._forget(connection)
                admitted.append(connection)
        now = time.monotonic()
        for connection in [c for c, pending in self._pending.items() if pending.deadline < now]:
            self._drop(connection)
        return admitted

    def close(self) -> None:
        """Close the pending connections. Safe to call twice."""
        for connection in list(self._pending):
            self._drop(connection)
        self._selector.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            # The peer hung up before it was accepted.
            return
        if len(self._pending) == MAX_PENDING:
            self._drop(next(iter(self._pending)))
        connection.setblocking(False)
        self._pending[connection] = _Pending()
        self._selector.register(connection, selectors.EVENT_READ)

    def _has_sent_token(self, connection: socket.socket) -> bool:
        received = self._pending[connection].received
        try:
            data = connection.recv(len(self._token) - len(received))
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        received += data
        if data and len(received) < len(self._token):
            return False
        if hmac.compare_digest(bytes(received), self._token):
            return True
        self._drop(connection)
        return False

    def _drop(self, connection: socket.socket) -> None:
        self._forget(connection)
        connection.close()

    def _forget(self, connection: socket.socket) -> None:
        del self._pending[connection]
        self._selector.unregister(connection)
