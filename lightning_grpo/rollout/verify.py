"""Does the engine sample from the policy? Fingerprints of what was sent; log-probs of fixed tokens on both sides."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_grpo.errors import RunError, UserError


class WeightSyncError(RunError):
    """The engine does not hold the policy's weights; nothing may be sampled from it."""


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """How far the engine's log-probs lie from the policy's on the same tokens, in nats."""

    mean: float
    """Mean |log p_policy − log p_engine|."""
    max: float
    """Largest |log p_policy − log p_engine|."""
    p99: float
    """The 99th percentile of it."""
    kl: float
    """KL(engine ‖ policy), by the estimator e^d − 1 − d with d = log p_policy − log p_engine (Schulman's k3)."""


def mismatch(engine_logprobs: Tensor, policy_logprobs: Tensor, mask: Tensor | None = None) -> Mismatch:
    """Compare log-probs of the same tokens under the same sampling.

    Args:
        engine_logprobs, policy_logprobs: [...] nats; the tokens should be samples of the engine for `kl` to be one.
        mask: [...] bool, True on the tokens that count; None counts all.

    Raises:
        ValueError: where no token counts.
    """
    d = (policy_logprobs.detach().float() - engine_logprobs.detach().float().to(policy_logprobs.device)).flatten()
    if mask is not None:
        d = d[mask.flatten().to(d.device)]
    if d.numel() == 0:
        raise UserError("there are no tokens to compare")
    size = d.abs()
    rank = max(1, round(0.99 * size.numel()))
    return Mismatch(
        mean=size.mean().item(),
        max=size.max().item(),
        p99=size.kthvalue(rank).values.item(),
        kl=(d.expm1() - d).mean().item(),
    )


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """The mismatch that rounding explains, in nats."""

    mean: float
    max: float

    @classmethod
    def of(cls, dtypes: Iterable[torch.dtype], level: float) -> "Tolerance":
        """What the dtypes of both sides allow.

        The rounding of a logit is relative to its size, and unlikely tokens have large ones: on SmolLM2-135M in
        bfloat16 the mean |Δ| of random tokens, whose mean |log p| is 15, is 0.8 eps times that, the largest 5 times.
        Four in the mean and 32 at most is where the benefit of the doubt ends.

        Args:
            dtypes: those that the two sides compute in.
            level: mean |log p| of the tokens compared, in nats.
        """
        rounding = max(torch.finfo(dtype).eps for dtype in dtypes) * max(level, 8.0)
        return cls(mean=max(2e-4, 4 * rounding), max=max(2e-3, 32 * rounding))

    def narrowed(self, measured: Mismatch, growth: float = 1.0) -> "Tolerance":
        """At most four times what was measured on weights known as equal; `growth` is that of the level since then."""
        return Tolerance(
            mean=min(self.mean, max(2e-4, 4 * growth * measured.mean)),
            max=min(self.max, max(2e-3, 4 * growth * measured.max)),
        )

    def exceeded_by(self, seen: Mismatch) -> bool:
        # Written so that a NaN on either side exceeds.
        return not (seen.mean <= self.mean and seen.max <= self.max)


def canary_sequences(vocab_size: int, *, length: int, count: int = 4) -> list[list[int]]:
    """`count` fixed sequences of `length` token ids each, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (count, length), generator=generator).tolist()


def check_canary(engine: Sequence[Tensor], policy: Sequence[Tensor]) -> Mismatch:
    """The mismatch over all tokens of the canary; shapes must agree."""
    for e, p in zip(engine, policy, strict=True):
        if e.shape != p.shape:
            raise WeightSyncError(f"the engine scored {tuple(e.shape)} tokens where the policy scored {tuple(p.shape)}")
    return mismatch(torch.cat([e.cpu() for e in engine]), torch.cat([p.cpu() for p in policy]))


_LANES = 2039


@dataclass(frozen=True)
class Fingerprint:
    """A tensor's dtype, shape and a weighted sum over its bits as 64-bit words, modulo 2^64.

    The words are summed in 2,039 lanes, word i in lane i mod 2,039, and the lanes with odd random weights: any one
    changed word changes the sum, and words that change places do where they change lanes. The number is prime,
    so that rows and slices of matrices don't fall onto each other's lanes. One pass at the speed of memory.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    sum: int

    @classmethod
    def of(cls, tensor: Tensor) -> "Fingerprint":
        bits = tensor.detach().reshape(-1).view(torch.uint8)
        whole = bits.numel() // 8 * 8
        # Slices of other tensors need not start on a word's boundary.
        start = bits[:whole] if bits.storage_offset() % 8 == 0 else bits[:whole].clone()
        words = start.view(torch.int64)
        even = words.numel() // _LANES * _LANES
        lanes = words[:even].view(-1, _LANES).sum(0)
        lanes[: words.numel() - even] += words[even:]
        rest = bits[whole:].sum(dtype=torch.int64)
        return cls(tensor.dtype, tuple(tensor.shape), ((lanes * _weights(tensor.device)).sum() + rest).item())


