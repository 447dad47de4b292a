"""Several endpoints as one: which are in use, and which has room for a request."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from lightning_grpo.errors import UnreachableError
from lightning_grpo.rollout.server.endpoint import Endpoint, EndpointLost

log = logging.getLogger(__name__)


class Pool:
    """Endpoints, those out of use among them."""

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self.endpoints = list(endpoints)
        self._freed = asyncio.Condition()

    @property
    def alive(self) -> list[Endpoint]:
        """Those in use.

        Raises:
            ConnectionError: where there are none.
        """
        alive = [endpoint for endpoint in self.endpoints if endpoint.lost is None]
        if not alive:
            raise UnreachableError(f"no vLLM endpoint is left: {'; '.join(str(e.lost) for e in self.endpoints)}")
        return alive

    @asynccontextmanager
    async def room(self) -> AsyncIterator[Endpoint]:
        """The endpoint with the most room, as soon as one has any, with a request less of it meanwhile."""
        async with self._freed:
            while not (free := [e for e in self.alive if e.in_flight < e.room]):
                await self._freed.wait()
            endpoint = max(free, key=lambda e: e.room - e.in_flight)
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
        """Take an endpoint out of use."""
        if endpoint.lost is None:
            endpoint.lost = str(error)
            log.warning("out of use until the next weight sync: %s", endpoint.lost)

    async def keep(self, test: Callable[[Endpoint], Awaitable[None]]) -> list[Endpoint]:
        """Use the endpoints that pass, those lost before among them, and no others. Raises what `alive` does."""

        async def tested(endpoint: Endpoint) -> None:
            try:
                await test(endpoint)
                endpoint.lost = None
            except (EndpointLost, ValueError) as error:
                self.lose(endpoint, error)

        await self.each(tested)
        return self.alive

    async def each(self, action: Callable[[Endpoint], Awaitable[Any]]) -> list[Any]:
        """The action on all endpoints at the same time."""
        return list(await asyncio.gather(*map(action, self.endpoints)))
