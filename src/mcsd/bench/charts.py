"""Charts as SVG in the page's own text colour. They fill the width they are given, and their text keeps its size.

Across, places are shares of the width; down, they are pixels. So a chart needs no layout by the browser: the same text
is right on a phone and on a wide screen.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

_FONT, _SMALL = 13, 12
"""Text sizes in pixels."""

_CHARACTER = 0.58
"""Average width of a character by the text size; used where entries of a legend are laid out."""

_LEFT, _RIGHT = 11.0, 97.0
"""Percent of the width at which the points of a line chart begin and end; the numbers of its axis are left of them."""

_BARS = 93.0
"""Percent of the width that the largest bar may have; the last number of the axis needs the rest."""

_FILE_WIDTH = 520
"""Pixels of a panel in an SVG file."""

_FILE_COLOUR = "#767676"
"""Text in an SVG file: readable on white and on dark pages."""


@dataclass(frozen=True)
class Key:
    """An entry of a legend."""

    name: str
    colour: str
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """One chart.

    Attributes:
        title: above it.
        body: SVG elements.
        height: in pixels.
    """

    title: str
    body: str
    height: int

    def svg(self, attributes: str = 'width="100%"') -> str:
        """An ``<svg>`` element, as wide as what it is in."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" {attributes} height="{self.height}" role="img" '
            f'aria-label="{escape(self.title)}" fill="currentColor" font-family="system-ui, sans-serif" '
            f'font-size="{_FONT}">{self.body}</svg>'
        )


@dataclass(frozen=True)
class Figure:
    """Charts that share a legend.

    Attributes:
        panels: in order of reading.
        columns: how many stand side by side where there is room.
        legend: what the colours mean.
    """

    panels: tuple[Panel, ...]
    columns: int
    legend: tuple[Key, ...]

    def file(self) -> str:
        """The figure as an SVG file of its own, for white and dark pages."""
        width, gap = self.columns * _FILE_WIDTH, 24
        parts, top = _legend(self.legend, width)
        for start in range(0, len(self.panels), self.columns):
            line = self.panels[start : start + self.columns]
            for column, panel in enumerate(line):
                left = column * _FILE_WIDTH + gap // 2
                parts.append(_text(left, top + 16, panel.title, 'font-weight="600"'))
                parts.append(panel.svg(f'x="{left}" y="{top + 26}" width="{_FILE_WIDTH - gap}"'))
            top += max(panel.height for panel in line) + 26 + gap
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{top}" viewBox="0 0 {width} {top}" '
            f'fill="currentColor" font-family="system-ui, sans-serif" font-size="{_FONT}">{"".join(parts)}</svg>\n'
        ).replace("currentColor", _FILE_COLOUR)


@dataclass(frozen=True)
class Curve:
    """A line of a line chart, with a band.

    Attributes:
        key: its name and colour.
        values: at 1, 2, ...
        band: low and high at each, within 0 and 1.
    """

    key: Key
    values: Sequence[float]
    band: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Bar:
    """A name, a note at the right, and one or more bars below them.

    Attributes:
        name, note: texts.
        stacks: for each bar its parts, from left to right: their lengths and colours.
        interval: of the first bar.
    """

    name: str
    note: str
    stacks: Sequence[Sequence[tuple[float, str]]]
    interval: tuple[float, float] | None = None


def lines(title: str, curves: Sequence[Curve], label: str, limits: tuple[float, float]) -> Panel:
    """A line chart of shares against 1, 2, ...; ``limits`` are those of the vertical axis."""
    top, height = 14, 200
    bottom, (low, high), count = top + height, limits, len(curves[0].values)

    def across(i: int) -> float:
        """The share of the plot's width left of point i."""
        return i / (count - 1) if count > 1 else 0.5

    def down(value: float) -> float:
        """The share of the plot's height above a value."""
        return (high - value) / (high - low)

    places = [f"{_LEFT + (_RIGHT - _LEFT) * across(i):.2f}%" for i in range(count)]
    parts = []
    for value in _ticks(low, high, 5):
        y = round(top + height * down(value), 1)
        parts.append(f'<line x1="{_LEFT - 1}%" x2="100%" y1="{y}" y2="{y}" stroke="currentColor" opacity=".18"/>')
        parts.append(_text(f"{_LEFT - 2}%", y + 4, _number(value), f'text-anchor="end" font-size="{_SMALL}"'))
    middle = f'text-anchor="middle" font-size="{_SMALL}"'
    parts += [_text(x, bottom + 18, str(i), middle) for i, x in enumerate(places, 1)]
    parts.append(_text(f"{(_LEFT + _RIGHT) / 2}%", bottom + 38, label, middle))
    # Bands and lines are drawn in a box of 1000 by 1000 that is stretched over the width.
    parts.append(
        f'<svg x="{_LEFT}%" y="{top}" width="{_RIGHT - _LEFT}%" height="{height}" viewBox="0 0 1000 1000" '
        'preserveAspectRatio="none" overflow="visible">'
    )

    def points(values: Iterable[tuple[int, float]]) -> str:
        return " ".join(f"{1000 * across(i):.0f},{1000 * down(value):.0f}" for i, value in values)

    for curve in curves:
        lows, highs = (list(enumerate(ends)) for ends in zip(*curve.band, strict=True))
        parts.append(f'<polygon points="{points([*lows, *highs[::-1]])}" fill="{curve.key.colour}" opacity=".14"/>')
    for curve in curves:
        dashes = ' stroke-dasharray="6 4"' if curve.key.dashed else ""
        parts.append(
            f'<polyline points="{points(enumerate(curve.values))}" fill="none" stroke="{curve.key.colour}" '
            f'stroke-width="2"{dashes} vector-effect="non-scaling-stroke"/>'
        )
    parts.append("</svg>")
    for curve in curves:
        parts += [
            f'<circle cx="{x}" cy="{top + height * down(value):.1f}" r="3.5" fill="{curve.key.colour}">'
            f"<title>{escape(curve.key.name)}, k = {k}: {value:.3f}</title></circle>"
            for k, (x, value) in enumerate(zip(places, curve.values, strict=True), 1)
        ]
    return Panel(title, "".join(parts), bottom + 46)


