"""vLLM in other processes: one engine over any number of `vllm serve` endpoints.

Token ids travel in both directions, never text. Requests go to the endpoint with the fewest in flight; what an endpoint
loses is asked again at another, with the same seed. Weights are fetched by the endpoints from here.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

import httpx
import torch
from torch import Tensor

from lightning_grpo.rollout.proof import Held, WeightSyncError
from lightning_grpo.rollout.types import Completion, OnGroup, Sampling
from lightning_grpo.rollout.wire import WeightOffer, own_address

log = logging.getLogger(__name__)
RECEIVER = "lightning_grpo.rollout.receiver.WeightReceiver"
SERVER_COMMAND = "python -m vllm.entrypoints.openai.api_server --model MODEL"
SERVER_FLAGS = (
    "--tokens-only",
    "--logprobs-mode",
    "processed_logprobs",
    "--generation-config",
    "vllm",
    "--worker-extension-cls",
    RECEIVER,
)
"""What a server needs beside the model, together with VLLM_SERVER_DEV_MODE=1 in its environment."""


class Endpoint:
    """One server."""

    def __init__(self, url: str, api_key: str | None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.url = url.rstrip("/")
        self.client = httpx.AsyncClient(
            base_url=self.url,
            headers=headers,
            timeout=httpx.Timeout(600.0, connect=10.0),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64),
        )
        self.in_flight = 0
        self.lost: str | None = None
        """Why it is out of use; None while it is in use. A lost endpoint is tried again at the next weight sync."""

    async def call(self, path: str, body: Any = None, *, method: str = "POST") -> Any:
        """The parsed reply.

        Raises:
            PermissionError: the endpoint refuses the API key.
            ValueError: it refuses the request.
            httpx.HTTPError: it can't be reached, or failed.
        """
        reply = await self.client.request(method, path, json=body)
        if reply.status_code in (401, 403):
            raise PermissionError(f"{self.url} refuses the API key (HTTP {reply.status_code}); set api_key")
        if reply.status_code in (400, 404, 422):
            raise ValueError(f"{self.url}{path} answered HTTP {reply.status_code}: {reply.text[:500]}")
        reply.raise_for_status()
        return reply.json() if reply.content else None


class ServerEngine:
    """An `Engine` over vLLM servers.

    Args:
        urls: of the servers, such as http://host:8000. Each was started with `SERVER_FLAGS` and VLLM_SERVER_DEV_MODE=1
            in a private network: vLLM guards sampling with the API key, but not the control endpoints.
        eos_token_ids: tokens that end a completion.
        api_key: sent as bearer token.
        max_in_flight: requests sent to one endpoint at a time.
        sampling_args: any argument of `vllm.SamplingParams` by name, for every request.
        weights_host: address at which the servers can reach this process. None finds it out.
        pushes: whether this rank sends the weights. One rank of a distributed run does; all consume the stream.
        barrier: called by all ranks after a sync; waits for the others.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        eos_token_ids: Sequence[int],
        api_key: str | None = None,
        max_in_flight: int = 256,
        sampling_args: dict[str, Any] | None = None,
        weights_host: str | None = None,
        pushes: bool = True,
        barrier: Callable[[], None] = lambda: None,
    ) -> None:
        if not urls:
            raise ValueError("urls is empty; name at least one vLLM server, such as http://localhost:8000")
        if len({url.rstrip("/") for url in urls}) < len(urls):
            raise ValueError(f"urls {list(urls)} name a server more than once")
        self.eos_token_ids = list(eos_token_ids)
        self.sampling_args = sampling_args or {}
        self.dtype: torch.dtype | None = None
        """What the servers compute in; weights are cast to it before they travel."""
        self.version = 0
        self.held: list[Held] = []
        self._pushes = pushes
        self._barrier = barrier
        self._max_in_flight = max_in_flight
        self._background = ThreadPoolExecutor(1, thread_name_prefix="rollout-ahead")
        # One event loop in one thread, so that connections outlive a call.
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="vllm-endpoints", daemon=True)
        self._thread.start()
        self.endpoints = [Endpoint(url, api_key) for url in urls]
        hosts = [urlsplit(endpoint.url).hostname for endpoint in self.endpoints]
        self._weights_host = weights_host or own_address([host for host in hosts if host])
        try:
            self._wait(self._each(self._check))
        except BaseException:
            self.close()
            raise

    # ── Sampling ──────────────────────────────────────────────────────────────────────────────────────────────────

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        max_tokens: int,
        seeds: Sequence[Sequence[int]],
        on_group: OnGroup | None = None,
    ) -> list[list[Completion]]:
        return self._wait(self._generate(prompts, self._params(sampling, max_tokens), seeds, on_group))

    def submit(self, *args: Any, **kwargs: Any) -> Future[list[list[Completion]]]:
        """`generate` in the background. `on_group` is then called in another thread."""
        return self._background.submit(self.generate, *args, **kwargs)

    async def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: dict[str, Any],
        seeds: Sequence[Sequence[int]],
        on_group: OnGroup | None,
    ) -> list[list[Completion]]:
        version = self.version
        room = asyncio.Semaphore(self._max_in_flight * len(self.endpoints))

        async def sample(prompt: Sequence[int], seed: int) -> Completion:
            async with room:
                choice = (await self._ask({"token_ids": list(prompt), "sampling_params": params | {"seed": seed}}))[
                    "choices"
                ][0]
            logprobs = [token["logprob"] for token in choice["logprobs"]["content"]]
            reason = choice["finish_reason"] if choice["finish_reason"] in ("stop", "length") else "abort"
            ids = choice["token_ids"]
            versions = [version] * len(ids)
            return Completion(token_ids=ids, logprobs=logprobs, finish_reason=reason, versions=versions)

        async def group(i: int) -> list[Completion]:
            done = list(await asyncio.gather(*(sample(prompts[i], seed) for seed in seeds[i])))
            if on_group is not None:
                on_group(i, done)
            return done

        tasks = [asyncio.ensure_future(group(i)) for i in range(len(prompts))]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """One completion from the least busy endpoint; another endpoint's where that one fails."""
        while True:
            alive = [endpoint for endpoint in self.endpoints if endpoint.lost is None]
            if not alive:
                reasons = "; ".join(f"{endpoint.url}: {endpoint.lost}" for endpoint in self.endpoints)
                raise ConnectionError(f"no vLLM endpoint is left ({reasons})")
            endpoint = min(alive, key=lambda e: e.in_flight)
            endpoint.in_flight += 1
            try:
                return await endpoint.call("/inference/v1/generate", body)
            except httpx.HTTPError as error:
                self._lose(endpoint, error)
            finally:
                endpoint.in_flight -= 1

    def _lose(self, endpoint: Endpoint, error: Exception) -> None:
        if endpoint.lost is None:
            endpoint.lost = f"{type(error).__name__} {error}".strip()
            log.warning("%s is out of use until the next weight sync: %s", endpoint.url, endpoint.lost)

    def _params(self, sampling: Sampling, max_tokens: int) -> dict[str, Any]:
        if sampling.stop:
            raise ValueError(
                f"sampling.stop is {sampling.stop}: servers that work on token ids (--tokens-only) know no stop "
                "strings; use VLLMRollout, or end completions with an end-of-sequence token"
            )
        return {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "stop_token_ids": self.eos_token_ids,
            "ignore_eos": True,
            "max_tokens": max_tokens,
            "logprobs": 0,
            "detokenize": False,
        } | self.sampling_args

    # ── Weights ───────────────────────────────────────────────────────────────────────────────────────────────────

    def update_weights(self, weights: Iterable[tuple[str, Tensor]], version: int) -> None:
        """Let every endpoint fetch the weights; requests that others sent there finish first.

        Raises:
            WeightSyncError: where an endpoint took the weights only in part. An endpoint that can't be reached goes
                out of use; `ConnectionError` where none is left.
        """
        if not self._pushes:
            for _ in weights:
                pass
            self._barrier()
            self.version = version
            return
        alive = self._wait(self._revive())
        workers = [self._wait(e.call("/get_world_size", method="GET"))["world_size"] for e in alive]
        offer = WeightOffer(self._weights_host)
        try:
            body = {"method": "receive_policy", "args": [offer.host, str(offer.port), offer.token]}
            calls = [self._start(self._quietly(endpoint, body)) for endpoint in alive]

            def give_up() -> None:
                for endpoint, call in zip(alive, calls, strict=True):
                    if call.done():
                        call.result()
                        raise WeightSyncError(f"{endpoint.url} did not come for the weights")

            offer.accept(sum(workers), give_up=give_up)
            offer.send(weights)
            self.held = []
            for endpoint, call in zip(alive, calls, strict=True):
                for worker in call.result()["results"]:
                    self.held += [Held.from_json(h, at=endpoint.url) for h in worker]
        except (httpx.HTTPError, ConnectionError, ValueError) as error:
            raise WeightSyncError(f"the vLLM servers did not take the weights: {error}") from error
        finally:
            offer.close()
        for endpoint in alive:
            if not self._wait(endpoint.call("/reset_prefix_cache"))["success"]:
                raise WeightSyncError(f"{endpoint.url} did not reset its prefix cache: requests are running there")
            self._wait(endpoint.call("/resume"))
        self._barrier()
        self.version = version

    async def _quietly(self, endpoint: Endpoint, body: dict[str, Any]) -> Any:
        await endpoint.call("/pause?mode=wait")
        return await endpoint.call("/collective_rpc", body)

    async def _revive(self) -> list[Endpoint]:
        """Endpoints that answer. Those lost before are tried again: they get the current weights like the others."""
        for endpoint in self.endpoints:
            try:
                await endpoint.call("/health", method="GET")
                endpoint.lost = None
            except (httpx.HTTPError, ValueError) as error:
                self._lose(endpoint, error)
        alive = [endpoint for endpoint in self.endpoints if endpoint.lost is None]
        if not alive:
            raise ConnectionError(f"no vLLM endpoint answers: {', '.join(e.url for e in self.endpoints)}")
        return alive

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        return next(iter(self.replica_logprobs(sequences).values()))

    def replica_logprobs(self, sequences: Sequence[Sequence[int]]) -> dict[str, list[Tensor]]:
        """`logprobs` of every endpoint in use, by its URL."""
        alive = [endpoint for endpoint in self.endpoints if endpoint.lost is None]
        return {e.url: [self._wait(self._score(e, sequence)) for sequence in sequences] for e in alive}

    async def _score(self, endpoint: Endpoint, sequence: Sequence[int]) -> Tensor:
        params = {"temperature": 0, "max_tokens": 1, "prompt_logprobs": 0, "detokenize": False}
        reply = await endpoint.call("/inference/v1/generate", {"token_ids": list(sequence), "sampling_params": params})
        scored = zip(sequence[1:], reply["prompt_logprobs"][1:], strict=True)
        return torch.tensor([entry[str(token)]["logprob"] for token, entry in scored])

    # ── Life ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def sleep(self) -> None:
        """Servers have their own device: nothing to give back."""

    def wake(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self._background.shutdown(cancel_futures=True)
        for endpoint in self.endpoints:
            self._wait(endpoint.client.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _check(self, endpoint: Endpoint) -> None:
        """Is this a server that we can use? Raises with what to start it with."""
        try:
            await endpoint.call("/health", method="GET")
        except httpx.HTTPError as error:
            raise ConnectionError(f"{endpoint.url} can't be reached ({error}); is the vLLM server up?") from error
        flags = f"VLLM_SERVER_DEV_MODE=1 {SERVER_COMMAND} {' '.join(SERVER_FLAGS)}"
        try:
            info = await endpoint.call("/server_info?config_format=json", method="GET")
        except ValueError as error:
            raise ValueError(f"{endpoint.url} can't take weights; start it with: {flags}") from error
        config = info["vllm_config"]
        mode = config.get("model_config", {}).get("logprobs_mode")
        extension = config.get("parallel_config", {}).get("worker_extension_cls")
        if mode != "processed_logprobs" or extension != RECEIVER:
            raise ValueError(
                f"{endpoint.url} has logprobs_mode {mode!r} and worker_extension_cls {extension!r}; "
                f"start it with: {flags}"
            )
        dtype = getattr(torch, str(config["model_config"]["dtype"]).removeprefix("torch."))
        if self.dtype not in (None, dtype):
            raise ValueError(f"{endpoint.url} computes in {dtype}, another server in {self.dtype}; start them alike")
        self.dtype = dtype
        await endpoint.call("/inference/v1/generate", {"token_ids": [0], "sampling_params": {"max_tokens": 1}})

    async def _each(self, action: Callable[[Endpoint], Coroutine[Any, Any, Any]]) -> None:
        await asyncio.gather(*(action(endpoint) for endpoint in self.endpoints))

    def _start(self, coroutine: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def _wait(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        future = self._start(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise
