"""Completions from a pool of vLLM servers, each token with the version of the weights that sampled it."""

import asyncio
import itertools
import secrets
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Any

from lightning_grpo.rollout.server.cutoff import Cutoff
from lightning_grpo.rollout.server.endpoint import ConnectionDropped, Endpoint, EndpointLost
from lightning_grpo.rollout.server.pool import Pool
from lightning_grpo.rollout.types import Completion, SampleRequest
from lightning_grpo.rollout.vllm.params import finish_reason

GENERATE = "/inference/v1/generate"
MAX_DROPS = 3
"""Connections that one completion may lose to endpoints that are healthy."""


class WeightVersions:
    """The versions of one run's weights, under the names that servers report: ``RUN.NUMBER``.

    Args:
        run: the run's name, the same on all ranks.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self.current = 0
        """The policy's version in the latest sync."""
        self.synced = False
        """Whether the servers have received weights; until then they report a name of their own."""

    def tag(self, version: int) -> str:
        """The name of a version."""
        return f"{self._run}.{version}"

    def of_tokens(self, endpoint: Endpoint, spans: Sequence[dict[str, Any]], *, oldest: int) -> list[int]:
        """One version per token, from the spans of tokens that the endpoint reports.

        Raises:
            EndpointLost: a token was sampled with weights older than `oldest`, or not of this run.
        """
        versions = []
        for span in spans:
            run, _, number = span["version"].partition(".")
            if not self.synced:
                run, number = self._run, self.current
            if run != self._run or int(number) < oldest:
                raise EndpointLost(
                    f"{endpoint.url} sampled with weights {span['version']!r}, this run's are "
                    f"{self.tag(oldest)!r}: it was restarted, or another run uses it"
                )
            versions += [int(number)] * (span["end"] - span["start"])
        return versions


class Sampler:
    """Sends each completion's request to the endpoint with the most room, and to another one if that is lost.

    Args:
        pool: the endpoints.
        versions: what their weights are called.
    """

    def __init__(self, pool: Pool, versions: WeightVersions) -> None:
        self._pool = pool
        self._versions = versions
        self._request_ids = (f"{secrets.token_hex(8)}-{n}" for n in itertools.count())

    async def sample(
        self,
        request: SampleRequest,
        body: dict[str, Any],
        on_group: Callable[[tuple[int, list[Completion]]], None],
    ) -> list[list[Completion]]:
        """As `Engine.generate`.

        Args:
            request: what to sample.
            body: of every HTTP request, without tokens and seed.
            on_group: called in the event loop with each prompt's index and completions.
        """
        cutoff = Cutoff(request.count, request.spare)

        async def group(i: int, prompt: Sequence[int], seeds: Sequence[int]) -> list[Completion]:
            completions = list(await asyncio.gather(*(self.sample_one(body, prompt, seed, cutoff) for seed in seeds)))
            on_group((i, completions))
            return completions

        pairs = zip(request.prompts, request.seeds, strict=True)
        tasks = [asyncio.ensure_future(group(i, prompt, seeds)) for i, (prompt, seeds) in enumerate(pairs)]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def sample_one(
        self,
        body: dict[str, Any],
        prompt: Sequence[int],
        seed: int,
        cutoff: Cutoff | None = None,
        key: int | None = None,
    ) -> Completion:
        """One completion of ``prompt``; ``body`` is as in `sample`, and ``key`` as in `Pool.room`."""
        body = body | {"token_ids": list(prompt), "sampling_params": body["sampling_params"] | {"seed": seed}}
        cutoff = cutoff or Cutoff(1, spare=0)
        drops = 0
        while True:
            request_id = next(self._request_ids)
            async with self._pool.room(key) as endpoint:
                try:
                    return await self._stream(endpoint, body | {"request_id": request_id, "stream": True}, cutoff)
                except EndpointLost as error:
                    cutoff.lost(request_id)
                    drops += isinstance(error, ConnectionDropped)
                    if not isinstance(error, ConnectionDropped) or drops > MAX_DROPS or not await endpoint.is_healthy():
                        self._pool.lose(endpoint, error)

    async def _stream(self, endpoint: Endpoint, body: dict[str, Any], cutoff: Cutoff) -> Completion:
        request_id, oldest = body["request_id"], self._versions.current
        token_ids: list[int] = []
        logprobs: list[float] = []
        choice: dict[str, Any] = {}
        async with aclosing(endpoint.stream(GENERATE, body)) as events:
            async for event in events:
                for choice in event["choices"]:
                    if choice["token_ids"] and not token_ids:
                        await cutoff.begun(request_id, endpoint)
                    token_ids += choice["token_ids"]
                    logprobs += [token["logprob"] for token in choice["logprobs"]["content"]]
        reason = choice.get("finish_reason")
        if reason is None or (reason == "abort" and not cutoff.has_cut(request_id)):
            raise EndpointLost(f"{endpoint.url} ended a request before its end")
        versions = self._versions.of_tokens(endpoint, choice["weight_versions"], oldest=oldest)
        await cutoff.ended(request_id)
        return Completion(
            token_ids=token_ids, logprobs=logprobs, finish_reason=finish_reason(reason), versions=versions
        )
