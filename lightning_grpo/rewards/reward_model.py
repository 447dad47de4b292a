"""A reward from a sequence classifier that was trained on human preferences."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_grpo.errors import UserError
from lightning_grpo.policy.checks import context_length
from lightning_grpo.policy.classifier import load_classifier
from lightning_grpo.policy.load import load_tokenizer
from lightning_grpo.policy.pretrained import Pretrained
from lightning_grpo.ranges import check_ranges
from lightning_grpo.rewards.base import Completion, Reward, completion_text

_SCORING = Lock()
"""Held while a model scores, since rewards of held-out prompts are computed in another thread than early ones."""


@dataclass(kw_only=True, eq=False)
class RewardModel(Reward):
    """The score of a sequence classifier, such as a reward model of human preferences (arXiv:2203.02155).

    Its range is that of the classifier, usually several units around 0. Prompts that are chat messages are rendered
    with the chat template of the reward model, and prompts that are texts are followed by the completion. Special
    tokens of the reward model that a completion spells out, such as ``<|im_end|>``, are broken up, so that a completion
    can't add messages. The model is neither trained nor part of checkpoints; each rank loads it.
    """

    model: str | Pretrained
    """The classifier: a local folder or a name on the Hugging Face Hub, or name, revision, trust_remote_code and
    kwargs."""
    label: int | str | None = None
    """Class whose probability is the reward, by index or name, of a classifier with several classes. Not needed for a
    reward model, which has a single output."""
    device: str | None = None
    """Device of the model, such as cuda:1. By default that of the policy."""
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Data type of the parameters."""
    offload: bool = False
    """Keep the model in the memory of the CPU while it is not used. Moving it takes time in every rollout."""
    max_batch_tokens: int = 16384
    """Maximum number of tokens per forward pass, with padding. Lower it if memory runs out. A longer text is scored
    alone."""
    truncate: bool = False
    """Remove the beginning of texts that are longer than the model supports, and log their share as ``NAME/truncated``.
    By default they are an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, {"max_batch_tokens": "[1, inf)"}, prefix="RewardModel.")
        self._source = Pretrained.of(self.model)
        try:
            torch.device(self.device or "cpu")
        except RuntimeError as error:
            raise UserError(f"RewardModel.device is {self.device!r}: {error}; set cpu or cuda:0") from error

    def check(self, columns: Sequence[Mapping[str, Any]]) -> None:
        """Load the model, which raises `UserError` if it is no reward model, and check its chat template."""
        if columns and self._loaded[1].chat_template:
            prompt = [{"role": "user", "content": "Is it?"}]
            if self._ids(prompt, "Yes", "") == self._ids(prompt, "No", ""):
                raise UserError(
                    f"the reward {self.name!r}: the chat template of {self._source.name} omits the completion; set a "
                    "reward model whose template renders messages of the assistant"
                )

    def bytes_on(self, device: torch.device) -> int:
        """The memory that the weights occupy on ``device``, that of the policy, between two calls."""
        place = torch.device("cpu" if self.offload else self.device or device)
        if (place.type, place.index or 0) != (device.type, device.index or 0):
            return 0
        return sum(p.nbytes for p in self._loaded[0].parameters())

    # ── Loading ───────────────────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def _loaded(self) -> tuple[Any, PreTrainedTokenizerBase]:
        """The classifier and its tokenizer."""
        try:
            tokenizer, classifier = load_tokenizer(self._source), load_classifier(self._source, dtype=self.dtype)
            self._require_label(classifier)
        except UserError as error:
            raise UserError(f"the reward {self.name!r}: {error}") from error
        return classifier, tokenizer

    def _require_label(self, classifier: Any) -> None:
        config = classifier.config
        labels = ", ".join(f"{index} {name!r}" for index, name in sorted(config.id2label.items()))
        if self.label is None:
            if config.num_labels != 1:
                raise UserError(
                    f"{self._source.name} has {config.num_labels} outputs instead of one; set label to one of {labels}"
                )
        elif self.label not in (*config.id2label, *config.id2label.values()):
            raise UserError(f"label is {self.label!r}, but the outputs of {self._source.name} are {labels}")

    # ── Scoring ───────────────────────────────────────────────────────────────────────────────────────────────────

    def __call__(
        self,
        *,
        prompts: list[Any],
        completions: list[Completion],
        openings: list[str],
        log_metric: Any,
        trainer_state: Any = None,
        **columns: Any,
    ) -> list[float]:
        ids = [self._ids(*each) for each in zip(prompts, completions, openings, strict=True)]
        ids = self._within_context(ids, log_metric)
        classifier = self._loaded[0]
        device = self.device or getattr(getattr(trainer_state, "strategy", None), "root_device", "cpu")
        scores = torch.empty(len(ids))
        with _SCORING:
            classifier.to(device)
            for rows in batches([len(row) for row in ids], self.max_batch_tokens):
                scores[rows] = self._scores([ids[row] for row in rows])
            if self.offload:
                classifier.to("cpu")
        return scores.tolist()

    def _ids(self, prompt: Any, completion: Completion, opening: str) -> list[int]:
        """The tokens of a prompt and its completion as the reward model expects them."""
        tokenizer = self._loaded[1]
        if isinstance(prompt, str):
            return tokenizer(prompt + self._broken_up(completion_text(completion)))["input_ids"]
        if not tokenizer.chat_template:
            raise UserError(
                f"the reward {self.name!r}: prompts are chat messages, but the tokenizer of {self._source.name} has no "
                "chat template; set a reward model that was trained on chats, or use prompts that are texts"
            )
        messages = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        answer = [message | {"content": self._broken_up(message["content"] or "")} for message in messages]
        answer[0]["content"] = opening + answer[0]["content"]
        if prompt[-1]["role"] == answer[0]["role"]:  # the completion continues the last message of the prompt
            answer[0]["content"] = prompt[-1]["content"] + answer[0]["content"]
            prompt = prompt[:-1]
        try:
            text = tokenizer.apply_chat_template([*prompt, *answer], tokenize=False)
        except Exception as error:  # templates can raise any exception
            raise UserError(
                f"the reward {self.name!r}: the chat template of {self._source.name} can't render a conversation with "
                f"the roles {', '.join(message['role'] for message in [*prompt, *answer])}: {error}"
            ) from error
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    @cached_property
    def _special(self) -> re.Pattern[str]:
        added = self._loaded[1].added_tokens_decoder.values()
        return re.compile("|".join(re.escape(token.content) for token in added if token.special) or r"(?!)")

    def _broken_up(self, text: str) -> str:
        """The text with a space within each special token."""
        return self._special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    def _within_context(self, ids: list[list[int]], log_metric: Any) -> list[list[int]]:
        """The texts, shortened if they exceed what the model supports and `truncate` is set."""
        classifier, tokenizer = self._loaded
        limits = context_length(classifier.config), tokenizer.model_max_length
        limit = min(limit for limit in limits if limit)
        longest = max(map(len, ids))
        if self.truncate:
            log_metric(f"{self.name}/truncated", sum(len(row) > limit for row in ids) / len(ids))
            # the first token may be one that every text begins with
            return [row if len(row) <= limit else row[:1] + row[1 - limit :] for row in ids]
        if longest > limit:
            raise UserError(
                f"the reward {self.name!r}: a prompt and its completion have {longest} tokens, but {self._source.name} "
                f"supports {limit}; lower max_prompt_length or max_completion_length, or set truncate to true, which "
                "removes the beginning"
            )
        return ids

    @torch.inference_mode()
    def _scores(self, ids: list[list[int]]) -> Tensor:
        """The reward of each text [n], in one forward pass."""
        classifier = self._loaded[0]
        config = classifier.config.get_text_config()
        pad = config.pad_token_id
        if pad is None:
            # The model scores the last token that is not padding, which therefore must not occur in the texts.
            used = {token for row in ids for token in row}
            pad = next(token for token in range(config.vocab_size) if token not in used)
        length = max(map(len, ids))
        tokens = torch.tensor([row + [pad] * (length - len(row)) for row in ids], device=classifier.device)
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids], device=classifier.device)
        before, config.pad_token_id = config.pad_token_id, pad
        try:
            with torch.autocast(classifier.device.type, enabled=False):
                logits = classifier(input_ids=tokens, attention_mask=mask).logits.float()
        finally:
            config.pad_token_id = before
        return self._of_label(logits).cpu()

    def _of_label(self, logits: Tensor) -> Tensor:
        """[n]: the score, or the probability of `label`, from the outputs [n, labels]."""
        config = self._loaded[0].config
        if config.num_labels == 1:
            return logits[:, 0]
        index = next(index for index, name in config.id2label.items() if self.label in (index, name))
        if config.problem_type == "regression":
            return logits[:, index]
        is_multiple = config.problem_type == "multi_label_classification"
        return (logits.sigmoid() if is_multiple else logits.softmax(1))[:, index]


def batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """The indices of texts, longest first, in batches of at most ``max_tokens`` tokens with padding."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > max_tokens:
            yield batch
            batch = []
        batch.append(index)
    yield batch
