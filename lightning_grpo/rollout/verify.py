"""Verification that an engine samples from the policy: fingerprints of tensors, and log-probs of fixed sequences."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lightning_grpo.errors import RunError, UserError


class WeightSyncError(RunError):
    """The engine does not compute with the policy's weights, so that nothing may be sampled from it."""


@dataclass(frozen=True, kw_only=True)
class Mismatch:
    """Differences between the engine's and the policy's log-probs of the same tokens, in nats."""

    mean: float
    """Mean |log p_policy − log p_engine|."""
    max: float
    """Largest |log p_policy − log p_engine|."""
    p99: float
    """The 99th percentile of |log p_policy − log p_engine|."""
    kl: float
    """KL(engine ‖ policy), by the estimator e^d − 1 − d with d = log p_policy − log p_engine (Schulman's k3)."""


def mismatch(engine_logprobs: Tensor, policy_logprobs: Tensor, mask: Tensor | None = None) -> Mismatch:
    """Compare log-probs of the same tokens under the same sampling.

    Args:
        engine_logprobs, policy_logprobs: [...] nats. `kl` estimates the divergence if the engine sampled the tokens.
        mask: [...] bool, True on the tokens to compare; None compares all.

    Raises:
        UserError: the mask selects no token.
    """
    difference = (
        policy_logprobs.detach().float() - engine_logprobs.detach().float().to(policy_logprobs.device)
    ).flatten()
    if mask is not None:
        difference = difference[mask.flatten().to(difference.device)]
    if difference.numel() == 0:
        raise UserError("there are no tokens to compare")
    distance = difference.abs()
    rank = max(1, round(0.99 * distance.numel()))
    return Mismatch(
        mean=distance.mean().item(),
        max=distance.max().item(),
        p99=distance.kthvalue(rank).values.item(),
        kl=(difference.expm1() - difference).mean().item(),
    )


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """The largest mismatch that rounding explains, in nats."""

    mean: float
    max: float

    @classmethod
    def of(cls, dtypes: Iterable[torch.dtype], level: float, rounding: float = 0.0) -> "Tolerance":
        """The tolerance that follows from the dtypes of both sides.

        The rounding error of a logit is proportional to its size, and unlikely tokens have large logits. On
        SmolLM2-135M in bfloat16 random tokens have a mean |log p| of 15; their mean |Δ| is 0.8 · eps times that, the
        largest |Δ| 5 · eps times. The tolerance is 4 · eps times in the mean and 32 · eps times at most.

        Args:
            dtypes: the dtypes that the two sides compute in.
            level: mean |log p| of the compared tokens, in nats.
            rounding: the relative error of weights that only one side has rounded further, to 4 bits.
        """
        error = max(rounding, *(torch.finfo(dtype).eps for dtype in dtypes)) * max(level, 8.0)
        return cls(mean=max(2e-4, 4 * error), max=max(2e-3, 32 * error))

    def narrowed(self, measured: Mismatch, growth: float = 1.0) -> "Tolerance":
        """A tolerance of at most four times the mismatch that equal weights gave, times the `growth` of the level since
        that measurement."""
        return Tolerance(
            mean=min(self.mean, max(2e-4, 4 * growth * measured.mean)),
            max=min(self.max, max(2e-3, 4 * growth * measured.max)),
        )

    def exceeded_by(self, mismatch: Mismatch) -> bool:
        # In this form a NaN exceeds the tolerance.
        return not (mismatch.mean <= self.mean and mismatch.max <= self.max)


def check_sequences(vocab_size: int, *, length: int, count: int = 4) -> list[list[int]]:
    """`count` fixed sequences of `length` token ids each, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (count, length), generator=generator).tolist()


def compare_logprobs(engine: Sequence[Tensor], policy: Sequence[Tensor]) -> Mismatch:
    """The mismatch over all tokens of the check sequences.

    Raises:
        WeightSyncError: the two sides scored different numbers of tokens.
    """
    for e, p in zip(engine, policy, strict=True):
        if e.shape != p.shape:
            raise WeightSyncError(f"the engine scored {len(e)} tokens, the policy scored {len(p)}")
    return mismatch(torch.cat([e.cpu() for e in engine]), torch.cat([p.cpu() for p in policy]))


_LANES = 2039


@dataclass(frozen=True)
class Fingerprint:
    """A tensor's dtype, shape and a weighted sum over its bits as 64-bit words, modulo 2^64.

    Word i is added to lane i mod 2,039, and the lanes are added with odd random weights. A change of a single word
    always changes the sum, and so does an exchange of words between lanes. The number of lanes is prime, so that rows
    and slices of a matrix do not coincide in their lanes. The sum takes one pass at memory bandwidth.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    sum: int

    @classmethod
    def of(cls, tensor: Tensor) -> "Fingerprint":
        bits = tensor.detach().reshape(-1).view(torch.uint8)
        whole = bits.numel() // 8 * 8
        # A slice of another tensor may start inside a word.
        start = bits[:whole] if bits.storage_offset() % 8 == 0 else bits[:whole].clone()
        words = start.view(torch.int64)
        even = words.numel() // _LANES * _LANES
        lanes = words[:even].view(-1, _LANES).sum(0)
        lanes[: words.numel() - even] += words[even:]
        rest = bits[whole:].sum(dtype=torch.int64)
        return cls(tensor.dtype, tuple(tensor.shape), int((lanes * _weights(tensor.device)).sum() + rest))


