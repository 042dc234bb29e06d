"""The figures of a report, as SVG that stands in a page: no fonts, no scripts, in the page's own colours."""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from mcsd.bench.experiment import PLAIN, TUNED
from mcsd.bench.results import ALL, STEP, Acceptance, Attention, Speed, overall
from mcsd.errors import MissingPackage

_INK = "#010203"
"""Drawn with, and then replaced by the colour of the page's text, which is light on dark pages."""

_SERIES = ("#3b82c4", "#e07b39", "#3fa06b", "#b65fb0", "#8a8f98", "#c9a227")
_COLOURS = {
    "mcss-wor": _SERIES[0], "top-k": _SERIES[5], "mcss": _SERIES[1], "naive": _SERIES[2],
    "draft": _SERIES[1], "target": _SERIES[0], "judge": _SERIES[2], "commit": _SERIES[3], "other": _SERIES[4],
}  # fmt: skip
_WORDS = {"mcss-wor": "without replacement", "mcss": "with replacement", "naive": "naive", "top-k": "the likeliest"}

_STYLE = {
    "svg.fonttype": "path",
    "text.parse_math": False,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "legend.frameon": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
}


def check_matplotlib() -> None:
    """Whether figures can be drawn.

    Raises:
        MissingPackage: matplotlib is not there.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingPackage(
            "matplotlib, which draws the figures, is not installed", 'pip install "mcsd[bench]"'
        ) from error


Draw = Callable[[], Any]
"""Makes a figure of matplotlib."""


def svg(name: str, draw: Draw) -> str:
    """A figure as an ``<svg>`` element.

    Args:
        name: tells the ids within it from those of other figures.
        draw: makes it.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = draw()
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", text[text.index("<svg") :], flags=re.DOTALL)
    # A narrow page makes it smaller; the drawing keeps its shape.
    text = re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", text, count=1)
    return text.replace(_INK, "currentColor")


def acceptance(rows: Sequence[Acceptance]) -> Any:
    """Acceptance against k: a panel a set of prompts and temperature, a line a scheme and draft."""
    temperatures = sorted({row.temperature for row in rows})
    sets = list(dict.fromkeys(row.prompts for row in rows if row.prompts != ALL))
    figure, panels = _panels(len(temperatures), len(sets), (3.6, 2.7), sharey=True)
    for line, temperature in enumerate(temperatures):
        for column, prompts in enumerate(sets):
            panel = panels[line][column]
            for row in rows:
                if (row.temperature, row.prompts) == (temperature, prompts):
                    _curve(panel, row)
            panel.set_title(f"{prompts}, temperature {temperature:g}")
            panel.set_xticks(range(1, 1 + len(rows[0].within)))
            panel.grid(axis="y", color="#888888", alpha=0.25, linewidth=0.6)
        panels[line][0].set_ylabel("one of k is accepted")
    for panel in panels[-1]:
        panel.set_xlabel("candidates k")
    # The bands of a few texts are wide: they may be cut off.
    values = [interval.value for row in rows if row.prompts in sets for interval in row.within]
    panels[0][0].set_ylim(max(min(values) - 0.05, 0), min(max(values) + 0.05, 1.01))
    lines = {line.get_label(): line for panel in panels.flat for line in panel.get_lines()}
    figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=min(4, len(lines)))
    return figure


def _curve(panel: Any, row: Acceptance) -> None:
    widths = range(1, 1 + len(row.within))
    values = [interval.value for interval in row.within]
    tuned = row.draft == TUNED
    style = {"color": _COLOURS[row.scheme], "linestyle": "--" if tuned else "-", "marker": "s" if tuned else "o"}
    label = _WORDS[row.scheme] + (", tuned draft" if tuned else "")
    panel.plot(widths, values, label=label, markersize=3.5, linewidth=1.5, **style)
    low = [value if interval.low is None else interval.low for interval, value in zip(row.within, values, strict=True)]
    high = [
        value if interval.high is None else interval.high for interval, value in zip(row.within, values, strict=True)
    ]
    panel.fill_between(widths, low, high, color=_COLOURS[row.scheme], alpha=0.12, linewidth=0)


