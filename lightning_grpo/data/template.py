"""Rendering of chat messages by a model's chat template."""

from pathlib import Path
from typing import Any

from lightning_grpo.data.rows import Message
from lightning_grpo.errors import UserError

TEMPLATES = Path(__file__).parent / "templates"
"""Templates by name. They keep every message as it is, as environments require."""


def read_template(template: str) -> str:
    """Return a Jinja template.

    Args:
        template: the template itself, a file that contains one, or ``qwen3``, which has the format of Qwen3.

    Raises:
        UserError: it is none of these.
    """
    if "{" in template:
        return template
    file = TEMPLATES / f"{template}.jinja"
    if not file.is_file():
        file = Path(template)
    if not file.is_file():
        names = ", ".join(sorted(path.stem for path in TEMPLATES.iterdir()))
        raise UserError(
            f"data.chat_template is {template!r}, which is neither a file nor a Jinja template; set one of these, or a "
            f"name ({names})"
        )
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.chat_template is {template!r}, which can't be read: {error}") from error


class ChatTemplate:
    """Renders chat messages, and reports what the template omits or rejects.

    Args:
        tokenizer: provides the template unless another is given.
        template: as for `read_template`.
        args: variables for the template.
    """

    def __init__(self, tokenizer: Any, template: str | None = None, args: dict[str, Any] | None = None) -> None:
        self.tokenizer = tokenizer
        self.template = None if template is None else read_template(template)
        self.args = args or {}
        self.omissions: dict[str, str] = {}
        """What the template omitted or changed: subject → message about the first row."""

    def render(
        self, where: str, messages: list[Message], *, tools: list[dict[str, Any]] | None, args: dict[str, Any]
    ) -> str:
        """Return the text of a prompt.

        It ends with the start of the assistant's turn; or, if the last message is the assistant's, with exactly the
        text of that message, so that the completion continues it.

        Args:
            where: location of the row, for messages.
            messages: the prompt.
            tools: JSON schemas of the tools that can be called.
            args: further variables for the template, from this row.

        Raises:
            UserError: there is no template, it rejects the messages, or it omits tool calls or changes the message that
                the completion continues.
        """
        if self.template is None and not getattr(self.tokenizer, "chat_template", None):
            raise UserError(
                f"{where}: the prompt is a list of messages, but the tokenizer {self.tokenizer.name_or_path!r} has no "
                "chat template; set data.chat_template to a template or its file, or use a model trained for chat"
            )
        try:
            text = self._apply(messages, tools, args)
        except Exception as error:  # templates can raise any exception
            raise UserError(f"{where}: {self._why(error, messages, tools, args)}") from error
        self._check_omissions(where, text, messages, tools, args)
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
            # Beside tool calls, some templates expect the content None, others an empty text.
            text = apply([message | {"content": message["content"] or ""} for message in messages])
        if not open_ended:
            return text
        beginning = messages[-1]["content"]
        if not text.rstrip().endswith(beginning.strip()):
            raise ValueError("it changes the assistant's last message, so that a completion can't continue it")
        # Some templates strip messages, but the completion has to continue after "<think>\n", not after "<think>".
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
                    f"the chat template accepts no system message ({reason}); remove it, move its text to the user "
                    "message, or set data.chat_template to another template"
                )
        return f"the chat template can't render this prompt ({reason}); correct the row, or set data.chat_template"

    def _check_omissions(
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
                        f"{where}: the chat template omits the assistant's tool calls (such as that of {name}); set "
                        "data.chat_template to one that renders them, or use a model trained with tools"
                    )
            content = message["content"] or ""
            if message["role"] in ("system", "user", "tool") and content.strip() not in text:
                self.omissions.setdefault(
                    f"messages of role {message['role']}",
                    f"{where}: the chat template omits or changes a message with the role {message['role']!r}",
                )
        names = [str(tool.get("function", tool).get("name")) for tool in tools or ()]
        if any(name not in text for name in names):
            self.omissions.setdefault("tools", f"{where}: the chat template omits the tools ({', '.join(names)})")
        source = self.template or str(self.tokenizer.chat_template)
        for name in self.args | args:
            if name not in source:
                self.omissions.setdefault(
                    name, f"{where}: the chat template has no variable {name!r}, so setting it has no effect"
                )
