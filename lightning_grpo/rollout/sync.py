"""An engine that always samples from the policy's current weights, verified before it samples."""

import logging
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import TypeVar

import torch
from torch import Tensor

from lightning_grpo.rollout.engine import Engine
from lightning_grpo.rollout.turns import Turns
from lightning_grpo.rollout.types import Completion, OnGroup, SampleRequest, Sampling
from lightning_grpo.rollout.verify import (
    Fingerprint,
    Mismatch,
    Tolerance,
    WeightStream,
    WeightSyncError,
    check_sequences,
    compare_logprobs,
)

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class SyncReport:
    """What one sync sent, and the result of its verification."""

    version: int
    seconds: float
    """Time to stream the weights, fingerprints included."""
    verification_seconds: float
    """Time to score the check sequences on both sides."""
    bytes: int
    tensors: int
    moved: list[str]
    """Names of the tensors that changed since the previous sync; all of them at the first one."""
    compared: int
    """How many tensors were compared bitwise in the engine with those that were sent."""
    mismatch: Mismatch
    """The difference of the log-probs of the check sequences; that of the worst copy of the model."""


class SyncedEngine:
    """An engine together with the policy whose weights it samples from.

    Before it samples it reads the policy's version, and compares the weights bitwise if something other than an
    optimizer step may have changed them. If they changed, they are streamed into the engine. What it then stores must
    be bitwise equal to what was sent, and the log-probs of fixed check sequences must agree on both sides, within the
    rounding of the dtypes and within four times the difference at the first sync. Otherwise `WeightSyncError` is
    raised, which names tensors, and nothing is sampled.

    Args:
        engine: the engine.
        version: returns the policy's version, which rises with every optimizer step.
        weights: returns a fresh stream of the policy's weights under Hugging Face names.
        score: returns the policy's log-probs of whole sequences at temperature 1, [n − 1] for each one of n tokens.
        counters: returns a value that stays equal unless torch's ordinary operations write to the policy's weights:
            see `write_counters`.
        vocab_size: the policy's vocabulary size; the tokens of the check sequences are drawn from all of it.
        dtype: the dtype that the policy computes in.
        rounding: the relative error of the policy's weights, if they are rounded to 4 bits and the engine's are not.
        check_length: tokens in each of the four check sequences. The first sync scores all of them, each later one
            scores the next in turn.
        tolerance: the mismatch that is accepted, in nats; None derives it from the dtypes and the first sync.
        sleep: let the engine release its memory after each `generate` or `turns`.
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
        rounding: float = 0.0,
        check_length: int = 16,
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
        self._rounding = rounding
        self._check_sequences = check_sequences(vocab_size, length=check_length)
        self._tolerance = tolerance
        self._measured: tuple[Mismatch, float] | None = None
        self._verifications = 0
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
        """The policy version whose weights the engine has; None before the first sync."""
        return self._synced_version

    def generate(self, request: SampleRequest, on_group: OnGroup | None = None) -> list[list[Completion]]:
        """Sync, except in the thread of `run_in_background`, and sample as `Engine.generate` does."""
        self._sync_to_sample()
        groups = self.engine.generate(request, on_group)
        if self._sleep:
            self.engine.sleep()
        return groups

    @contextmanager
    def turns(self, sampling: Sampling) -> Iterator[Turns]:
        """Sync, except in the thread of `run_in_background`, and sample as in `Engine.turns`."""
        self._sync_to_sample()
        with self.engine.turns(sampling) as turns:
            yield turns
        if self._sleep:
            self.engine.sleep()

    def _sync_to_sample(self) -> None:
        if get_ident() != self._background_thread:
            self.sync()

    def run_in_background(self, sample: Callable[[], T]) -> Future[T]:
        """Sync now, then call ``sample`` in a background thread while the policy trains.

        `generate` and `turns` do not sync in that thread: they would read weights that the optimizer is changing. The
        next sync waits for ``sample`` to return, so that all its tokens come from one policy version; unless that sync
        is ``in_flight``.

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

    def sync(self, *, in_flight: bool = False) -> SyncReport | None:
        """Send the policy's weights to the engine and verify them; returns None if the engine had them already.

        Collective if the policy is sharded.

        Args:
            in_flight: don't wait for what runs in the background: its remaining tokens come from the new weights.

        Raises:
            WeightSyncError: the engine does not compute with the policy's weights.
        """
        version = self._version()
        if self._is_current(version):
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
            raise WeightSyncError(f"the engine could not load {stream.current}: {error}") from error
        moved = list(stream.fingerprints)
        if self._fingerprints is not None:
            moved = stream.compare(self._fingerprints)
        compared = stream.check(self.engine.stored or ())
        if self._fingerprints is None and self.engine.stored is not None and compared < len(stream.fingerprints):
            log.warning(
                "%d of %d tensors cannot be compared bitwise in the engine. They are verified only by comparing "
                "log-probs of fixed sequences.",
                len(stream.fingerprints) - compared,
                len(stream.fingerprints),
            )
        seconds = time.perf_counter() - start
        mismatch = self._verify(version, moved)
        self.last_sync = SyncReport(
            version=version,
            seconds=seconds,
            verification_seconds=time.perf_counter() - start - seconds,
            bytes=stream.bytes,
            tensors=len(stream.fingerprints),
            moved=moved,
            compared=compared,
            mismatch=mismatch,
        )
        self._fingerprints = stream.fingerprints
        self._synced_version, self._synced_counters, self._compare = version, counters, False
        return self.last_sync

    def expect_writes(self) -> None:
        """Compare the weights bitwise at the next sync even if their version is the same. To be called when other code,
        such as a callback that averages weights around validation, may have written to them."""
        self._compare = True

    def _is_current(self, version: int) -> bool:
        """Whether the engine has the policy's current weights."""
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

    def _verify(self, version: int, moved: Sequence[str]) -> Mismatch:
        # The first sync scores all sequences, which calibrates the tolerance; later ones score one in turn.
        sequences = self._check_sequences
        if self._measured is not None:
            sequences = [sequences[self._verifications % len(sequences)]]
        self._verifications += 1
        expected = self._score(sequences)
        level = torch.cat(expected).abs().mean().item()
        tolerance = self._tolerance or self._tolerance_at(level)
        mismatches = []
        for place, logprobs in self.engine.replica_logprobs(sequences).items():
            mismatch = compare_logprobs(logprobs, expected)
            mismatches.append(mismatch)
            if tolerance.exceeded_by(mismatch):
                raise WeightSyncError(
                    f"after the sync to policy version {version} the engine's log-probs{place and ' at '}{place} "
                    f"differ from the policy's by {mismatch.mean:.3g} nats on average and {mismatch.max:.3g} at most; "
                    f"rounding explains {tolerance.mean:.3g} and {tolerance.max:.3g}. {_changed_tensors(moved)}"
                )
        largest = max(mismatches, key=lambda m: m.mean)
        if self._rounding and self._measured is None:
            log.warning(
                "The engine has the checkpoint's own weights, and the policy has them in 4 bits: log-probs of fixed "
                "sequences differ by %.3g nats on average and %.3g at most. objective.rollout_correction corrects it.",
                largest.mean,
                largest.max,
            )
        self._measured = self._measured or (largest, level)
        return largest

    def _tolerance_at(self, level: float) -> Tolerance:
        tolerance = Tolerance.of(self._dtypes, level, self._rounding)
        if self._measured is None:
            return tolerance
        measured, first_level = self._measured
        return tolerance.narrowed(measured, growth=max(1.0, level / first_level))

    def close(self) -> None:
        """Close the engine, which ends what runs in the background."""
        try:
            self.engine.close()
        finally:
            self._background.shutdown(cancel_futures=True)


def _changed_tensors(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f"Tensors that changed since the previous sync: {shown or 'none'}."