def speedup(rows: Sequence[Speed]) -> Any:
    """Times as fast as plain decoding: a panel a temperature and batch size, a bar a system."""
    panels = _conditions(rows)
    names = list(dict.fromkeys(row.system for row in rows))
    figure, axes = _panels(1, len(panels), (4.3, 0.9 + 0.27 * len(names)), sharex=True, sharey=True)
    for axis, (title, shown) in zip(axes[0], panels, strict=True):
        for row in shown:
            place, value = names.index(row.system), row.speedup
            colour = _SERIES[4] if row.role == PLAIN else _SERIES[0] if row.role == "multi" else _SERIES[1]
            axis.barh(place, value.value, color=colour, height=0.68)
            end = value.value
            if value.low is not None and value.high is not None:
                end = max(end, value.high)
                axis.plot([value.low, value.high], [place, place], color=_INK, linewidth=1.2)
            axis.annotate(
                f"{value.value:.2f}", (end, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
            )
        _bars(axis, names, title, "times as fast as plain decoding")
        axis.axvline(1, color=_INK, linewidth=0.8, linestyle=":")
    return figure


def steps(rows: Sequence[Speed]) -> Any:
    """Where an average step's time goes: stacked bars, a panel a temperature and batch size."""
    rows = [row for row in rows if row.step]
    panels = _conditions(rows)
    names = list(dict.fromkeys(row.system for row in rows))
    figure, axes = _panels(1, len(panels), (4.3, 1.2 + 0.27 * len(names)), sharex=True, sharey=True)
    for axis, (title, shown) in zip(axes[0], panels, strict=True):
        places = [names.index(row.system) for row in shown]
        left = [0.0] * len(shown)
        for part in STEP:
            widths = [row.step[part] for row in shown]
            axis.barh(places, widths, left=left, color=_COLOURS[part], height=0.68, label=part)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        for place, end, row in zip(places, left, shown, strict=True):
            tokens = row.block_efficiency.value if row.block_efficiency else 1.0
            axis.annotate(
                f"{tokens:.2f} tokens", (end, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8
            )
        _bars(axis, names, title, "milliseconds a step")
        axis.margins(x=0.3)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(STEP))
    return figure


def attention(rows: Sequence[Attention]) -> Any:
    """One forward of the target: as a tree, and as a batch of the tree's paths."""
    figure, axes = _panels(1, 1, (6.4, 1.2 + 0.42 * len(rows)))
    axis = axes[0][0]
    for place, row in enumerate(rows):
        tree = axis.barh(place - 0.19, row.tree_ms, color=_SERIES[0], height=0.36)
        batch = axis.barh(place + 0.19, row.batch_ms, color=_SERIES[4], height=0.36)
        for bars, note in ((tree, ""), (batch, f"{row.paths} rows of {1 + row.depth}")):
            axis.bar_label(bars, [note], padding=4, fontsize=8)
    _bars(axis, [row.tree for row in rows], "", "milliseconds a forward of the target")
    figure.legend([tree, batch], ["tree mask", "batch of paths"], loc="outside upper center", ncols=2)
    return figure


def _conditions(rows: Sequence[Speed]) -> list[tuple[str, list[Speed]]]:
    """Rows over all prompts by temperature and batch size, with a title."""
    rows = overall(rows)
    several = len({row.batch for row in rows}) > 1
    found = []
    for temperature, batch in sorted({(row.temperature, row.batch) for row in rows}):
        title = f"temperature {temperature:g}" + (f", batch {batch}" if several else "")
        found.append((title, [row for row in rows if (row.temperature, row.batch) == (temperature, batch)]))
    return found


def _panels(lines: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    from matplotlib import pyplot

    width, height = size
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(width * columns, height * lines), squeeze=False, layout="constrained", **options
    )
    return figure, axes


def _bars(axis: Any, names: Sequence[str], title: str, label: str) -> None:
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.set_title(title)
    axis.set_xlabel(label)
    axis.margins(x=0.16)
