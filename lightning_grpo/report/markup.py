"""Pieces of HTML. Whatever comes from a run (prompts, completions, names, options) passes through `escape`."""

import html
import json
import math
from collections.abc import Iterable, Sequence
from typing import Any


def escape(value: object) -> str:
    """Return ``value`` as text that can stand in an element or in a quoted attribute."""
    return html.escape(str(value))


def script_json(value: Any) -> str:
    """Return ``value`` as JSON that can stand in a ``<script>`` element. NaN and infinity become null."""
    text = json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def section(name: str, title: str, *parts: str) -> str:
    """Return a section of the page with the id ``name``; an empty string if no part has contents."""
    content = "".join(parts)
    return f'<section id="{name}"><h2>{escape(title)}</h2>{content}</section>' if content else ""


def details(summary: str, content: str, *, name: str = "") -> str:
    """Return ``content`` behind a line that opens it. ``name`` keeps it open when a live report is reloaded."""
    key = f' id="{escape(name)}"' if name else ""
    return f"<details{key}><summary>{escape(summary)}</summary>{content}</details>" if content else ""


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table of escaped cells. On a narrow screen it is scrolled, not the page."""
    cells = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    names = "".join(f"<th>{escape(name)}</th>" for name in head)
    return f'<div class="scroll"><table><thead><tr>{names}</tr></thead><tbody>{cells}</tbody></table></div>'


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with significant ``digits``, as ``1,234``, ``0.123`` or ``1.2e-05``; a dash for None and NaN."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        return f"{value:,.{decimals}f}"
    return f"{value:.{digits - 1}e}"


def duration(seconds: float) -> str:
    """Return seconds in words: ``45 s``, ``12 min``, ``3.5 h``."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
