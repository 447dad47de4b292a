"""Data that passes between an engine and the algorithm: sampling options, requests, completions, rollouts.

Shapes: B prompts, G generations, N = B·G completions (row i·G + g is sample g of prompt i), P prompt length, T
completion length.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self, cast

import torch
from torch import Tensor

from lightning_grpo.errors import UserError
from lightning_grpo.ranges import check_ranges

FinishReason = Literal["stop", "length", "abort"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling options."""

    temperature: float = 1.0
    """Temperature that divides the logits before sampling. The trainer computes log-probs at the same temperature. 0 is
    greedy and allowed only in validation_sampling."""
    top_p: float = 1.0
    """Sample from the smallest set of tokens with at least this total probability. 1 disables it. Must be 1 in
    training."""
    top_k: int = 0
    """Sample from this many most likely tokens. 0 disables it. Must be 0 in training."""
    min_p: float = 0.0
    """Sample from tokens whose probability is at least this fraction of the most likely token's. 0 disables it. Must be
    0 in training."""
    repetition_penalty: float = 1.0
    """Lower the logits of tokens that have already occurred: positive logits are divided by it, negative ones
    multiplied. 1 disables it. Must be 1 in training."""
    stop: list[str] = field(default_factory=list)
    """Strings that end a completion, in addition to the end-of-sequence token."""
    cutoff: float = 1.0
    """Fraction of the completions sampled together to wait for. Once they have ended and all others have begun, the
    others are cut off and count as truncated. Set it below 1 if a few long completions delay each rollout."""

    def __post_init__(self) -> None:
        ranges = {
            "temperature": "[0, inf)",
            "top_p": "(0, 1]",
            "top_k": "[0, inf)",
            "min_p": "[0, 1]",
            "repetition_penalty": "(0, inf)",
            "cutoff": "(0, 1]",
        }
        check_ranges(self, ranges, prefix="sampling.")

    def spare(self, count: int) -> int:
        """How many of ``count`` completions sampled together may be cut off, by `cutoff`."""
        return count - math.ceil(self.cutoff * count)

    @property
    def truncations(self) -> dict[str, float]:
        """The enabled options that make the sampled distribution differ from softmax(logits / temperature)."""
        off = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
        return {name: value for name, neutral in off.items() if (value := getattr(self, name)) != neutral}


@dataclass(kw_only=True)
class Completion:
    """One completion sampled by an engine.

    ``token_ids`` include the end-of-sequence token if one was sampled. ``logprobs`` has one value per token, from the
    sampled distribution (after temperature and truncation). ``versions`` has the policy version that sampled each
    token; they differ within a completion if weights were updated meanwhile. ``finish_reason`` is "abort" if
    `Sampling.cutoff` or the engine ended it.

    A completion over several turns has further tokens between those that the policy sampled. The last token is always
    a sampled one.
    """

    token_ids: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    versions: list[int]
    mask: list[bool] | None = None
    """Which tokens the policy sampled; None: all. ``logprobs`` and ``versions`` of the others are 0."""
    turn_rewards: list[tuple[int, float]] | None = None
    """The environment's reward of each turn, with the index of the turn's last sampled token."""
    messages: list[dict[str, Any]] | None = None
    """The conversation after the prompt, if there may be several turns."""


OnGroup = Callable[[int, list[Completion]], None]
"""Called with a prompt's index and its completions as soon as the last of them has finished."""


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """The completions to sample: ``len(seeds[i])`` of ``prompts[i]``, one per seed.

    Raises:
        UserError: prompts and seeds differ in number.
    """

    prompts: Sequence[Sequence[int]]
    """B prompts as token ids."""
    seeds: Sequence[Sequence[int]]
    """For each prompt, one seed per completion."""
    max_tokens: int
    """The largest number of tokens in a completion."""
    sampling: Sampling = Sampling()

    def __post_init__(self) -> None:
        if len(self.prompts) != len(self.seeds):
            raise UserError(
                f"{len(self.prompts)} prompts, but seeds for {len(self.seeds)}; pass the seeds of each prompt"
            )

    @property
    def count(self) -> int:
        """The number of completions."""
        return sum(map(len, self.seeds))

    @property
    def spare(self) -> int:
        """How many of the completions may be cut off, by `Sampling.cutoff`."""
        return self.sampling.spare(self.count)


@dataclass(frozen=True, kw_only=True)
class Turn:
    """The next completion of a conversation."""

    key: int
    """The conversation; a later turn with the same key continues it."""
    token_ids: Sequence[int]
    """All tokens so far: the prompt, and sampled tokens and observations of earlier turns."""
    seed: int
    max_tokens: int
    """The largest number of tokens in the completion."""


