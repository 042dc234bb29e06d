"""The report page: self-contained, loads nothing, and escapes names from outside."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from mcsd.bench.experiment import TUNED
from mcsd.bench.records import AcceptanceRecord, AttentionRecord, RequestRecord
from mcsd.bench.report import draw, page, write_report
from mcsd.bench.results import Results, acceptance_rows, attention_rows, speed_rows

EVIL = "<script>alert(1)</script>\"'&$x$"
PARTS = {"prefill": 0.1, "draft": 0.2, "target": 0.5, "judge": 0.1, "commit": 0.01, "other": 0.02}
MANIFEST: dict[str, Any] = {
    "weights": {"target": EVIL, "draft": "small"},
    "machine": {"processor": EVIL, "threads": 2, "memory_gib": 3.0},
    "versions": {"torch": "1", "transformers": "2"},
}


def results(name: str = EVIL) -> Results:
    answered = [
        RequestRecord(
            *(system, role, "draft", tree, "mcss", prompts, [number], temperature, 0, [0], [3], [[1] * 9]),
            *(seconds * (1 + 0.1 * number), PARTS, [calls], [12], [4], [1, 2]),
        )
        for system, role, tree, seconds, calls in (("plain", "plain", "none", 2.0, 9), (name, "multi", name, 1.0, 4))
        for prompts in (name, "other")
        for number in range(3)
        for temperature in (0.0, 1.0)
    ]
    accepted = [
        AcceptanceRecord(draft, scheme, prompts, number, 1.0, 10, [4 + number, 6, 9])
        for draft in ("draft", TUNED)
        for scheme in ("mcss", "mcss-wor", "naive")
        for prompts in (name, "other")
        for number in range(3)
    ]
    verified = [AttentionRecord(name, 4, 2, 2, i, 0.01, 0.03) for i in range(3)]
    return Results(
        tuple(speed_rows(answered)), tuple(acceptance_rows(accepted)), tuple(attention_rows(verified)), MANIFEST
    )


class Page(HTMLParser):
    """Elements, and what they would fetch."""

    void = ("meta", "use", "path", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.ids: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.void:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "data", "srcset", "poster") and not (value or "").startswith("#"):
                self.fetched.append(str(value))
            assert not name.startswith("on")

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.void:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)


@pytest.fixture(scope="module")
def text() -> str:
    return page(results(), draw(results()))


def test_nothing_is_fetched_or_run(text: str) -> None:
    found = Page(text)
    assert found.open == []
    assert found.fetched == []
    assert not {"script", "link", "img", "iframe", "object", "image"} & set(found.tags)
    assert not re.search(r"url\((?!#|&quot;#|\"#)", text)
    assert "@import" not in text
    # XML namespaces are no addresses.
    assert set(re.findall(r'https?://[^"\s]+', text)) <= {"http://www.w3.org/1999/xlink", "http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in text


def test_names_from_outside_are_escaped(text: str) -> None:
    assert "alert(1)" in text
    assert "<script" not in text
    assert "&lt;script&gt;" in text


def test_it_has_all_sections_speed_first(text: str) -> None:
    found = Page(text)
    assert found.tags.count("figure") == 4
    sections = ["Speed", "Time of a step", "Acceptance", "Tree attention", "Reproduce"]
    assert re.findall("<h2>(.*?)</h2>", text) == sections
    assert text.index("× plain</th>") < text.index("accepted</th>") < text.index("k=1</th>")
    assert "temperature 0: fastest is" in text
    # Twice the tokens a second of plain decoding, on every prompt alike.
    assert "2.00× plain decoding" in text
    assert text.count('<tr class="best">') == 2
    assert "currentColor" in text


def test_names_are_the_same_in_figures_and_tables() -> None:
    some = results("2x1 mcss")
    figures = draw(some)
    text = page(some, figures)
    cells = set(re.findall('<td class="text">(.*?)</td>', text))
    assert {key.name for key in figures["acceptance"].legend} == {
        scheme + tuned for scheme in ("mcss-wor", "mcss", "naive") for tuned in ("", " tuned")
    }
    assert {key.name for key in figures["acceptance"].legend} <= cells
    for name in ("speedup", "steps"):
        shown = {
            words for panel in figures[name].panels for words in re.findall('<text x="0" [^>]*>(.*?)<', panel.body)
        }
        assert shown == {"plain", "2x1 mcss"} <= cells


def test_tables_scroll_in_boxes_and_panels_share_the_width(text: str) -> None:
    assert text.count("<table>") == text.count('<div class="wide" tabindex="0"><table>') == 4
    assert ".wide { overflow-x: auto" in text
    # Drawings have no width of their own.
    assert set(re.findall(r'<svg xmlns="[^"]*" ([^ ]*)', text)) == {'width="100%"'}
    assert 'content="width=device-width' in text
    assert "@media (prefers-color-scheme: dark)" in text
    # Two temperatures side by side.
    assert text.count('class="panels of2"') == 3


def test_figure_files_are_complete(tmp_path: Path) -> None:
    write_report(results("2x1"), tmp_path / "report.html")
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        f"{name}.svg" for name in ("speedup", "steps", "acceptance", "attention")
    }
    for path in (tmp_path / "figures").iterdir():
        ElementTree.fromstring(path.read_text())
        assert "currentColor" not in path.read_text()
    assert Page((tmp_path / "report.html").read_text()).open == []


def test_missing_measurements_are_named() -> None:
    some = results()
    speeds_only = Results(some.speeds, (), (), MANIFEST | {"left_out": {"generate": "<b>"}, "command": "mcsd bench"})
    text = page(speeds_only, draw(speeds_only))
    assert text.count("Not measured.") == 2
    assert Page(text).tags.count("figure") == 2
    assert "generate is left out: &lt;b&gt;." in text
    assert "<pre>mcsd bench --out FOLDER</pre>" in text


def test_systems_outside_the_engine_alone_have_no_steps() -> None:
    some = [replace(row, step={}, block_efficiency=None) for row in results().speeds]
    assert list(draw(Results(tuple(some), (), (), MANIFEST))) == ["speedup"]
