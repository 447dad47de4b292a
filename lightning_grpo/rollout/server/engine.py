"""One engine over any number of vLLM servers in other processes.

Only token ids are exchanged, never text. The servers fetch the weights from this process.
"""

import asyncio
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any, Literal
from urllib.parse import urlsplit

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_grpo.errors import UserError
from lightning_grpo.rollout.engine import Engine
from lightning_grpo.rollout.server.checks import (
    CHECK_SEQUENCES,
    ServerInfo,
    check_alike,
    check_server,
    check_stop,
    choose_transfer,
)
from lightning_grpo.rollout.server.endpoint import Endpoint, EndpointLost, EventLoop
from lightning_grpo.rollout.server.gpu_transfer import IPCTransfer, NCCLTransfer
from lightning_grpo.rollout.server.pool import Pool
from lightning_grpo.rollout.server.sampling import GENERATE, Sampler, WeightVersions
from lightning_grpo.rollout.server.tcp import own_address
from lightning_grpo.rollout.server.transfer import TCPTransfer, pause, register_adapter, resume
from lightning_grpo.rollout.server.turns import ServerTurns
from lightning_grpo.rollout.types import Completion, OnGroup, SampleRequest, Sampling, Turn
from lightning_grpo.rollout.verify import StoredTensor, WeightSyncError, place_of
from lightning_grpo.rollout.vllm.adapter import ADAPTER_NAME
from lightning_grpo.rollout.vllm.params import sampling_params
from lightning_grpo.rollout.vllm.tokenizer import require_same_tokenizer, tokenizer_facts

STREAM_INTERVAL = 100
"""A server sends a completion's first token by itself and then this many at a time. Each message also shows that the
server is alive."""


