"""HTTP client for one vLLM server, and the event loop in which all clients run."""

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from concurrent.futures import Future
from threading import Thread
from typing import Any

import httpx

from lightning_grpo.errors import ReportedError, UnreachableError, UserError


class AccessRefused(ReportedError, PermissionError):
    """The endpoint rejects the API key."""


class EndpointLost(UnreachableError):
    """An endpoint cannot be used: it cannot be reached, failed, or has the wrong weights."""


class ConnectionDropped(EndpointLost):
    """One connection could not be made or broke; the endpoint itself may be healthy."""


class Endpoint:
    """One server.

    Args:
        url: such as http://host:8000.
        api_key: sent as bearer token.
        room: the largest number of requests at the same time.
    """

    def __init__(self, url: str, api_key: str | None = None, *, room: int = 256) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.url = url.rstrip("/")
        self.room = room
        self.client = httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(600.0, connect=30.0),
            # An explicit transport ignores HTTP_PROXY and similar variables: servers are reached directly.
            transport=httpx.AsyncHTTPTransport(
                # vLLM closes connections after 5 s of idleness, which may coincide with the next request.
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0)
            ),
        )
        self.in_flight = 0
        self.lost: str | None = None
        """Why the endpoint is not in use; None while it is. A lost endpoint is tried again at the next weight sync."""

    async def call(self, path: str, body: Any = None, *, method: str = "POST", copy: int | None = None) -> Any:
        """The parsed reply; None if it is not JSON. ``copy`` selects a copy of the model.

        Raises:
            AccessRefused: the endpoint rejects the API key.
            UserError: it rejects the request.
            EndpointLost: it cannot be reached, or failed.
        """
        try:
            headers = {} if copy is None else {"X-data-parallel-rank": str(copy)}
            reply = await self.client.request(method, path, json=body, headers=headers)
            self._refuse(reply, path)
            return reply.json() if "json" in reply.headers.get("content-type", "") else None
        except httpx.HTTPError as error:
            raise self._loss(error) from error

    async def stream(self, path: str, body: Any) -> AsyncGenerator[dict[str, Any], None]:
        """The parsed events of a streamed reply. Raises the errors of `call`."""
        try:
            async with self.client.stream("POST", path, json=body) as reply:
                if reply.status_code != 200:
                    await reply.aread()
                    self._refuse(reply, path)
                async for line in reply.aiter_lines():
                    if line.startswith("data: {"):
                        event = json.loads(line.removeprefix("data: "))
                        if "error" in event:
                            raise EndpointLost(f"{self.url} failed: {event['error']}")
                        yield event
        except httpx.HTTPError as error:
            raise self._loss(error) from error

    async def is_healthy(self) -> bool:
        """Whether the server answers and its engine runs."""
        try:
            return (await self.client.get("/health")).status_code == 200
        except httpx.HTTPError:
            return False

    async def is_open(self, path: str) -> bool:
        """Whether the server answers a GET request to ``path`` without an API key."""
        try:
            return (await self.client.get(path, headers={"Authorization": ""})).status_code == 200
        except httpx.HTTPError as error:
            raise self._loss(error) from error

    def _refuse(self, reply: httpx.Response, path: str) -> None:
        if reply.status_code == 401:
            raise AccessRefused(f"{self.url} rejects the API key (HTTP 401); set api_key")
        if reply.status_code in (400, 403, 404, 422):
            raise UserError(f"{self.url}{path} answered HTTP {reply.status_code}: {reply.text[:500]}")
        reply.raise_for_status()

    def _loss(self, error: httpx.HTTPError) -> EndpointLost:
        broke = isinstance(error, httpx.TransportError) and not isinstance(error, httpx.ReadTimeout)
        kind = ConnectionDropped if broke else EndpointLost
        return kind(f"{self.url}: {type(error).__name__} {error}".strip())


class EventLoop:
    """An event loop in a thread of its own, so that connections persist between calls."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="vllm-endpoints", daemon=True)
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        future = self.start(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    @property
    def closed(self) -> bool:
        return self._loop.is_closed()

    def close(self) -> None:
        """Cancel all tasks, which wakes up the threads that wait for them, and end the thread."""
        self.wait(_cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
