"""Charts stay inside their box at any width: places across are shares of it, and texts fit on a phone."""

import re
from collections.abc import Iterator
from xml.etree import ElementTree

import pytest

from mcsd.bench.charts import Bar, Curve, Figure, Key, Panel, bars, limits_of, lines, short

PHONE = 326
"""Pixels of a chart on a screen of 360."""

WIDTH = 0.62
"""A generous average width of a character, by the size of the text."""

CURVES = [
    Curve(Key("mcss-wor", "#111111"), [0.5, 0.7, 0.9], [(0.2, 0.8), (0.6, 0.8), (0.7, 1.0)]),
    Curve(Key("mcss <tuned>", "#222222", dashed=True), [0.4, 0.5, 0.6], [(0.4, 0.4), (0.41, 0.6), (0.5, 0.7)]),
]
BARS = [
    Bar("plain", "33.1 tokens/s", [[(1.0, "#111111")]], (1.0, 1.0)),
    Bar("parents:-1,-1,0,0,1 mcss-wor", "1162.4 tokens/s", [[(1.5, "#111111"), (0.5, "#222222")]], (0.5, 9.0)),
]


def elements(panel: Panel) -> Iterator[ElementTree.Element]:
    for element in ElementTree.fromstring(panel.svg()).iter():
        element.tag = element.tag.rpartition("}")[2]
        yield element


def percent(text: str) -> float:
    return float(text.removesuffix("%"))


@pytest.mark.parametrize(
    "panel",
    [
        lines("a", CURVES, "candidates k", limits_of(CURVES)),
        bars("a", BARS, "times plain decoding", 3.0, mark=1.0),
        bars("a", BARS, "milliseconds", 12345.0),
        bars("a", BARS, "milliseconds", 0.002),
    ],
)
def test_nothing_leaves_the_box(panel: Panel) -> None:
    for element in elements(panel):
        for name in ("x", "x1", "x2", "cx"):
            assert 0 <= percent(element.get(name, "0")) <= 100
        for name in ("y", "y1", "y2", "cy"):
            assert 0 <= float(element.get(name, 0)) <= panel.height
        if element.tag == "rect":
            assert percent(element.get("x", "")) + percent(element.get("width", "")) <= 100
        if element.tag == "text":
            size = float(element.get("font-size", 13))
            width = WIDTH * size * len(element.text or "")
            left = percent(element.get("x", "")) / 100 * PHONE
            left -= {"middle": width / 2, "end": width}.get(element.get("text-anchor", ""), 0.0)
            assert left >= -1
            assert left + width <= PHONE + 1


def test_bands_and_lines_are_drawn_whole() -> None:
    low, high = limits_of(CURVES)
    assert (low, high) == (0.2, 1.0)
    found = list(elements(lines("a", CURVES, "k", (low, high))))
    drawn = [element for element in found if element.tag in ("polygon", "polyline")]
    assert len(drawn) == 4
    for element in drawn:
        for place in (element.get("points") or "").split():
            assert all(0 <= int(number) <= 1000 for number in place.split(","))
    assert [element.get("stroke-dasharray") for element in drawn[2:]] == [None, "6 4"]
    assert "mcss <tuned>, k = 1: 0.400" in [element.text for element in found if element.tag == "title"]


def test_limits_of_flat_curves() -> None:
    for value in (0.0, 0.5, 1.0):
        low, high = limits_of([Curve(Key("a", "#111111"), [value], [(value, value)])])
        assert 0 <= low <= value <= high <= 1
        assert low < high


def test_an_interval_that_goes_on_ends_in_an_arrow() -> None:
    assert "▸" in bars("a", BARS, "b", 3.0).body
    assert "▸" not in bars("a", BARS, "b", 9.0).body


def test_names_and_notes_of_a_bar_do_not_meet_on_a_phone() -> None:
    name, note = short("x" * 60), "1162.4 tokens/s"
    assert len(name) == 30
    assert name.endswith("…")
    assert short("parents:-1,-1,0,0,1 mcss-wor") == "parents:-1,-1,0,0,1 mcss-wor"
    assert 0.58 * (13 * len(name) + 12 * len(note)) <= PHONE + 20


def test_the_legend_of_a_file_wraps() -> None:
    keys = tuple(Key(f"a scheme {i}", "#111111") for i in range(12))
    figure = Figure((bars("a", BARS, "b", 3.0),), 1, keys)
    text = figure.file()
    ElementTree.fromstring(text)
    width = int(re.findall(r'width="(\d+)"', text)[0])
    places = [(int(x), int(y)) for x, y in re.findall(r'<text x="(\d+)" y="(\d+)" >a scheme', text)]
    assert len({y for _, y in places}) > 1
    assert all(x + WIDTH * 13 * 11 <= width for x, _ in places)
