"""Require the API key on every route of a vLLM server.

vLLM requires its API key only under ``/v1`` and ``/inference``. The routes that load weights, call methods of the
workers, pause the server or put it to sleep are open to everyone who can reach the port; on a shared machine that is
every user.
"""

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from lightning_grpo.errors import UserError

OPEN_PATH = "/health"
"""The one route without the key; it only reports whether the server runs."""

_Message = MutableMapping[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]


class RequireKey:
    """ASGI middleware that answers 401 unless a request has the server's API key as its bearer token.

    Enable it with ``--middleware lightning_grpo.rollout.server.access.RequireKey``.

    Raises:
        UserError: at the server's start, if the environment variable VLLM_API_KEY is not set.
    """

    def __init__(self, app: Callable[[_Message, _Receive, _Send], Awaitable[None]]) -> None:
        key = os.environ.get("VLLM_API_KEY")
        if not key:
            raise UserError(
                "VLLM_API_KEY is not set, and --middleware lightning_grpo.rollout.server.access.RequireKey requires "
                "it; set it, or omit that flag on a network that only the trainer reaches"
            )
        self._app = app
        self._expected = f"Bearer {key}".encode()

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] == OPEN_PATH or self._has_key(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await send({"type": "http.response.start", "status": 401, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})

    def _has_key(self, scope: _Message) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return hmac.compare_digest(given, self._expected)
