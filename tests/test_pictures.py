"""The pictures in docs/pictures: drawn from the records beside them, self-contained, readable in light and dark."""

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "pictures"
NAMES = ("terminal", "speed")
SVG = "{http://www.w3.org/2000/svg}"
COLOR = re.compile(r"#[0-9a-f]{6}\b")


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "benchmarks" / "pictures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pictures"] = module  # Dataclasses look their module up.
    spec.loader.exec_module(module)
    return module


pictures = load()
THEMES = {theme.name: theme for theme in (pictures.LIGHT, pictures.DARK)}


def stored(name: str, theme: str) -> str:
    return (FOLDER / f"{name}-{theme}.svg").read_text(encoding="utf-8")


def speed(*values: float) -> Any:
    bars = tuple(pictures.Bar(f"program {i}", value, bool(i)) for i, value in enumerate(values))
    return pictures.Speed("models", "settings", "machine", "command", bars)


def terminal(*stdout: str) -> Any:
    legend = "\x1b[32maccepted candidates\x1b[0m · \x1b[1mfrom the target\x1b[0m\n"
    return pictures.TerminalRun("mcsd generate --color", "machine", stdout, (legend, "summary\n"))


def spans(svg: str) -> list[tuple[str, bool, str]]:
    """Color, whether it is bold, and text of each part of a terminal."""
    found = ElementTree.fromstring(svg).iter(f"{SVG}tspan")
    return [(span.get("fill", ""), span.get("font-weight") == "700", span.text or "") for span in found]


def contrast(one: str, other: str) -> float:
    """The contrast ratio of WCAG 2."""

    def luminance(color: str) -> float:
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


def test_the_stored_pictures_are_those_of_the_records() -> None:
    drawn = dict(pictures.pictures(FOLDER))
    assert drawn.keys() == {path.name for path in FOLDER.glob("*.svg")}
    for name, text in drawn.items():
        assert (FOLDER / name).read_bytes() == text.encode(), "run python benchmarks/pictures.py"


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("name", NAMES)
def test_a_picture_is_self_contained(name: str, theme: str) -> None:
    text = stored(name, theme)
    root = ElementTree.fromstring(text)
    tags = {element.tag for element in root.iter()}
    assert root.tag == f"{SVG}svg"
    assert tags <= {f"{SVG}{tag}" for tag in ("svg", "title", "desc", "rect", "path", "circle", "text", "tspan")}
    attributes = {key: value for element in root.iter() for key, value in element.attrib.items()}
    assert not [key for key in attributes if "href" in key or key.startswith("on")]
    assert "url(" not in text
    assert text.count("://") == 1  # The namespace of SVG.
    assert root.findtext(f"{SVG}title")
    assert root.get("role") == "img"
    assert len(root.findtext(f"{SVG}desc") or "") > 100


@pytest.mark.parametrize("name", NAMES)
def test_light_and_dark_differ_in_colors_only(name: str) -> None:
    light, dark = stored(name, "light"), stored(name, "dark")
    assert light != dark
    assert COLOR.sub("", light) == COLOR.sub("", dark)


@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
def test_contrast(theme: Any) -> None:
    for color in (theme.text, theme.muted, theme.accepted):
        assert contrast(color, theme.background) >= 4.5
    for color in (theme.mcsd, theme.baseline):
        assert contrast(color, theme.background) >= 3
    assert contrast("#ffffff", "#000000") == pytest.approx(21)


def test_the_terminal_shows_the_recorded_tokens_in_their_style() -> None:
    run = pictures.read_terminal_run(FOLDER / "terminal.json")
    printed = pictures.parts("".join((*run.stdout, *run.stderr)))
    shown = spans(stored("terminal", "light"))
    accepted = "".join(text for color, _, text in shown if color == pictures.LIGHT.accepted)
    target = "".join(text for _, bold, text in shown if bold)
    for style, characters in (("accepted", accepted), ("target", target)):
        expected = "".join(text for s, text in printed if s == style)
        assert sorted(characters.replace(" ", "")) == sorted("".join(expected.split()))
    assert run.stdout
    assert accepted
    assert target
    assert run.command in "".join(ElementTree.fromstring(stored("terminal", "dark")).itertext())


def test_the_records_hold_what_the_pictures_need() -> None:
    for name in NAMES:
        values = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
        assert values["command"].startswith("mcsd ")
        assert values["machine"]


def test_text_is_escaped() -> None:
    svg = pictures.draw_terminal(terminal("\x1b[32ma < b\x1b[0m\x1b[1m & c\x1b[0m\n"), pictures.LIGHT)
    assert (pictures.LIGHT.accepted, False, "a < b") in spans(svg)
    assert (pictures.LIGHT.text, True, " & c") in spans(svg)


def test_lines_break_at_spaces_and_keep_indentation() -> None:
    def lines(text: str) -> list[str]:
        return ["".join(part for _, part in line) for line in pictures.wrap([("plain", text)], 10)]

    assert lines("one two three") == ["one two", "three"]
    assert lines("    indented words") == ["    indent", "ed words"]
    assert lines("ten sharp. more") == ["ten sharp.", "more"]
    assert lines("abcdefghijklm\n\nn  \n") == ["abcdefghij", "klm", "", "n"]
    assert pictures.wrap([("accepted", "one tw"), ("target", "o three")], 10) == [
        [("accepted", "one tw"), ("target", "o")],
        [("target", "three")],
    ]


@pytest.mark.parametrize("bars", range(2, 7))
def test_bars_are_in_proportion_and_inside_the_picture(bars: int) -> None:
    values = [2.0 * (i + 1) for i in range(bars)]
    root = ElementTree.fromstring(pictures.draw_speed(speed(*values), pictures.DARK))
    rectangles = root.findall(f"{SVG}rect")[1:]
    widths = [float(rectangle.get("width", 0)) for rectangle in rectangles]
    assert widths == pytest.approx([widths[0] * (i + 1) for i in range(bars)], abs=0.1 * bars)
    assert max(widths) + 130 <= int(root.get("width", 0))
    ratios = [text for text in root.itertext() if text.endswith("×")]
    assert ratios == [f"{i + 1:.1f}×" for i in range(bars)]
    lowest = max(float(text.get("y", 0)) for text in root.iter(f"{SVG}text"))
    assert lowest + 10 < int(root.get("height", 0))


@pytest.mark.parametrize("values", [(1.0,), (1.0,) * 7, (1.0, 0.0)])
def test_other_bars_are_refused(values: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="two to six"):
        speed(*values)


@pytest.mark.parametrize("command", ["mcsd generate words", "other generate --color"])
def test_other_commands_are_not_recorded(command: str) -> None:
    with pytest.raises(ValueError, match="begin with mcsd"):
        pictures.record(command)
