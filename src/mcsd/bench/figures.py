"""The figures of a report as inline SVG: no fonts, no scripts, in the page's own colours."""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from mcsd.bench.experiment import MULTI, PLAIN, TUNED
from mcsd.bench.results import ALL_PROMPTS, STEP_PARTS, AcceptanceRow, AttentionRow, SpeedRow, overall
from mcsd.errors import MissingPackage

_INK = "#010203"
"""Placeholder colour, replaced by the page's text colour, which is light on dark pages."""

_SERIES = ("#3b82c4", "#e07b39", "#3fa06b", "#b65fb0", "#8a8f98", "#c9a227")
_COLOURS = {
    "mcss-wor": _SERIES[0], "top-k": _SERIES[5], "mcss": _SERIES[1], "naive": _SERIES[2],
    "draft": _SERIES[1], "target": _SERIES[0], "judge": _SERIES[2], "commit": _SERIES[3], "other": _SERIES[4],
}  # fmt: skip
_LABELS = {
    "mcss-wor": "without replacement",
    "mcss": "with replacement",
    "naive": "naive",
    "top-k": "the most probable",
}

_MAX_NAME = 28
"""Characters of a name that are shown."""

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
    """Check that figures can be drawn.

    Raises:
        MissingPackage: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingPackage(
            "matplotlib, which draws the figures, is not installed", 'pip install "mcsd[bench]"'
        ) from error


Draw = Callable[[], Any]
"""Returns a figure of matplotlib."""


def svg(name: str, draw: Draw) -> str:
    """A figure as an ``<svg>`` element.

    Args:
        name: makes the ids within it differ from those of other figures.
        draw: draws it.
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
    # A narrow page scales the figure down; it keeps its aspect ratio.
    text = re.sub(r'<svg([^>]*?) height="[^"]*"', r"<svg\1", text, count=1)
    return text.replace(_INK, "currentColor")


def acceptance(rows: Sequence[AcceptanceRow]) -> Any:
    """Acceptance against k: a panel a prompt set and temperature, a line a scheme and draft."""
    temperatures = sorted({row.temperature for row in rows})
    sets = list(dict.fromkeys(row.prompts for row in rows if row.prompts != ALL_PROMPTS))
    figure, panels = _panels(len(temperatures), len(sets), (3.6 if len(sets) > 1 else 5.4, 2.9), sharey=True)
    for line, temperature in enumerate(temperatures):
        for column, prompts in enumerate(sets):
            panel = panels[line][column]
            for row in rows:
                if (row.temperature, row.prompts) == (temperature, prompts):
                    _curve(panel, row)
            panel.set_title(f"{_short(prompts)}, temperature {temperature:g}")
            panel.set_xticks(range(1, 1 + len(rows[0].within)))
            panel.grid(axis="y", color="#888888", alpha=0.25, linewidth=0.6)
        panels[line][0].set_ylabel("one of k is accepted")
    for panel in panels[-1]:
        panel.set_xlabel("candidates k")
    # With few texts the bands are wide; they may be cut off.
    values = [interval.value for row in rows if row.prompts in sets for interval in row.within]
    panels[0][0].set_ylim(max(min(values) - 0.05, 0), min(max(values) + 0.05, 1.01))
    lines = {line.get_label(): line for panel in panels.flat for line in panel.get_lines()}
    # Inches of a label: the legend must not be wider than the figure.
    label = 2.6 if any(row.draft == TUNED for row in rows) else 1.8
    columns = max(1, int(figure.get_figwidth() / label))
    figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=columns)
    return figure


def _curve(panel: Any, row: AcceptanceRow) -> None:
    widths = range(1, 1 + len(row.within))
    values = [interval.value for interval in row.within]
    tuned = row.draft == TUNED
    style = {"color": _COLOURS[row.scheme], "linestyle": "--" if tuned else "-", "marker": "s" if tuned else "o"}
    label = _LABELS[row.scheme] + (", tuned draft" if tuned else "")
    panel.plot(widths, values, label=label, markersize=3.5, linewidth=1.5, **style)
    low, high = (
        [value if end is None else end for end, value in zip(ends, values, strict=True)]
        for ends in ([interval.low for interval in row.within], [interval.high for interval in row.within])
    )
    panel.fill_between(widths, low, high, color=_COLOURS[row.scheme], alpha=0.12, linewidth=0)