@cache
def _weights(device: torch.device) -> Tensor:
    """[lanes] odd: multiplying by one loses no bit."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(-(2**62), 2**62, (_LANES,), generator=generator) | 1).to(device)


def place_of(url: str, copy: int) -> str:
    """What errors call a copy of the model in a server."""
    return f"{url}, copy {copy}" if copy else url


@dataclass(frozen=True)
class Held:
    """What an engine holds of one tensor of the checkpoint."""

    name: str
    """The tensor's name in the checkpoint."""
    place: str
    """The engine's module that computes with it."""
    fingerprint: Fingerprint | None
    """None where the module still computes with an earlier one."""

    def to_json(self, *, at: str) -> dict[str, Any]:
        """`at` names the engine that holds it."""
        f = self.fingerprint
        bits = None if f is None else [str(f.dtype).removeprefix("torch."), list(f.shape), f.sum]
        return {"name": self.name, "place": f"{self.place} at {at}", "fingerprint": bits}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Held":
        bits = data["fingerprint"]
        if bits is not None:
            bits = Fingerprint(getattr(torch, bits[0]), tuple(bits[1]), bits[2])
        return cls(data["name"], data["place"], bits)


@dataclass
class WeightStream:
    """Weights on their way to an engine: casts them to its dtype, passes them on, remembers what went by.

    Vectors pass uncast, for an engine may keep some of them in float32; they are remembered as cast.
    """

    source: Iterable[tuple[str, Tensor]]
    dtype: torch.dtype | None = None
    fingerprints: dict[str, Fingerprint] = field(default_factory=dict)
    bytes: int = 0
    current: str | None = None

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.source:
            if name in self.fingerprints:
                raise WeightSyncError(f"{name} came twice in one stream of weights")
            self.current = name
            cast = tensor if self.dtype is None else tensor.to(self.dtype)
            self.fingerprints[name] = Fingerprint.of(cast)
            tensor = cast if tensor.ndim > 1 else tensor
            self.bytes += tensor.numel() * tensor.element_size()
            yield name, tensor
        self.current = None

    def check(self, held: Sequence[Held]) -> int:
        """Compare with what the engine says it holds; returns how many of the tensors could be compared.

        Raises:
            WeightSyncError: names what the engine holds stale or altered.
        """
        wrong, compared = [], set()
        for h in held:
            sent = self.fingerprints.get(h.name)
            if sent is None or (h.fingerprint is not None and h.fingerprint.dtype != sent.dtype):
                continue
            compared.add(h.name)
            if h.fingerprint is None:
                wrong.append(f"{h.name} (stale in {h.place})")
            elif h.fingerprint != sent:
                wrong.append(f"{h.name} (altered in {h.place})")
        if wrong:
            shown = ", ".join(wrong[:8]) + (f" and {len(wrong) - 8} more" if len(wrong) > 8 else "")
            raise WeightSyncError(f"the engine does not hold the weights it was sent: {shown}")
        return len(compared)

    def compare(self, earlier: dict[str, Fingerprint]) -> list[str]:
        """Names of the tensors that moved since the stream that left `earlier`.

        Raises:
            WeightSyncError: where a tensor is missing, new, or of another shape.
        """
        if missing := sorted(earlier.keys() - self.fingerprints.keys()):
            raise WeightSyncError(f"{len(missing)} tensors of the earlier syncs did not come: {', '.join(missing[:8])}")
        if new := sorted(self.fingerprints.keys() - earlier.keys()):
            raise WeightSyncError(f"{len(new)} tensors came that earlier syncs did not have: {', '.join(new[:8])}")
        moved = [name for name, f in self.fingerprints.items() if f != earlier[name]]
        for name in moved:
            if self.fingerprints[name].shape != earlier[name].shape:
                raise WeightSyncError(
                    f"{name} came with shape {self.fingerprints[name].shape}, earlier with {earlier[name].shape}"
                )
        return moved
