"""An engine that always samples from the policy's current weights, and proves it before it samples."""

import logging
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from threading import get_ident
from typing import TypeVar

import torch
from torch import Tensor

from lightning_grpo.rollout.engine import Engine
from lightning_grpo.rollout.types import Completion, OnGroup, SampleRequest
from lightning_grpo.rollout.verify import (
    Fingerprint,
    Mismatch,
    Tolerance,
    WeightStream,
    WeightSyncError,
    canary_sequences,
    check_canary,
)

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """What one sync did and what proved it."""

    version: int
    seconds: float
    """Streaming the weights, fingerprints included."""
    proof_seconds: float
    """Scoring the canary on both sides."""
    bytes: int
    tensors: int
    moved: list[str]
    """Names of the tensors that changed since the sync before; all of them at the first."""
    compared: int
    """Tensors whose bits in the engine were compared with those sent."""
    canary: Mismatch


class SyncedEngine:
    """An engine together with the policy whose weights it samples from.

    Before it generates it asks for the policy's version, and compares the weights' bits if something else than an
    optimizer step may have changed them. Where either moved, the weights are streamed into the engine,
    the bits that the engine holds must be those that were sent, and the log-probs of fixed token sequences must then
    agree on both sides, within what the dtypes' rounding explains and four times what the first sync showed. Otherwise
    `WeightSyncError` is raised, naming tensors, and nothing is sampled.

    Args:
        engine: what samples.
        version: gives the policy's version, which rises with every optimizer step.
        weights: gives a fresh stream of the policy's weights under Hugging Face names.
        score: the policy's log-probs of whole sequences at temperature 1, [n − 1] each for n tokens.
        counters: gives something that is equal between two calls if nothing wrote to the policy's weights by torch's
            ordinary operations: see `write_counters`.
        vocab_size: of the policy; the canary's tokens are drawn from all of it.
        dtype: what the policy computes in.
        canary_length: tokens of each of the four canary sequences; the first sync scores all of them, each later one
            the next in turn.
        tolerance: the mismatch that passes, in nats; None takes it from the dtypes and the first sync.
        sleep: let the engine give its memory back after each `generate`.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        version: Callable[[], int],
        weights: Callable[[], Iterable[tuple[str, Tensor]]],
        score: Callable[[Sequence[Sequence[int]]], list[Tensor]],
        counters: Callable[[], Hashable] = lambda: None,
        vocab_size: int,
        dtype: torch.dtype = torch.float32,
        canary_length: int = 16,
        tolerance: Tolerance | None = None,
        sleep: bool = False,
    ) -> None:
        self.engine = engine
        self.last_sync: SyncReport | None = None
        self._version = version
        self._weights = weights
        self._score = score
        self._counters = counters
        self._sleep = sleep
        self._dtypes = (dtype, engine.dtype or dtype)
        self._canary = canary_sequences(vocab_size, length=canary_length)
        self._tolerance = tolerance
        self._measured: tuple[Mismatch, float] | None = None
        self._proofs = 0
        self._fingerprints: dict[str, Fingerprint] | None = None
        self._synced_version: int | None = None
        self._synced_counters: Hashable = None
        self._compare = False
        self._pending: Future | None = None
        self._background = ThreadPoolExecutor(1, "rollout-ahead", initializer=self._note_thread)
        self._background_thread: int | None = None

    def _note_thread(self) -> None:
        self._background_thread = get_ident()

    @property
    def version(self) -> int | None:
        """The policy version that the engine holds; None before the first sync."""
        return self._synced_version

    def generate(self, request: SampleRequest, on_group: OnGroup | None = None) -> list[list[Completion]]:
        """As `Engine.generate`, after a `sync` unless `run_in_background` made one for this thread."""
        if get_ident() != self._background_thread:
            self.sync()
        groups = self.engine.generate(request, on_group)
        if self._sleep:
            self.engine.sleep()
        return groups

    def run_in_background(self, sample: Callable[[], T]) -> Future[T]:
        """Sync now, then call ``sample`` in a background thread while the policy trains.

        `generate` does not sync in that thread: it would read weights that the optimizer is changing. The next sync
        waits for ``sample`` to return, so that all its tokens come from one policy version; unless that sync is
        ``in_flight``.

        Raises:
            TypeError: the engine shares the trainer's process.
        """
        if not self.engine.runs_in_background:
            raise TypeError(
                f"{type(self.engine).__name__} shares the trainer's process and can't sample in the background; use "
                "VLLMProcessRollout or VLLMServerRollout, or generate in turn"
            )
        self.sync()
        self._pending = self._background.submit(sample)
        return self._pending

    def logprobs(self, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        self.sync()
        return self.engine.logprobs(sequences)

    def sync(self, *, in_flight: bool = False) -> SyncReport | None:
        """Give the engine the policy's weights if it doesn't hold them; None where it did.

        Collective where the policy is sharded.

        Args:
            in_flight: don't wait for what is sampled ahead: its further tokens come from the new weights.
        """
        version = self._version()
        if self._holds(version):
            self.engine.wake()
            return None
        if self._pending is not None and not in_flight:
            wait([self._pending])
            self._pending = None
        self._synced_version = None
        start = time.perf_counter()
        counters = self._counters()
        stream = self._stream()
        try:
            self.engine.wake()
            self.engine.update_weights(stream, version, in_flight=in_flight)
        except Exception as error:
            if stream.current is None:
                raise
            raise WeightSyncError(f"the engine did not take {stream.current}: {error}") from error
        moved = list(stream.fingerprints)
        if self._fingerprints is not None:
            moved = stream.compare(self._fingerprints)
        compared = stream.check(self.engine.held or ())
        if self._fingerprints is None and self.engine.held is not None and compared < len(stream.fingerprints):
            log.warning(
                "%d of %d tensors can't be compared bit by bit in the engine; for them the proof is the canary alone",
                len(stream.fingerprints) - compared,
                len(stream.fingerprints),
            )
        seconds = time.perf_counter() - start
        canary = self._prove(version, moved)
        self.last_sync = SyncReport(
            version=version,
            seconds=seconds,
            proof_seconds=time.perf_counter() - start - seconds,
            bytes=stream.bytes,
            tensors=len(stream.fingerprints),
            moved=moved,
            compared=compared,
            canary=canary,
        )
        self._fingerprints = stream.fingerprints
        self._synced_version, self._synced_counters, self._compare = version, counters, False
        return self.last_sync

    def expect_writes(self) -> None:
        """Compare the weights bit by bit at the next sync even if their version is the same: others had a chance to
        write to them, as callbacks that average weights do around validation."""
        self._compare = True

    def _holds(self, version: int) -> bool:
        """Whether the engine holds the policy's weights of now."""
        if version != self._synced_version or self.engine.weights_lost:
            return False
        counters = self._counters()
        if self._compare or counters != self._synced_counters:
            stream = self._stream()
            for _ in stream:
                pass
            if stream.fingerprints != self._fingerprints:
                return False
            self._synced_counters, self._compare = counters, False
        return True

    def _stream(self) -> WeightStream:
        return WeightStream(self._weights(), self.engine.dtype)

    def _prove(self, version: int, moved: Sequence[str]) -> Mismatch:
        # All sequences once, which calibrates the tolerance; then one at a time, in turn.
        canary = self._canary if self._measured is None else [self._canary[self._proofs % len(self._canary)]]
        self._proofs += 1
        expected = self._score(canary)
        level = torch.cat(expected).abs().mean().item()
        tolerance = self._tolerance or self._tolerance_at(level)
        seen = []
        for place, logprobs in self.engine.replica_logprobs(canary).items():
            off = check_canary(logprobs, expected)
            seen.append(off)
            if tolerance.exceeded_by(off):
                raise WeightSyncError(
                    f"after the sync to policy version {version} the engine's log-probs{place and ' at '}{place} "
                    f"differ from the policy's by {off.mean:.3g} nats on average and {off.max:.3g} at most; "
                    f"{tolerance.mean:.3g} and {tolerance.max:.3g} would be rounding. {self._suspects(moved)}"
                )
        largest = max(seen, key=lambda m: m.mean)
        self._measured = self._measured or (largest, level)
        return largest

    def _tolerance_at(self, level: float) -> Tolerance:
        tolerance = Tolerance.of(self._dtypes, level)
        if self._measured is None:
            return tolerance
        measured, then = self._measured
        return tolerance.narrowed(measured, growth=max(1.0, level / then))

    def _suspects(self, moved: Sequence[str]) -> str:
        shown = ", ".join(moved[:8]) + (f" and {len(moved) - 8} more" if len(moved) > 8 else "")
        return f"Tensors that moved in this sync: {shown or 'none'}."

    def close(self) -> None:
        """Close the engine, which ends what runs in the background."""
        try:
            self.engine.close()
        finally:
            self._background.shutdown(cancel_futures=True)