class ServerEngine(Engine):
    """An `Engine` over vLLM servers, which can sample while the policy trains.

    Args:
        urls: the servers, such as http://host:8000, each started with `SERVER_FLAGS` and `SERVER_ENVIRONMENT`.
        eos_token_ids: tokens that end a completion.
        api_key: sent as bearer token.
        max_in_flight: the largest number of requests at one server at a time; less if it samples fewer.
        sampling_args: any argument of `vllm.SamplingParams` by name, for every request.
        adapter: the `adapter_settings` with which the servers were started, if `update_weights` takes a LoRA adapter
            (`adapter_weights`); None if it takes whole weights.
        weights_host: address at which the servers reach this process. None detects it.
        transfer: how weights are sent: tcp; ipc (to servers on this process's GPU); nccl (to other GPUs, if the servers
            were started for it); auto, which is nccl if they were started for it and there is a GPU here, else tcp.
        pushes: whether this rank sends the weights. One rank of a distributed run does; all consume the stream.
        barrier: called by all ranks before and after a sync; waits for the other ranks.
        run: the run's name in the versions that servers report, the same on all ranks. None draws a random one.
    """

    runs_in_background = updates_in_flight = True

    def __init__(
        self,
        urls: Sequence[str],
        *,
        eos_token_ids: Sequence[int],
        api_key: str | None = None,
        max_in_flight: int = 256,
        sampling_args: dict[str, Any] | None = None,
        adapter: dict[str, Any] | None = None,
        weights_host: str | None = None,
        transfer: Literal["auto", "tcp", "ipc", "nccl"] = "auto",
        pushes: bool = True,
        barrier: Callable[[], None] = lambda: None,
        run: str | None = None,
    ) -> None:
        if not urls:
            raise UserError("urls is empty; name at least one vLLM server, such as http://localhost:8000")
        if len({url.rstrip("/") for url in urls}) < len(urls):
            raise UserError(f"urls {list(urls)} name a server more than once")
        self.eos_token_ids = list(eos_token_ids)
        self.sampling_args = sampling_args or {}
        self.stored: list[StoredTensor] = []
        self._versions = WeightVersions(run or secrets.token_hex(4))
        self._adapter = adapter
        self._pushes = pushes
        self._barrier = barrier
        self._pool = Pool([Endpoint(url, api_key, room=max_in_flight) for url in urls])
        self._sampler = Sampler(self._pool, self._versions)
        self._loop = EventLoop()
        try:
            self._infos: list[ServerInfo] = self._loop.wait(self._pool.each(check_server))
            check_alike(self._infos, adapter)
            chosen = choose_transfer(self._infos, transfer, adapter)
        except BaseException:
            self.close()
            raise
        for endpoint, info in zip(self.endpoints, self._infos, strict=True):
            room = max(1, info.max_num_seqs // 2, info.max_num_seqs - CHECK_SEQUENCES)
            endpoint.room = min(endpoint.room, info.copies * room)
        host = weights_host or own_address([urlsplit(info.url).hostname for info in self._infos])
        self._transfer: TCPTransfer | IPCTransfer | NCCLTransfer
        if chosen == "ipc":
            self._transfer = IPCTransfer()
        else:
            self._transfer = NCCLTransfer(host) if chosen == "nccl" else TCPTransfer(host)

    @property
    def version(self) -> int:
        """The policy's version in the latest `update_weights`."""
        return self._versions.current

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]  # of the servers, not to be set
        """What the servers compute in; weights are cast to it before they travel."""
        return self._infos[0].dtype

    @property
    def endpoints(self) -> list[Endpoint]:
        return self._pool.endpoints

    def check_stop(self, stop: Sequence[str]) -> None:
        """Raise `UserError` if there are stop strings and a server has no tokenizer to look for them."""
        check_stop(self._infos, stop)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise `UserError` if a server has a tokenizer that differs from this one."""
        facts = tokenizer_facts(tokenizer)
        for endpoint, info in zip(self.endpoints, self._infos, strict=True):
            if info.has_tokenizer:
                reply = self._loop.wait(endpoint.call("/collective_rpc", {"method": "tokenizer_facts"}))
                require_same_tokenizer(reply["results"][0], facts, at=endpoint.url)

    # ── Sampling ──────────────────────────────────────────────────────────────────────────────────────────────────

    def generate(self, request: SampleRequest, on_group: OnGroup | None = None) -> list[list[Completion]]:
        check_stop(self._infos, request.sampling.stop)
        body = self._sampling_body(request.sampling, request.max_tokens)
        finished: SimpleQueue[tuple[int, list[Completion]] | None] = SimpleQueue()
        call = self._loop.start(self._sampler.sample(request, body, finished.put))
        call.add_done_callback(lambda _: finished.put(None))
        try:
            while (group := finished.get()) is not None:
                if on_group is not None:
                    on_group(*group)
            return call.result()
        finally:
            call.cancel()

    @contextmanager
    def turns(self, sampling: Sampling) -> Iterator[ServerTurns]:
        check_stop(self._infos, sampling.stop)

        def start(turn: Turn) -> Future[Completion]:
            body = self._sampling_body(sampling, turn.max_tokens)
            return self._loop.start(self._sampler.sample_one(body, turn.token_ids, turn.seed, key=turn.key))

        turns = ServerTurns(start)
        try:
            yield turns
        finally:
            turns.cancel()

    def _sampling_body(self, sampling: Sampling, max_tokens: int) -> dict[str, Any]:
        params = sampling_params(sampling, max_tokens=max_tokens, eos_token_ids=self.eos_token_ids)
        return self._body(params | {"stream_interval": STREAM_INTERVAL} | self.sampling_args)

    def _body(self, params: dict[str, Any]) -> dict[str, Any]:
        """A request's body without its tokens; it names the adapter once the servers have one."""
        adapted = self._versions.synced and self._adapter is not None
        return {"sampling_params": params} | ({"model": ADAPTER_NAME} if adapted else {})

    # ── Weights ───────────────────────────────────────────────────────────────────────────────────────────────────

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int, *, in_flight: bool = False) -> None:
        """As `Engine.update_weights`, for every server. Collective.

        Raises:
            WeightSyncError: a server loaded only a part of the weights.
            ConnectionError: no server can be reached. Otherwise, those that cannot be reached are not used.
        """
        # Requests of other ranks must finish before the weights change.
        self._barrier()
        if self._pushes:
            self._push(weights, version, in_flight)
        else:
            for _ in weights:
                pass
        self._barrier()
        self._versions.synced = True
        self._loop.wait(self._require_version(version))
        self._versions.current = version

    def _push(self, weights: Iterable[tuple[str, Tensor]], version: int, in_flight: bool) -> None:
        alive = self._loop.wait(self._reachable())
        try:
            self._loop.wait(pause(alive, in_flight=in_flight))
            self.stored = self._transfer.send(self._loop, alive, weights)
            if self._adapter is not None:
                self._loop.wait(register_adapter(alive))
            self._loop.wait(resume(alive, self._versions.tag(version)))
        except (ConnectionError, ValueError) as error:
            raise WeightSyncError(f"the vLLM servers did not load the weights: {error}") from error

    async def _reachable(self) -> list[Endpoint]:
        """The endpoints that answer, including those that were lost: they receive the current weights too."""

        async def ping(endpoint: Endpoint) -> None:
            await endpoint.call("/health", method="GET")

        return await self._pool.keep(ping)

    async def _require_version(self, version: int) -> None:
        """Use the endpoints that have the weights. Every rank checks it: it may have lost other endpoints than the rank
        that sent the weights."""

        async def check(endpoint: Endpoint) -> None:
            reported = (await endpoint.call("/weight_info", method="GET"))["weight_version"]
            if reported != self._versions.tag(version):
                raise EndpointLost(
                    f"{endpoint.url} has weights {reported!r} instead of {self._versions.tag(version)!r}"
                )

        await self._pool.keep(check)

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        return next(iter(self.replica_logprobs(sequences).values()))

    def replica_logprobs(self, sequences: Sequence[Sequence[int]]) -> dict[str, list[Tensor]]:
        """As `Engine.replica_logprobs`, for every copy in the endpoints in use. Completions may be sampled too."""
        copies = {
            place_of(endpoint.url, copy): (endpoint, copy)
            for endpoint, info in zip(self.endpoints, self._infos, strict=True)
            if endpoint in self._pool.alive
            for copy in range(info.copies)
        }

        async def score(endpoint: Endpoint, copy: int) -> list[Tensor]:
            return list(await asyncio.gather(*(self._score(endpoint, copy, sequence) for sequence in sequences)))

        async def score_all() -> list[list[Tensor]]:
            return list(await asyncio.gather(*(score(*place) for place in copies.values())))

        return dict(zip(copies, self._loop.wait(score_all()), strict=True))

    async def _score(self, endpoint: Endpoint, copy: int, sequence: Sequence[int]) -> Tensor:
        params = {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
        body = self._body(params) | {"token_ids": list(sequence)}
        reply = await endpoint.call(GENERATE, body, copy=copy)
        scored = zip(sequence[1:], reply["prompt_logprobs"][1:], strict=True)
        return torch.tensor([entry[str(token)]["logprob"] for token, entry in scored], dtype=torch.float32)

    def close(self) -> None:
        """End running requests, including those in the background, and the connections."""
        if self._loop.closed:
            return
        self._loop.wait(self._pool.each(lambda endpoint: endpoint.client.aclose()))
        self._loop.close()
