"""Charts for plotly's JavaScript. Colors are names of the style sheet's properties, such as ``--series-0/0.2`` for a
color with an opacity, so that a chart follows the light or dark theme; `page.js` resolves them and adds what all charts
share."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_grpo.report.markup import escape, script_json
from lightning_grpo.report.series import Array, Curve, smooth

COLORS = 8
"""Number of ``--series-…`` colors."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
Trace = dict[str, Any]


def chart(
    title: str, traces: Sequence[Trace], *, unit: str = "", note: str = "", height: int = 220, **layout: Any
) -> str:
    """Return a figure that the page draws when it comes into view.

    Args:
        title: what the chart shows; plain text.
        traces: plotly's traces.
        unit: unit of the vertical axis, or what is shown there.
        note: a sentence for readers who do not know the metric.
        height: height in pixels.
        layout: additions to plotly's layout.
    """
    data = script_json({"data": list(traces), "layout": layout})
    caption = f"<b>{escape(title)}</b>" + (f' <span class="unit">{escape(unit)}</span>' if unit else "")
    text = f"<p>{escape(note)}</p>" if note else ""
    return (
        f'<figure class="chart" style="--height:{height}px"><figcaption>{caption}{text}</figcaption>'
        f'<div class="plot" role="img" aria-label="{escape(describe(title, unit, traces))}"></div>'
        f'<script type="application/json">{data}</script></figure>'
    )


def describe(title: str, unit: str, traces: Sequence[Trace]) -> str:
    """Return the content of a chart as text, for readers who can't see it."""
    sentences = [_sentence(trace) for trace in traces if trace.get("hoverinfo") != "skip"]
    return f"{title}{f' ({unit})' if unit else ''}. " + " ".join(sentences)


def _sentence(trace: Trace) -> str:
    x, y = trace["x"], trace["y"]
    subject = f"{trace['name']}: " if trace.get("name") else ""
    if isinstance(x[0], str) or isinstance(y[0], str):
        labels, values = (x, y) if isinstance(x[0], str) else (y, x)
        return subject + ", ".join(f"{label} {value:.4g}" for label, value in zip(labels, values, strict=True)) + "."
    ends = f"{y[0]:.4g} at step {x[0]:.0f}, {y[-1]:.4g} at step {x[-1]:.0f}"
    return f"{subject}{ends}, minimum {min(y):.4g}, maximum {max(y):.4g}."


def grid(charts: Sequence[str], *, wide: bool = False) -> str:
    """Return charts side by side, as many per row as fit; wide ones are two per row on a large screen."""
    content = "".join(charts)
    return f'<div class="grid{" wide" if wide else ""}">{content}</div>' if content else ""


def color(series: int, opacity: float = 1.0) -> str:
    """Return the color of a line by its number."""
    return f"--series-{series % COLORS}" + (f"/{opacity:g}" if opacity < 1 else "")


def lines(curve: Curve, name: str, series: int, *, dash: int = 0, noisy: bool = True, band: bool = True) -> list[Trace]:
    """Return the traces of a curve: a line, and behind it its band and, of a noisy curve, the values themselves.

    Args:
        curve: the curve.
        name: name in the legend.
        series: number of the color.
        dash: number of the dash pattern.
        noisy: draw the moving average over a 25th of the steps as the line.
        band: draw the band, if it is wider than the line.
    """
    traces: list[Trace] = []
    shared = {"type": "scatter", "legendgroup": name, "showlegend": False, "hoverinfo": "skip"}
    width = max(5, curve.mean.size // 25) if noisy and curve.mean.size >= 20 else 1
    if band and not np.array_equal(curve.low, curve.high):
        edges = np.r_[smooth(curve.high, width), smooth(curve.low, width)[::-1]]
        outline = {"x": _digits(np.r_[curve.steps, curve.steps[::-1]]), "y": _digits(edges)}
        traces.append(shared | outline | {"fill": "toself", "fillcolor": color(series, 0.18), "mode": "none"})
    elif width > 1:
        values = {"x": _digits(curve.steps), "y": _digits(curve.mean), "mode": "lines"}
        traces.append(shared | values | {"line": {"color": color(series, 0.35), "width": 1}})
    mean = smooth(curve.mean, width)
    traces.append(
        {
            "type": "scatter",
            "name": name,
            "legendgroup": name,
            "x": _digits(curve.steps),
            "y": _digits(mean),
            "mode": "lines+markers" if curve.steps.size < 20 else "lines",
            "line": {"color": color(series), "width": 2, "dash": DASHES[dash % len(DASHES)]},
            "marker": {"size": 5},
            "cliponaxis": False,
        }
    )
    return traces


def marks(steps: Sequence[tuple[int, str]]) -> list[dict[str, Any]]:
    """Return vertical lines at steps, each with a color, for a chart's ``shapes``."""
    line = {"type": "line", "yref": "paper", "y0": 0, "y1": 1}
    return [line | {"x0": step, "x1": step, "line": {"color": name, "width": 1, "dash": "dot"}} for step, name in steps]


def _digits(values: Array) -> list[float]:
    """Return the values with five significant digits, which is finer than a pixel."""
    return [float(f"{value:.5g}") for value in values]
