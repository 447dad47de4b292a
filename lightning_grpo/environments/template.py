"""Token ids of what stands between two turns of the policy, rendered by the model's chat template."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_grpo.data.rows import Message
from lightning_grpo.data.template import ChatTemplate
from lightning_grpo.errors import UserError

PLACEHOLDER = "\U00100000"
"""A character for private use that stands for the text of a message while the template renders it."""
MARK = 0xF0000
"""``chr(MARK + i)``, also for private use, stands for the text of the i-th special token in an observation."""
QUESTION: Message = {"role": "user", "content": "a"}
THINK = "<think>\n"
QWEN3 = ("<|im_start|>", "<tool_response>", "</think>")
"""Parts of templates in the format of Qwen3. Those of Qwen3.5 contain them, too, but also ``<function=``."""
THOUGHTS, ANSWER = f"{THINK}b\n</think>\n\nc", "c"


class TurnTemplate:
    """Renders the messages that follow a completion, so that their token ids can be appended to it.

    What the policy sampled is never rendered or encoded again: the tokens of a conversation are those of its prompt and
    of its turns, with the ids from `after` between them. Special tokens that occur in the text of an observation are
    encoded as ordinary text, so that an observation can't end its message or begin another turn.

    Args:
        tokenizer: encodes the text.
        chat_template: the template and its variables.
    """

    def __init__(self, tokenizer: Any, chat_template: ChatTemplate) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template
        self._special = {i: str(token) for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._marks = {text: chr(MARK + i) for i, text in enumerate(self._special.values())}
        self._plain = {mark: text for text, mark in self._marks.items()}
        longest_first = sorted(self._marks, key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._checked: set[tuple[str, str]] = set()

    def start(
        self,
        where: str,
        messages: Sequence[Message],
        observation: str | Sequence[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        args: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Return the token ids of a prompt to which an observation is appended, up to the start of the first turn.

        Args:
            where: location of the row, for messages.
            messages: the row's prompt.
            observation: the messages to append to it, or the text to append to its last message.
            tools: JSON schemas of the tools.
            args: further variables for the template, from the row.

        Raises:
            UserError: as `ChatTemplate.render`.
        """
        marked = self._mark(observation) if isinstance(observation, str) else [*map(self._marked, observation)]
        messages = followed_by(messages, marked)
        return self._encode(self.chat_template.render(where, messages, tools=tools, args=dict(args or {})))

    def after(
        self, observation: Sequence[Message], *, last_token: int, args: Mapping[str, Any] | None = None
    ) -> list[int]:
        """Return the token ids from the end of a completion to the start of the next one.

        These are the rest of the assistant's message (without its end token if the policy sampled that), the
        observation, and the start of the next message of the assistant.

        Args:
            observation: the messages that follow the completion.
            last_token: the last token of the completion.
            args: further variables for the template, from the row.

        Raises:
            UserError: as `require_prefix_property`.
        """
        for role in dict.fromkeys(message["role"] for message in observation):
            self.require_prefix_property(role, args)
        turn = [QUESTION, {"role": "assistant", "content": PLACEHOLDER}]
        ids = self._encode_rest(self._render([*turn, *map(self._marked, observation)], args))
        if last_token in self._special:
            end = self._encode_rest(self._render(turn, args, generate=False))
            if last_token in end:
                return ids[end.index(last_token) + 1 :]
        return ids

    def require_prefix_property(self, role: str = "user", args: Mapping[str, Any] | None = None) -> None:
        """Check that the template only appends text if a conversation goes on.

        One that, for example, removes the thoughts of earlier turns would show the trained model other tokens than
        those that it was trained on.

        Args:
            role: of the messages that follow a completion.
            args: further variables for the template, from the row.

        Raises:
            UserError: the template rewrites earlier messages, or can't render messages of this role; it names the
                model, and what to set.
        """
        if (key := (role, repr(args))) in self._checked:
            return
        if self.chat_template.template is None and not self.tokenizer.chat_template:
            raise UserError(
                f"the tokenizer {self.tokenizer.name_or_path!r} has no chat template, which an environment needs; set "
                "data.chat_template to a template or its file, or use a model trained for chat"
            )
        observation = {"role": role, "content": PLACEHOLDER}
        start = self._render([QUESTION], args)
        for content in (THOUGHTS,) if start.endswith(THINK) else (ANSWER, THOUGHTS):
            sampled = content.removeprefix(THINK) if start.endswith(THINK) else content
            messages, text = [QUESTION], start
            for _ in range(2):
                messages += [{"role": "assistant", "content": content}, observation]
                text, before = self._render(messages, args), text
                if PLACEHOLDER not in text:
                    raise self._refusal(f"omits messages of the role {role!r}")
                if not text.startswith(before + sampled):
                    what = "removes thoughts from" if content is THOUGHTS else "changes"
                    raise self._refusal(
                        f"{what} earlier messages of the assistant when a message of the role {role!r} follows"
                    )
        self._checked.add(key)

    def _refusal(self, reason: str) -> UserError:
        source = self.chat_template.template or str(self.tokenizer.chat_template)
        is_qwen3 = all(part in source for part in QWEN3) and "<function=" not in source
        kept = "qwen3, a template that" if is_qwen3 else "a template that"
        return UserError(
            f"the chat template of {self.tokenizer.name_or_path!r} {reason}, so it can't be used with an environment; "
            f"set data.chat_template to {kept} keeps every message as it is"
        )

    def _render(self, messages: list[Message], args: Mapping[str, Any] | None, generate: bool = True) -> str:
        variables = self.chat_template.args | dict(args or {})
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.chat_template.template,
                add_generation_prompt=generate,
                tokenize=False,
                **variables,
            )
        except Exception as error:  # templates can raise any exception
            roles = ", ".join(message["role"] for message in messages)
            raise self._refusal(f"can't render messages of the roles {roles} ({error})") from error

    def _marked(self, message: Message) -> Message:
        return {key: self._mark(value) if isinstance(value, str) else value for key, value in message.items()}

    def _mark(self, text: str) -> str:
        """The text with marks in place of special tokens, and without lone surrogates, which can't be encoded."""
        return self._tokens.sub(lambda token: self._marks[token[0]], text.encode(errors="replace").decode())

    def _encode_rest(self, text: str) -> list[int]:
        return self._encode(text.partition(PLACEHOLDER)[2])

    def _encode(self, text: str) -> list[int]:
        """The token ids of a rendered text. Marks become the text of the token that they stand for."""
        ids: list[int] = []
        for part in re.split(f"([{''.join(self._marks.values())}])", text) if self._marks else [text]:
            token = self._plain.get(part)
            ids += self.tokenizer(token or part, add_special_tokens=False, split_special_tokens=bool(token))[
                "input_ids"
            ]
        return ids


def followed_by(messages: Sequence[Message], observation: str | Sequence[Message]) -> list[Message]:
    """The messages of a prompt with an observation after them: messages, or text at the end of the last one."""
    if not isinstance(observation, str):
        return [*messages, *observation]
    *others, last = messages
    return [*others, last | {"content": (last["content"] or "") + observation}]
