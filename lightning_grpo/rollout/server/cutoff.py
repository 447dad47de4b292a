"""Ends the last completions of a call early, so that it does not wait for a few long ones."""

import asyncio
from collections import defaultdict
from contextlib import suppress

from lightning_grpo.rollout.server.endpoint import Endpoint, EndpointLost


class Cutoff:
    """Cuts completions where they are, once as many have ended as are waited for and every one has begun.

    Args:
        count: completions of the call.
        spare: of them, how many may be cut.
    """

    def __init__(self, count: int, spare: int) -> None:
        self._count = count
        self._to_end = count - spare
        self._begun: set[str] = set()
        self._running: dict[str, Endpoint] = {}
        self._cut: set[str] = set()

    async def begun(self, request_id: str, endpoint: Endpoint) -> None:
        """The first token came."""
        self._begun.add(request_id)
        self._running[request_id] = endpoint
        await self._cut_if_due()

    async def ended(self, request_id: str) -> None:
        """The last token came."""
        self._running.pop(request_id)
        self._to_end -= 1
        await self._cut_if_due()

    def lost(self, request_id: str) -> None:
        """It is asked for again, as another request."""
        self._running.pop(request_id, None)
        self._begun.discard(request_id)
        self._cut.discard(request_id)

    def has_cut(self, request_id: str) -> bool:
        return request_id in self._cut

    async def _cut_if_due(self) -> None:
        if self._to_end > 0 or len(self._begun) < self._count:
            return
        to_cut: dict[Endpoint, list[str]] = defaultdict(list)
        for request_id, endpoint in self._running.items():
            if request_id not in self._cut:
                to_cut[endpoint].append(request_id)
        self._cut.update(*to_cut.values())
        await asyncio.gather(*(_abort(endpoint, ids) for endpoint, ids in to_cut.items()))


async def _abort(endpoint: Endpoint, request_ids: list[str]) -> None:
    # What vLLM calls the requests that come with these ids.
    body = {"request_ids": [f"generate-tokens-{request_id}" for request_id in request_ids]}
    # Whoever reads from an endpoint that is lost learns that, and asks another.
    with suppress(EndpointLost):
        await endpoint.call("/inference/v1/abort_requests", body)
