"""The documentation site: the navigation has every page, and the pages that `make docs` built need no other host."""

import json
import os
import re
import tomllib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import mcsd

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]
NO_PAGES = {"docs/package.md"}  # The description for package indexes, in pyproject.toml.
SITE = os.environ.get("MCSD_SITE")
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "srcset", "object": "data", "link": "href"}
CODE = ("code", "pre", "script", "style")
built = pytest.mark.skipif(SITE is None, reason="make docs builds the site and runs this")


def pages(entries: list[Any]) -> Iterator[str]:
    """The pages of a navigation, in order."""
    for entry in entries:
        for value in entry.values():
            yield from pages(value) if isinstance(value, list) else [value]


def test_the_navigation_has_every_page_once() -> None:
    named = list(pages(PROJECT["nav"]))
    assert len(named) == len(set(named))
    assert all((ROOT / page).is_file() for page in named)
    docs = {f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")} - NO_PAGES
    assert {page for page in named if page.startswith("docs/")} == docs
    assert set(PROJECT["plugins"]["exclude"]["glob"]) >= NO_PAGES


def test_the_overview_links_to_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w.-]+\.md)\)", (ROOT / "docs" / "index.md").read_text()))
    assert linked == {Path(page).name for page in pages(PROJECT["nav"]) if page.startswith("docs/")} - {"index.md"}


def test_the_reference_has_every_public_name() -> None:
    shown = set(re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE))
    assert {f"mcsd.{name}" for name in mcsd.__all__ if name != "__version__"} <= shown


class Page(HTMLParser):
    """A built page: what it loads and links to, its anchors, and its text outside of code."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path, self.text = path, ""
        self.loads: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.tags: set[str] = set()
        self._code = 0
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self._code += tag in CODE
        if loaded := values.get(LOADS.get(tag, "")):
            self.loads.append(loaded)
        self.loads += re.findall(r"url\(([^)]*)\)", values.get("style", ""))
        self.links += [values["href"]] if tag == "a" and "href" in values else []
        self.anchors |= {values[name] for name in ("id", "name") if name in values}

    def handle_endtag(self, tag: str) -> None:
        self._code -= tag in CODE

    def handle_data(self, data: str) -> None:
        self.text += "" if self._code else data


@pytest.fixture(scope="module")
def site() -> dict[Path, Page]:
    """The built pages by path. The page for addresses that do not exist is left out: its links are absolute."""
    return {path: Page(path) for path in Path(SITE or "").resolve().rglob("*.html") if path.name != "404.html"}


def is_local(url: str) -> bool:
    return not re.match(r"\w+:|//", url)


@built
def test_built_pages_load_nothing_from_another_host(site: dict[Path, Page]) -> None:
    assert len(site) == len(list(pages(PROJECT["nav"])))
    for path, page in site.items():
        assert all(is_local(url) for url in page.loads), path
        assert 'class="mermaid"' not in path.read_text()  # The theme would load a script for it.
    for path in Path(SITE or "").rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", path.read_text()), path


@built
def test_built_links_lead_to_files_and_anchors(site: dict[Path, Page]) -> None:
    """Also those that the build does not check: pictures, scripts and HTML in Markdown."""
    for path, page in site.items():
        for url in filter(is_local, page.loads + page.links):
            name, _, anchor = url.partition("#")
            file = (path.parent / name).resolve() if name else path
            assert file.exists(), f"{path.name}: {url}"
            assert not anchor or file not in site or anchor in site[file].anchors, f"{path.name}: {url}"


@built
def test_built_formulas_are_mathml(site: dict[Path, Page]) -> None:
    assert {path.stem for path, page in site.items() if "math" in page.tags} >= {"theory", "how-it-works"}
    assert not [path.stem for path, page in site.items() if "$" in page.text]


@built
def test_the_built_search_index_has_every_page() -> None:
    index = json.loads(Path(SITE or "", "search.json").read_text())
    locations = {item["location"].split("#")[0] for item in index["items"]}
    assert {page.replace(".md", ".html") for page in pages(PROJECT["nav"]) if page != "README.md"} <= locations


@built
def test_the_built_reference_shows_docstrings(site: dict[Path, Page]) -> None:
    (page,) = (page for path, page in site.items() if path.stem == "reference")
    for name in (mcsd.Engine, mcsd.SamplingParams, mcsd.Completion, mcsd.errors.McsdError):
        assert name.__doc__ is not None
        assert name.__doc__.split(".")[0].splitlines()[0] in page.text