def speedup(rows: Sequence[SpeedRow]) -> Any:
    """Speed-up over plain decoding: a panel a temperature and batch size, a bar a system."""
    rows = overall(rows)
    names = list(dict.fromkeys(row.system for row in rows))
    figure, panels = _conditions(rows, 0.9 + 0.27 * len(names))
    # With few prompts the intervals are wide; they may be cut off.
    maximum = 1.6 * max(row.speedup.value for row in rows)
    for axis, shown in panels:
        for row in shown:
            place, value = names.index(row.system), row.speedup
            colour = _SERIES[4] if row.role == PLAIN else _SERIES[0] if row.role == MULTI else _SERIES[1]
            axis.barh(place, value.value, color=colour, height=0.68)
            end = value.value
            if value.low is not None and value.high is not None:
                end = min(max(end, value.high), maximum)
                axis.plot([value.low, end], [place, place], color=_INK, linewidth=1.2)
            _note(axis, end, place, f"{value.value:.2f}")
        _bars(axis, names, "times as fast as plain decoding")
        axis.axvline(1, color=_INK, linewidth=0.8, linestyle=":")
    return figure


def steps(rows: Sequence[SpeedRow]) -> Any:
    """Where an average step's time goes: stacked bars, a panel a temperature and batch size."""
    rows = [row for row in overall(rows) if row.step]
    names = list(dict.fromkeys(row.system for row in rows))
    figure, panels = _conditions(rows, 1.1 + 0.27 * len(names))
    for axis, shown in panels:
        places = [names.index(row.system) for row in shown]
        left = [0.0] * len(shown)
        for part in STEP_PARTS:
            widths = [row.step[part] for row in shown]
            axis.barh(places, widths, left=left, color=_COLOURS[part], height=0.68, label=part)
            left = [start + width for start, width in zip(left, widths, strict=True)]
        for place, end, row in zip(places, left, shown, strict=True):
            if row.block_efficiency is not None:
                _note(axis, end, place, f"{row.block_efficiency.value:.2f} tokens")
        _bars(axis, names, "milliseconds a step")
        axis.margins(x=0.3)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(STEP_PARTS))
    return figure


def attention(rows: Sequence[AttentionRow]) -> Any:
    """One forward of the target: as a tree, and as a batch of the tree's paths."""
    figure, axes = _panels(1, 1, (6.4, 1.2 + 0.42 * len(rows)))
    axis = axes[0][0]
    for place, row in enumerate(rows):
        tree = axis.barh(place - 0.19, row.tree_ms, color=_SERIES[0], height=0.36)
        batch = axis.barh(place + 0.19, row.batch_ms, color=_SERIES[4], height=0.36)
        for bars, note in ((tree, ""), (batch, f"{row.paths} sequences of {1 + row.depth}")):
            axis.bar_label(bars, [note], padding=4, fontsize=8)
    _bars(axis, [row.tree for row in rows], "milliseconds a forward of the target")
    figure.legend([tree, batch], ["tree mask", "batch of paths"], loc="outside upper center", ncols=2)
    return figure


def _conditions(rows: Sequence[SpeedRow], height: float) -> tuple[Any, list[tuple[Any, list[SpeedRow]]]]:
    """A figure, and a titled panel with its rows for each temperature and batch size, two side by side."""
    several = len({row.batch for row in rows}) > 1
    conditions = sorted({(row.temperature, row.batch) for row in rows})
    columns = min(2, len(conditions))
    figure, axes = _panels(-(-len(conditions) // columns), columns, (4.3, height), sharex=True, sharey=True)
    panels = []
    for axis, (temperature, batch) in zip(axes.flat, conditions, strict=False):
        axis.set_title(f"temperature {temperature:g}" + (f", batch {batch}" if several else ""))
        panels.append((axis, [row for row in rows if (row.temperature, row.batch) == (temperature, batch)]))
    for axis in axes.flat[len(conditions) :]:
        axis.set_axis_off()
    return figure, panels


def _panels(lines: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    from matplotlib import pyplot

    width, height = size
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(width * columns, height * lines), squeeze=False, layout="constrained", **options
    )
    return figure, axes


def _bars(axis: Any, names: Sequence[str], label: str) -> None:
    """Axis settings of horizontal bars."""
    axis.set_yticks(range(len(names)), [_short(name) for name in names])
    axis.set_ylim(len(names) - 0.4, -0.6)
    axis.tick_params(labelbottom=True)
    axis.set_xlabel(label)
    axis.margins(x=0.16)


def _note(axis: Any, end: float, place: float, text: str) -> None:
    """A short text at the end of a bar."""
    axis.annotate(text, (end, place), xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)


def _short(name: str) -> str:
    """Cut a name: a tree may be a long list of parents."""
    return name if len(name) <= _MAX_NAME else name[: _MAX_NAME - 1] + "…"
