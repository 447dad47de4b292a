"""Assembles the page of a report from its sections, one style sheet and plotly's JavaScript."""

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from lightning_grpo.errors import UserError, optional
from lightning_grpo.record.reader import Run
from lightning_grpo.report import comparison, curves, findings, header, phases, plan, samples
from lightning_grpo.report.arms import run_names
from lightning_grpo.report.markup import escape

SECTIONS = (header, findings, comparison, curves, phases, plan)
"""Modules with a function ``render(runs) -> str``, in the order of the page; the samples follow. An empty string
leaves a section out."""


def page(runs: Sequence[Run], *, most_samples: int = samples.LIMIT, reload_seconds: float | None = None) -> str:
    """Return the HTML of a report of ``runs``.

    Args:
        runs: the runs, at least one.
        most_samples: largest number of samples in the page.
        reload_seconds: seconds after which the browser reloads the page; None if the report is final.

    Raises:
        UserError: if plotly is not installed.
    """
    optional("plotly", "report", "the report")
    from plotly.offline import get_plotlyjs

    title = escape(", ".join(run_names(runs)))
    reload = "" if reload_seconds is None else f' data-reload="{reload_seconds:g}"'
    body = "".join(section.render(runs) for section in SECTIONS) + samples.render(runs, most_samples)
    links = "".join(
        f'<a href="#{name}">{title}</a>' for name, title in re.findall(r'<section id="([^"]+)"><h2>([^<]+)</h2>', body)
    )
    return (
        f'<!doctype html>\n<html lang="en"{reload}><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{title}</title><style>{_assets(".css")}</style></head>'
        f"<body><nav>{links}</nav><main>{body}</main><script>{get_plotlyjs()}</script><script>{_assets('.js')}</script></body></html>\n"
    )


def write(runs: Sequence[Run], path: Path, **options: Any) -> None:
    """Write the `page` to ``path``, atomically: a browser that reloads it never sees half of one.

    Raises:
        UserError: if it can't be written there.
    """
    text = page(runs, **options)
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError(
            f"the report can't be written to {path} ({error.strerror}); set another file (--out)"
        ) from error


def _assets(suffix: str) -> str:
    """Return the package's style sheets or scripts: that of the page, followed by those of its sections."""
    own = [file for file in files(__package__).iterdir() if file.name.endswith(suffix)]
    return "\n".join(
        file.read_text() for file in sorted(own, key=lambda file: (file.name != f"page{suffix}", file.name))
    )