def limits_of(curves: Sequence[Curve]) -> tuple[float, float]:
    """Limits of a vertical axis of shares that show all curves and bands."""
    lows = [min(ends[0], value) for curve in curves for ends, value in zip(curve.band, curve.values, strict=True)]
    highs = [max(ends[1], value) for curve in curves for ends, value in zip(curve.band, curve.values, strict=True)]
    low, high = max(floor(20 * min(lows)) / 20, 0.0), min(ceil(20 * max(highs)) / 20, 1.0)
    return (low, high) if low < high else (max(low - 0.05, 0.0), min(high + 0.05, 1.0))


def bars(title: str, rows: Sequence[Bar], label: str, maximum: float, mark: float | None = None) -> Panel:
    """Horizontal bars below their names.

    Args:
        title: of the panel.
        rows: from top to bottom.
        label: of the axis.
        maximum: of the axis. An interval that goes further ends in an arrow.
        mark: a value at which a dotted line is drawn.
    """

    def share(value: float) -> float:
        return _BARS * min(max(value, 0.0), maximum) / maximum

    ticks = [(value, 'opacity=".18"') for value in _ticks(0.0, maximum, 5)]
    rules = ticks if mark is None else [*ticks, (mark, 'stroke-dasharray="2 3"')]
    parts, top = [], 0
    for row in rows:
        parts.append(_text(0, top + 14, row.name))
        parts.append(_text("100%", top + 14, row.note, f'text-anchor="end" font-size="{_SMALL}"'))
        bottom = top + 21 + 13 * len(row.stacks)
        for value, look in rules:
            x = f"{share(value):.2f}%"
            parts.append(f'<line x1="{x}" x2="{x}" y1="{top + 19}" y2="{bottom}" stroke="currentColor" {look}/>')
        for number, stack in enumerate(row.stacks):
            y, left = top + 21 + 13 * number, 0.0
            for length, colour in stack:
                x, width = f"{share(left):.2f}%", f"{share(left + length) - share(left):.2f}%"
                parts.append(f'<rect x="{x}" y="{y}" width="{width}" height="11" fill="{colour}"/>')
                left += length
        if row.interval is not None:
            low, high = row.interval
            parts.append(_interval(share(low), share(high), top + 26.5, high > maximum))
        top = bottom + 10
    for value, _ in ticks:
        anchor = f'text-anchor="{"middle" if value else "start"}" font-size="{_SMALL}"'
        parts.append(_text(f"{share(value):.2f}%", top + 8, _number(value), anchor))
    parts.append(_text("50%", top + 28, label, f'text-anchor="middle" font-size="{_SMALL}"'))
    return Panel(title, "".join(parts), top + 36)


def short(name: str, most: int = 30) -> str:
    """Cut a name to the most characters that a chart shows."""
    return name if len(name) <= most else name[: most - 1] + "…"


def _interval(low: float, high: float, y: float, is_cut: bool) -> str:
    """A line from low to high, in percent, with an end mark on both sides; an arrow instead where it is cut."""
    line = f'<line x1="{low:.2f}%" x2="{high:.2f}%" y1="{y}" y2="{y}" stroke="currentColor" stroke-width="1.5"/>'
    ends = "".join(
        f'<line x1="{end:.2f}%" x2="{end:.2f}%" y1="{y - 4}" y2="{y + 4}" stroke="currentColor" stroke-width="1.5"/>'
        for end in ((low,) if is_cut else (low, high))
    )
    return line + ends + (_text(f"{high:.2f}%", y + 5, "▸") if is_cut else "")


def _legend(keys: Sequence[Key], width: int) -> tuple[list[str], int]:
    """The elements of a legend in a file, and its height."""
    parts, left, top = [], 12.0, 0
    for key in keys:
        needed = 28 + _CHARACTER * _FONT * len(key.name) + 18
        if left + needed > width and left > 12:
            left, top = 12.0, top + 22
        ends, dashes = f'x1="{left:.0f}" x2="{left + 20:.0f}"', ' stroke-dasharray="8 4"' if key.dashed else ""
        parts.append(f'<line {ends} y1="{top + 14}" y2="{top + 14}" stroke="{key.colour}" stroke-width="4"{dashes}/>')
        parts.append(_text(round(left + 28), top + 18, key.name))
        left += needed
    return parts, top + 30 if keys else 0


def _text(x: float | str, y: float, text: str, attributes: str = "") -> str:
    return f'<text x="{x}" y="{y:g}" {attributes}>{escape(text)}</text>'


def _ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from low to high, at most so many and one."""
    rough = (high - low) / most
    unit = 10.0 ** floor(log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * (1 - 1e-9))
    first, last = ceil(low / step - 1e-9), floor(high / step + 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def _number(value: float) -> str:
    return f"{value:g}"
