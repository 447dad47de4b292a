"""YAML with comments above some options."""

import math
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import yaml


class Commented(dict[str, Any]):
    """A mapping of options with a comment above some of them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.comments: dict[str, str] = {}


def lines(node: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """The lines of YAML for ``node``."""
    for key, value in node.items():
        if isinstance(node, Commented) and key in node.comments:
            yield from comment(node.comments[key], indent)
        if isinstance(value, Mapping) and value:
            yield f"{indent}{key}:"
            yield from lines(value, f"{indent}  ")
        elif isinstance(value, list) and value and isinstance(value[0], Mapping):
            yield f"{indent}{key}:"
            for item in value:
                first, *others = lines(item, f"{indent}    ")
                yield from (f"{indent}  - {first.strip()}", *others)
        else:
            value = {} if value == {} else value
            text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
            yield f"{indent}{key}: {text.strip().removesuffix('...').strip()}"


def comment(text: str, indent: str = "") -> list[str]:
    """The lines of a comment."""
    return textwrap.wrap(
        text, 108, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}#   ", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
