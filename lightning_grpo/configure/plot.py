"""Plots a plan."""

from pathlib import Path

from lightning_grpo.configure.result import Plan
from lightning_grpo.devices import GB
from lightning_grpo.errors import optional


def draw(plan: Plan, path: str | Path) -> list[Path]:
    """Plot memory by phase and time per rollout as stacked bars; return the PNG and the SVG file.

    Args:
        plan: the plan.
        path: file name, whose suffix is replaced by .png and .svg.
    """
    optional("matplotlib", "plot", "--plot")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, height_ratios=(3, 1))
    phases = plan.memory.phases
    parts = list(dict.fromkeys(part for phase in phases.values() for part in phase))
    offset = dict.fromkeys(phases, 0.0)
    for i, part in enumerate(parts):
        sizes = [phases[phase].get(part, 0.0) / GB for phase in phases]
        if max(sizes) < 0.002 * plan.memory.peak / GB:
            continue
        above.barh(list(phases), sizes, left=list(offset.values()), label=part, color=_color(i), edgecolor="white")
        offset = {phase: offset[phase] + size for phase, size in zip(phases, sizes, strict=True)}
    above.axvline(plan.hardware.memory / GB, color="black", linestyle="--", linewidth=1)
    above.text(plan.hardware.memory / GB, 2.45, f" {plan.hardware.name}", fontsize=8, va="bottom", ha="right")
    above.invert_yaxis()
    above.set_xlabel("memory of one rank (GB)")
    above.set_title(f"{plan.task}, {plan.model}: predicted peak memory and time", fontsize=11, loc="left")
    above.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    start = 0.0
    for i, (phase, seconds) in enumerate(plan.cost.seconds.items()):
        if seconds >= 0.001 * plan.cost.total:
            below.barh(["rollout"], [seconds], left=[start], label=f"{phase} {seconds:.1f} s", color=_color(i))
            start += seconds
    below.set_xlabel("time of a rollout and its updates (s)")
    below.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    files = [Path(path).with_suffix(ending) for ending in (".png", ".svg")]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=150)
    return files


def _color(i: int) -> tuple[float, ...]:
    from matplotlib import colormaps

    return colormaps["tab20"](i % 20)
