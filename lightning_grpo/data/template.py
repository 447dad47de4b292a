"""Chat messages as the text that a model's chat template makes of them."""

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only

from lightning_grpo.data.rows import Message
from lightning_grpo.errors import UserError

warn = rank_zero_only(logging.getLogger(__name__).warning)


class ChatTemplate:
    """Renders chat messages, and says what the template leaves out or refuses.

    Args:
        tokenizer: whose template is used, if no other is given.
        template: a Jinja template, or a file that holds one.
        args: variables for the template.
    """

    def __init__(self, tokenizer: Any, template: str | None = None, args: dict[str, Any] | None = None) -> None:
        if template is not None and "{" not in template:
            if not Path(template).is_file():
                raise UserError(f"data.chat_template is {template!r}, neither a file nor a Jinja template")
            try:
                template = Path(template).read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"data.chat_template is {template!r}, which can't be read: {error}") from error
        self.tokenizer = tokenizer
        self.template = template
        self.args = args or {}
        self._said: set[str] = set()

    def render(
        self, where: str, messages: list[Message], *, tools: list[dict[str, Any]] | None, args: dict[str, Any]
    ) -> str:
        """The text of a prompt: with the opening of the assistant's turn added, or with the assistant's last message
        left open, to the character, if the messages end in one.

        Args:
            where: the row's place, for messages.
            messages: the prompt.
            tools: JSON schemas of what may be called.
            args: further variables for the template, of this row.

        Raises:
            UserError: there is no template, it refuses the messages, or it leaves out or changes what the completion
                is to go on from.
        """
        if self.template is None and not getattr(self.tokenizer, "chat_template", None):
            raise UserError(
                f"{where}: the prompt is a list of messages, and the tokenizer {self.tokenizer.name_or_path!r} has no "
                "chat template; set data.chat_template to one (a file or its text), or use a model trained for chat"
            )
        try:
            text = self._apply(messages, tools, args)
        except Exception as error:  # whatever a template raises is about the template and this row
            raise UserError(f"{where}: {self._why(error, messages, tools, args)}") from error
        self._say_what_is_left_out(where, text, messages, tools, args)
        return text

    def _apply(self, messages: list[Message], tools: list[dict[str, Any]] | None, args: dict[str, Any]) -> str:
        open_ended = messages[-1]["role"] == "assistant"

        def apply(messages: list[Message]) -> str:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self.template,
                add_generation_prompt=not open_ended,
                continue_final_message=open_ended,
                tokenize=False,
                **self.args | args,
            )

        try:
            text = apply(messages)
        except TypeError:
            if all(message["content"] is not None for message in messages):
                raise
            # beside tool calls, templates test for none, or for an empty text
            text = apply([message | {"content": message["content"] or ""} for message in messages])
        if not open_ended:
            return text
        beginning = messages[-1]["content"]
        if not text.rstrip().endswith(beginning.strip()):
            raise ValueError("it changes the assistant's last message, so that a completion can't go on from it")
        # some trim messages, but a completion goes on after "<think>\n", not after "<think>"
        return text.rstrip() + beginning[len(beginning.rstrip()) :] if beginning.strip() else text

    def _why(
        self, error: Exception, messages: list[Message], tools: list[dict[str, Any]] | None, args: dict[str, Any]
    ) -> str:
        reason = " ".join(f"{type(error).__name__}: {error}".split("Final message to continue")[0].split())
        others = [message for message in messages if message["role"] != "system"]
        if 0 < len(others) < len(messages):
            try:
                self._apply(others, tools, args)
            except Exception:
                pass
            else:
                return (
                    f"the chat template takes no system message ({reason}); leave it out or put its text into the "
                    "user's message, or set data.chat_template to another"
                )
        return f"the chat template can't render this prompt ({reason}); mend the row, or set data.chat_template"

    def _say_what_is_left_out(
        self,
        where: str,
        text: str,
        messages: list[Message],
        tools: list[dict[str, Any]] | None,
        args: dict[str, Any],
    ) -> None:
        for message in messages:
            for call in message.get("tool_calls", ()):
                name = call.get("function", call)["name"]
                if name not in text:
                    raise UserError(
                        f"{where}: the chat template leaves out the assistant's tool calls (that of {name}); set "
                        "data.chat_template to one that renders them, or use a model trained with tools"
                    )
            content = message["content"] or ""
            if message["role"] in ("system", "user", "tool") and content.strip() not in text:
                self._warn_once(
                    f"messages of role {message['role']}",
                    f"{where}: the chat template leaves out or changes a message of the role {message['role']!r}",
                )
        names = [str(tool.get("function", tool).get("name")) for tool in tools or ()]
        if any(name not in text for name in names):
            self._warn_once("tools", f"{where}: the chat template leaves out the row's tools ({', '.join(names)})")
        source = self.template or str(self.tokenizer.chat_template)
        for name in self.args | args:
            if name not in source:
                self._warn_once(name, f"{where}: the chat template has no variable {name!r}; setting it does nothing")

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._said:
            self._said.add(what)
            warn(message)
