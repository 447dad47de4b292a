"""Rules about time and memory."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lightning_grpo.diagnosis.finding import Finding
from lightning_grpo.diagnosis.history import History
from lightning_grpo.diagnosis.rule import Rule
from lightning_grpo.diagnosis.statistics import trend
from lightning_grpo.monitor import PHASES


@dataclass(frozen=True, kw_only=True)
class SlowerSteps(Rule):
    """Steps take longer and longer, and more than their tokens explain: a leak, a reward that slows down, a full disk
    or a machine that throttles."""

    name: ClassVar[str] = "slower_steps"
    source: ClassVar[str] = "ms-swift#9991, trl#4591"
    needs: ClassVar[tuple[str, ...]] = ("step_time",)
    ranges: ClassVar[dict[str, str]] = {"factor": "(1, inf)", "window": "[8, inf)"}

    after: int = 20
    factor: float = 1.5
    """Growth of the seconds per step over the run's own start."""
    window: int = 20
    """Latest steps in which they grow, or all of which are slow."""

    def check(self, history: History) -> Finding | None:
        start, recent = history.start("step_time", 13), history.last("step_time", self.window)
        before, now = float(np.median(start.values[3:])), float(np.median(recent.values[-5:]))
        # longer completions take longer: compare times per token
        lengths = (
            history.start("completions/mean_length", 13).median,
            history.last("completions/mean_length", 5).median,
        )
        longer = max(1.0, lengths[1] / lengths[0]) if lengths[0] > 0 else 1.0
        growth = now / before / longer
        third = self.window // 3
        first, middle, last = (
            float(np.median(part))
            for part in (recent.values[:third], recent.values[third:-third], recent.values[-third:])
        )
        creeps = trend(recent.values) > 3.3 and middle - first > 0.2 * (last - first)
        lasts = recent.median > self.factor * longer * before
        if growth < self.factor or not (creeps or lasts):
            return None
        phases = {name: _growth(history, f"time/{name}") for name in PHASES if f"time/{name}" in history}
        slowest = max(phases, key=phases.__getitem__, default=None)
        everywhere = slowest is not None and self._is_everywhere(history, slowest, before, now)
        where = "all phases are" if everywhere else f"{slowest} is {phases[slowest]:.3g} s" if slowest else ""
        return self.finding(
            history,
            f"a step takes {now:.3g} s, {before:.3g} s at the start, and completions are {longer:.1f} times as long"
            + (f"; {where} slower" if where else ""),
            evidence=["step_time", *(f"time/{name}" for name in phases), "completions/mean_length"],
            advice=_ADVICE.get(None if everywhere else slowest, _ELSEWHERE),
            severity="note" if everywhere else None,
            extent=growth,
        )

    @staticmethod
    def _is_everywhere(history: History, slowest: str, before: float, now: float) -> bool:
        """Whether all phases have slowed down alike, so that the cause is outside of the run."""
        name = f"time/{slowest}"
        return now - _now(history, name) > (1 + now / before) / 2 * (before - _before(history, name))


_ELSEWHERE = "look for other work on the machine, a processor that throttles, and growing caches"
_ADVICE = {
    "rollout": "look at the engine: fewer sequences at once (max_num_seqs), a full cache, or single long completions",
    "reward": "measure the reward: it may collect state, or wait for something that gets slower",
    "sync": "look at the transfer of weights to the engine",
}


def _before(history: History, name: str) -> float:
    """Seconds of a phase at the start; the first steps allocate and compile."""
    return float(np.median(history.start(name, 13).values[3:]))


def _now(history: History, name: str) -> float:
    return history.last(name, 5).median


def _growth(history: History, name: str) -> float:
    """By how many seconds a phase has grown since the start."""
    return _now(history, name) - _before(history, name)


@dataclass(frozen=True, kw_only=True)
class MemoryGrowth(Rule):
    """Memory grows steadily from step to step, and the run will end when it is full."""

    name: ClassVar[str] = "memory_growth"
    source: ClassVar[str] = "ms-swift#9991"
    needs: ClassVar[tuple[str, ...]] = ("memory/gib",)
    ranges: ClassVar[dict[str, str]] = {"growth": "(0, inf)", "least": "[0, inf)", "window": "[8, inf)"}

    after: int = 20
    growth: float = 0.1
    """Growth within the window, relative to its beginning."""
    least: float = 0.1
    """Smallest growth within the window that counts, in GiB: small processes grow by buffers of their libraries."""
    window: int = 15
    """Latest steps, in both halves of which it must grow alike."""

    def check(self, history: History) -> Finding | None:
        recent = history.last("memory/gib", self.window)
        x, half = recent.values, self.window // 2
        first, second = x[half] - x[0], x[-1] - x[half]
        # an allocator takes memory in jumps, a leak takes about as much in every step
        is_steady = second >= 0.5 * first > 0 and np.quantile(np.diff(x), 0.25) >= 0.4 * (x[-1] - x[0]) / len(x)
        if x[-1] - x[0] < max(self.least, self.growth * x[0]) or not is_steady or trend(x) < 3.3:
            return None
        rate = float(x[-1] - x[0]) / (recent.steps[-1] - recent.steps[0])
        return self.finding(
            history,
            f"memory grows by {1024 * rate:.0f} MiB per step, from {x[0]:.2f} GiB at step {recent.steps[0]} to "
            f"{x[-1]:.2f} GiB",
            since=int(recent.steps[0]),
            evidence=["memory/gib", "completions/max_length"],
            advice="look for tensors that a reward, a callback or a subclass keeps, such as losses with their graphs",
            extent=float(x[-1]),
        )