@cache
def _weights(device: torch.device) -> Tensor:
    """[lanes] odd weights: multiplication by an odd number loses no bit."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(-(2**62), 2**62, (_LANES,), generator=generator) | 1).to(device)


def place_of(url: str, copy: int) -> str:
    """The name in errors of one copy of the model in a server."""
    return f"{url}, copy {copy}" if copy else url


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the checkpoint as an engine stores it."""

    name: str
    """The tensor's name in the checkpoint."""
    place: str
    """The engine's module that computes with it."""
    fingerprint: Fingerprint | None
    """None if the module still computes with an earlier tensor."""

    def to_json(self, *, at: str) -> dict[str, Any]:
        """`at` names the engine that stores the tensor."""
        f = self.fingerprint
        bits = None if f is None else [str(f.dtype).removeprefix("torch."), list(f.shape), f.sum]
        return {"name": self.name, "place": f"{self.place} at {at}", "fingerprint": bits}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "StoredTensor":
        bits = data["fingerprint"]
        if bits is not None:
            bits = Fingerprint(getattr(torch, bits[0]), tuple(bits[1]), bits[2])
        return cls(data["name"], data["place"], bits)


@dataclass
class WeightStream:
    """Weights on their way to an engine: casts each tensor to its dtype and records its fingerprint.

    Vectors are passed on without a cast, because an engine may store some of them in float32; their fingerprints are
    those of the cast vectors.
    """

    source: Iterable[tuple[str, Tensor]]
    dtype: torch.dtype | None = None
    fingerprints: dict[str, Fingerprint] = field(default_factory=dict)
    bytes: int = 0
    current: str | None = None

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.source:
            if name in self.fingerprints:
                raise WeightSyncError(f"{name} occurs twice in one stream of weights")
            self.current = name
            cast = tensor if self.dtype is None else tensor.to(self.dtype)
            self.fingerprints[name] = Fingerprint.of(cast)
            tensor = cast if tensor.ndim > 1 else tensor
            self.bytes += tensor.numel() * tensor.element_size()
            yield name, tensor
        self.current = None

    def check(self, stored: Sequence[StoredTensor]) -> int:
        """Compare the engine's tensors with those that were sent; returns how many could be compared.

        Raises:
            WeightSyncError: a tensor is stale (it was not replaced) or altered; the message names it.
        """
        wrong, compared = [], set()
        for tensor in stored:
            sent = self.fingerprints.get(tensor.name)
            if sent is None or (tensor.fingerprint is not None and tensor.fingerprint.dtype != sent.dtype):
                continue
            compared.add(tensor.name)
            if tensor.fingerprint is None:
                wrong.append(f"{tensor.name} (stale in {tensor.place})")
            elif tensor.fingerprint != sent:
                wrong.append(f"{tensor.name} (altered in {tensor.place})")
        if wrong:
            shown = ", ".join(wrong[:8]) + (f" and {len(wrong) - 8} more" if len(wrong) > 8 else "")
            raise WeightSyncError(f"the engine does not have the weights that were sent to it: {shown}")
        return len(compared)

    def compare(self, earlier: dict[str, Fingerprint]) -> list[str]:
        """Names of the tensors that changed since an earlier stream, given its fingerprints.

        Raises:
            WeightSyncError: a tensor is missing, new, or has another shape.
        """
        if missing := sorted(earlier.keys() - self.fingerprints.keys()):
            raise WeightSyncError(f"{len(missing)} tensors of earlier syncs are missing: {', '.join(missing[:8])}")
        if new := sorted(self.fingerprints.keys() - earlier.keys()):
            raise WeightSyncError(f"{len(new)} tensors are new since earlier syncs: {', '.join(new[:8])}")
        moved = [name for name, f in self.fingerprints.items() if f != earlier[name]]
        for name in moved:
            if self.fingerprints[name].shape != earlier[name].shape:
                raise WeightSyncError(
                    f"{name} has shape {self.fingerprints[name].shape}, in earlier syncs {earlier[name].shape}"
                )
        return moved
