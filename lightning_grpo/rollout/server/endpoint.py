"""One vLLM server over HTTP, and the event loop in which all of them are talked to."""

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine
from concurrent.futures import Future
from threading import Thread
from typing import Any

import httpx

from lightning_grpo.errors import ReportedError, UnreachableError, UserError


class AccessRefused(ReportedError, PermissionError):
    """The endpoint refuses the API key."""


class EndpointLost(UnreachableError):
    """An endpoint can't be used: it can't be reached, it failed, or it holds other weights than it should."""


class ConnectionDropped(EndpointLost):
    """One connection did not come about or broke; the endpoint itself may be well."""


class Endpoint:
    """One server.

    Args:
        url: such as http://host:8000.
        api_key: sent as bearer token.
        room: requests sent to it at a time.
    """

    def __init__(self, url: str, api_key: str | None = None, *, room: int = 256) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.url = url.rstrip("/")
        self.room = room
        self.client = httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(600.0, connect=30.0),
            # A transport of its own ignores HTTP_PROXY and the like: engines are reached directly, as their weights.
            transport=httpx.AsyncHTTPTransport(
                # vLLM closes a connection that was idle for 5 s, perhaps at the moment of the next request.
                limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=2.0)
            ),
        )
        self.in_flight = 0
        self.lost: str | None = None
        """Why it is out of use; None while it is in use. A lost endpoint is tried again at the next weight sync."""

    async def call(self, path: str, body: Any = None, *, method: str = "POST", copy: int | None = None) -> Any:
        """The parsed reply; None where it is not JSON. ``copy`` says which copy of the model is asked.

        Raises:
            AccessRefused: the endpoint refuses the API key.
            ValueError: it refuses the request.
            EndpointLost: it can't be reached, or failed.
        """
        try:
            headers = {} if copy is None else {"X-data-parallel-rank": str(copy)}
            reply = await self.client.request(method, path, json=body, headers=headers)
            self._refuse(reply, path)
            return reply.json() if "json" in reply.headers.get("content-type", "") else None
        except httpx.HTTPError as error:
            raise self._loss(error) from error

    async def stream(self, path: str, body: Any) -> AsyncIterator[dict[str, Any]]:
        """The parsed events of a reply that comes piece by piece. Raises what `call` does."""
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

    async def is_well(self) -> bool:
        """Whether it answers, and its engine runs."""
        try:
            return (await self.client.get("/health")).status_code == 200
        except httpx.HTTPError:
            return False

    async def is_open(self, path: str) -> bool:
        """Whether it answers a GET request to ``path`` that brings no API key."""
        try:
            return (await self.client.get(path, headers={"Authorization": ""})).status_code == 200
        except httpx.HTTPError as error:
            raise self._loss(error) from error

    def _refuse(self, reply: httpx.Response, path: str) -> None:
        if reply.status_code == 401:
            raise AccessRefused(f"{self.url} refuses the API key (HTTP 401); set api_key")
        if reply.status_code in (400, 403, 404, 422):
            raise UserError(f"{self.url}{path} answered HTTP {reply.status_code}: {reply.text[:500]}")
        reply.raise_for_status()

    def _loss(self, error: httpx.HTTPError) -> EndpointLost:
        broke = isinstance(error, httpx.TransportError) and not isinstance(error, httpx.ReadTimeout)
        kind = ConnectionDropped if broke else EndpointLost
        return kind(f"{self.url}: {type(error).__name__} {error}".strip())


class EventLoop:
    """An event loop in a thread of its own, so that connections outlive a call."""

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
        """Cancel what runs, so that whoever waits for it goes on, and end the thread."""
        self.wait(_cancel_others())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
