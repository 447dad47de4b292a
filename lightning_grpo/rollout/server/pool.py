"""A pool of endpoints: which are in use, and which one has room for a request."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from lightning_grpo.errors import UnreachableError
from lightning_grpo.rollout.server.endpoint import Endpoint, EndpointLost

log = logging.getLogger(__name__)


class Pool:
    """All endpoints of an engine, including those that are not in use."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self.endpoints = list(endpoints)
        self._freed = asyncio.Condition()

    @property
    def alive(self) -> list[Endpoint]:
        """The endpoints in use.

        Raises:
            ConnectionError: there is none.
        """
        alive = [endpoint for endpoint in self.endpoints if endpoint.lost is None]
        if not alive:
            raise UnreachableError(f"no vLLM endpoint is left: {'; '.join(str(e.lost) for e in self.endpoints)}")
        return alive

    @asynccontextmanager
    async def room(self, key: int | None = None) -> AsyncIterator[Endpoint]:
        """Wait for an endpoint with room and reserve a place for one request at the one with the most room.

        Requests with the same ``key`` are sent to the same endpoint, which has cached the common beginning of their
        tokens, unless it has no room.
        """
        async with self._freed:
            while not (free := [e for e in self.alive if e.in_flight < e.room]):
                await self._freed.wait()
            endpoint = max(free, key=lambda e: e.room - e.in_flight)
            if key is not None and (usual := self.alive[key % len(self.alive)]) in free:
                endpoint = usual
            endpoint.in_flight += 1
        try:
            yield endpoint
        finally:
            endpoint.in_flight -= 1
            async with self._freed:
                if endpoint.lost is None:
                    self._freed.notify()
                else:
                    self._freed.notify_all()

    def lose(self, endpoint: Endpoint, error: Exception) -> None:
        """Stop using an endpoint until the next weight sync."""
        if endpoint.lost is None:
            endpoint.lost = str(error)
            log.warning("This vLLM server is not used until the next weight sync: %s", endpoint.lost)

    async def keep(self, test: Callable[[Endpoint], Awaitable[None]]) -> list[Endpoint]:
        """Use exactly the endpoints that pass the test, including those lost before. Raises the errors of `alive`."""

        async def tested(endpoint: Endpoint) -> None:
            try:
                await test(endpoint)
                endpoint.lost = None
            except (EndpointLost, ValueError) as error:
                self.lose(endpoint, error)

        await self.each(tested)
        return self.alive

    async def each(self, action: Callable[[Endpoint], Awaitable[Any]]) -> list[Any]:
        """Run the action on all endpoints at the same time; returns the results in order."""
        return list(await asyncio.gather(*map(action, self.endpoints)))