def extents(mask: Tensor) -> Tensor:
    """[N] int64: the number of columns of ``mask`` [N, T] up to the last True of each row; 0 without a True."""
    places = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (mask * places).amax(1) if mask.shape[1] else mask.sum(1)


def _pad(x: Tensor, width: int, side: Literal["left", "right"]) -> Tensor:
    """Extend dimension 1 of ``x`` [N, old width, …] to ``width`` with zeros on ``side``."""
    zeros = x.new_zeros(len(x), width - x.shape[1], *x.shape[2:])
    return torch.cat([zeros, x] if side == "left" else [x, zeros], dim=1)


PROMPT_TOKENS = {"padding": "left"}
"""Field metadata of a column [N, P, …] with one value per prompt token."""
COMPLETION_TOKENS = {"padding": "right"}
"""Field metadata of a column [N, T, …] with one value per completion token. A tensor [N] is allowed in its place."""


@dataclass(kw_only=True)
class Rollout:
    """N completions with the data that the update needs, padded to rectangular tensors.

    A field that holds a tensor or a list has one entry per completion in dimension 0. A field with one value per token
    in dimension 1 declares this by its metadata, so that `rows` and `join` cut and pad it, in subclasses too:

    .. code-block:: python

        @dataclass(kw_only=True)
        class Distilled(Experience):
            teacher_logprobs: Tensor = field(metadata=COMPLETION_TOKENS)

    ==================  =========  ==================================================================
    prompt_ids          [N, P]     int64, left-padded
    prompt_mask         [N, P]     bool, True on real tokens
    completion_ids      [N, T]     int64, right-padded
    completion_mask     [N, T]     bool, True on tokens that the policy sampled, including the end-of-sequence token.
                                   False before the last of them: context that the policy did not sample, such as
                                   tool output. False after it: padding
    rollout_logprobs    [N, T]     float32, reported by the engine; 0 if completion_mask is False
    truncated           [N]        bool, True if the completion was cut off at the length limit or by a cutoff
    versions            [N, T]     int64, policy version that sampled the token; 0 if completion_mask is False
    early_rewards       [N, R]     float32, of the R rewards that are computed during sampling; None if there are none
    grad_norms          [N, T]     float32, squared norm of ∂log-prob/∂logits under the policy, NaN if completion_mask
                                   is False; None unless `AdvantageConfig.needs_grad_norms`
    sources             [N]        list of `Prompt.source`; None in a checkpoint of an earlier version
    seeds               [N]        list of the seeds with which the completions were sampled; None if unknown
    extras              [N]        list of {name: value} that rewards logged with ``log_extra``; None if unknown
    turn_rewards        [N, T]     float32, the environment's reward of each turn at the last token that the policy
                                   sampled in it, 0 elsewhere; None without an environment
    prompts             [N]        list of the messages of each prompt, with those that the environment appended; None
                                   without an environment
    conversations       [N]        list of the messages of each completion: those of the assistant, and in between those
                                   of tools or the user; None without an environment
    reward_metrics      –          {name: values} that rewards logged with ``log_metric``, until they are in the metrics
    ==================  =========  ==================================================================
    """

    prompt_ids: Tensor = field(metadata=PROMPT_TOKENS)
    prompt_mask: Tensor = field(metadata=PROMPT_TOKENS)
    completion_ids: Tensor = field(metadata=COMPLETION_TOKENS)
    completion_mask: Tensor = field(metadata=COMPLETION_TOKENS)
    rollout_logprobs: Tensor = field(metadata=COMPLETION_TOKENS)
    truncated: Tensor
    versions: Tensor = field(metadata=COMPLETION_TOKENS)
    early_rewards: Tensor | None = None
    grad_norms: Tensor | None = field(default=None, metadata=COMPLETION_TOKENS)
    sources: list[str] | None = None
    seeds: list[int] | None = None
    extras: list[dict[str, Any]] | None = None
    turn_rewards: Tensor | None = field(default=None, metadata=COMPLETION_TOKENS)
    prompts: list[list[dict[str, Any]]] | None = None
    conversations: list[list[dict[str, Any]]] | None = None
    reward_metrics: dict[str, list[float]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def written_ids(self) -> list[list[int]]:
        """For each completion, the token ids that the policy wrote."""
        return [ids[mask].tolist() for ids, mask in zip(self.completion_ids, self.completion_mask, strict=True)]

    def rewards_of_turns(self) -> list[list[float]] | None:
        """For each completion, the environment's reward of each of its turns; None without an environment."""
        if self.turn_rewards is None:
            return None
        is_last = self.completion_mask.clone()
        is_last[:, :-1] &= ~self.completion_mask[:, 1:]
        return [values[ends].tolist() for values, ends in zip(self.turn_rewards, is_last, strict=True)]

    def keep_logs(self, extras: Sequence[Mapping[str, Any]], *metrics: Mapping[str, Sequence[float]]) -> None:
        """Add to ``extras`` [N] and ``reward_metrics``."""
        self.extras = [{**earlier, **row} for earlier, row in zip(self.extras or [{}] * len(self), extras, strict=True)]
        for logged in metrics:
            for name, values in logged.items():
                self.reward_metrics.setdefault(name, []).extend(values)

    def rows(self, index: Sequence[int], device: torch.device | str | None = None) -> Self:
        """Return the rows ``index`` on ``device``, without the positions that are padding in all of them."""
        columns = {name: x[list(index)] for name, x in self._tensors().items()}
        P = int(extents(columns["prompt_mask"].flip(1)).max())
        T = max(1, int(extents(columns["completion_mask"]).max()))
        kept = {"left": slice(self.prompt_mask.shape[1] - P, None), "right": slice(T)}
        for name, side in self._padding_sides().items():
            if name in columns and columns[name].dim() > 1:
                columns[name] = columns[name][:, kept[side]]
        taken: dict[str, Any] = {name: x.to(device) for name, x in columns.items()}
        taken |= {name: [x[i] for i in index] for name, x in self._lists().items()}
        return replace(self, **taken)

    def join(self, *others: Self) -> Self:
        """Return the rows of this rollout and then those of ``others``, padded to a common width.

        New positions are zero. Fields that belong to the whole rollout rather than to a row are taken from this one.
        """
        sides = self._padding_sides()
        columns: dict[str, Any] = {
            name: [entry for rollout in (self, *others) for entry in getattr(rollout, name)] for name in self._lists()
        }
        for name in self._tensors():
            parts = [getattr(rollout, name) for rollout in (self, *others)]
            if name in sides and parts[0].dim() > 1:
                width = max(part.shape[1] for part in parts)
                parts = [_pad(part, width, sides[name]) for part in parts]
            columns[name] = torch.cat(parts)
        return replace(self, **columns)

    def _tensors(self) -> dict[str, Tensor]:
        return {f.name: x for f in fields(self) if isinstance(x := getattr(self, f.name), Tensor)}

    def _lists(self) -> dict[str, list]:
        return {f.name: x for f in fields(self) if isinstance(x := getattr(self, f.name), list)}

    @classmethod
    def _padding_sides(cls) -> dict[str, Literal["left", "right"]]:
        return {f.name: f.metadata["padding"] for f in fields(cls) if "padding" in f.metadata}

    @classmethod
    def collate(
        cls, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[Completion]], pad_id: int
    ) -> "Rollout":
        """Pad B prompts and their completions into one rollout of N rows."""
        rows = [(prompt, c) for prompt, group in zip(prompts, completions, strict=True) for c in group]
        P = max(len(prompt) for prompt, _ in rows)
        T = max(1, max(len(c.token_ids) for _, c in rows))
        N = len(rows)
        out = cls(
            prompt_ids=torch.full((N, P), pad_id),
            prompt_mask=torch.zeros(N, P, dtype=torch.bool),
            completion_ids=torch.full((N, T), pad_id),
            completion_mask=torch.zeros(N, T, dtype=torch.bool),
            rollout_logprobs=torch.zeros(N, T, dtype=torch.float32),
            truncated=torch.tensor([c.finish_reason != "stop" for _, c in rows]),
            versions=torch.zeros(N, T, dtype=torch.long),
        )
        if any(c.turn_rewards is not None for _, c in rows):
            out.turn_rewards = torch.zeros(N, T, dtype=torch.float32)
        if any(c.messages is not None for _, c in rows):
            out.conversations = [c.messages or [] for _, c in rows]
        for n, (prompt, c) in enumerate(rows):
            p, t = len(prompt), len(c.token_ids)
            mask = [True] * t if c.mask is None else c.mask
            for what, values in (("log-probs", c.logprobs), ("versions", c.versions), ("mask values", mask)):
                if len(values) != t:
                    raise UserError(f"the engine returned {len(values)} {what} for a completion of {t} tokens")
            out.prompt_ids[n, P - p :] = torch.tensor(list(prompt))
            out.prompt_mask[n, P - p :] = True
            out.completion_ids[n, :t] = torch.tensor(c.token_ids, dtype=torch.long)
            out.completion_mask[n, :t] = torch.tensor(mask)
            for place, reward in c.turn_rewards or ():
                cast(Tensor, out.turn_rewards)[n, place] = reward
            out.rollout_logprobs[n, :t] = torch.tensor(c.logprobs, dtype=torch.float32)
            out.versions[n, :t] = torch.tensor(c.versions, dtype=torch.long)
        return out
