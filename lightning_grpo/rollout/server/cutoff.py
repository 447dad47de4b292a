"""Cuts the last completions of a call short, so that it does not wait for a few long ones."""

import asyncio
from collections import defaultdict
from contextlib import suppress

from lightning_grpo.rollout.server.endpoint import Endpoint, EndpointLost


class Cutoff:
    """Aborts the running completions once enough have ended and every one has a token.

    Args:
        count: completions in the call.
        spare: the number of them that may be cut short.
    """

    def __init__(self, count: int, spare: int) -> None:
        self._count = count
        self._to_end = count - spare
        self._begun: set[str] = set()
        self._running: dict[str, Endpoint] = {}
        self._cut: set[str] = set()

    async def begun(self, request_id: str, endpoint: Endpoint) -> None:
        """Record that the first token arrived."""
        self._begun.add(request_id)
        self._running[request_id] = endpoint
        await self._cut_if_due()

    async def ended(self, request_id: str) -> None:
        """Record that the last token arrived."""
        self._running.pop(request_id)
        self._to_end -= 1
        await self._cut_if_due()

    def lost(self, request_id: str) -> None:
        """Forget a request that is sent again under another id."""
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
    # vLLM adds this prefix to the ids of requests.
    body = {"request_ids": [f"generate-tokens-{request_id}" for request_id in request_ids]}
    # The request itself notices that the endpoint is lost, and is sent to another one.
    with suppress(EndpointLost):
        await endpoint.call("/inference/v1/abort_requests", body)
