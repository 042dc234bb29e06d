"""The commands and Python examples of README and docs run as they stand.

A page's blocks run in order, in one empty folder and one namespace. A comment above a block names its lane:
``<!-- run: slow -->`` takes long, ``<!-- run: large -->`` needs large weights, ``<!-- run: never (reason) -->`` needs
what no test has. Links between pages, and to headings, exist.
"""

import io
import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from mcsd.cli import main
from mcsd.cpu.weight_plan import WeightPlan, has_bf16_gemm
from mcsd.errors import McsdWarning
from mcsd.loading.catalog import locate
from mcsd.loading.gguf_cache import GgufCache
from mcsd.loading.load import load

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANES = ("fast", "slow", "large", "never")
_BLOCK = re.compile(r"(?:<!-- run: (\w+)(?: \(([^)\n]+)\))? -->\n)?^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_SHELL = set("|<>;&$`*")


class Block(NamedTuple):
    """A fenced block of a page."""

    lane: str
    reason: str | None
    language: str
    text: str


def blocks(page: Path) -> list[Block]:
    found = [Block(lane or "fast", *rest) for lane, *rest in _BLOCK.findall(page.read_text())]
    return [block for block in found if block.language in ("sh", "python")]


def pages_of(lane: str) -> list[Path]:
    return [page for page in PAGES if any(block.lane == lane for block in blocks(page))]


def commands(text: str) -> Iterator[str]:
    """The commands of a block, one per line, without comments."""
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip() and not line.startswith("#"):
            yield line.split("  #")[0].strip()


def run_command(command: str) -> None:
    if _SHELL & set(command) or not command.startswith("mcsd "):
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        subprocess.run(command, shell=True, check=True, env=environment, timeout=1800)
    else:
        # In this process, which saves the imports. A chat ends at once.
        sys.stdin = io.StringIO("")
        assert main(shlex.split(command)[1:]) == 0, command


@pytest.fixture(scope="session")
def hub_models() -> dict[str, str]:
    """Folders that stand for models of the hub, which tests cannot reach: the same model from a GGUF file."""
    location = locate("smollm2-135m")
    load("smollm2-135m", torch.device("cpu"), WeightPlan(torch.bfloat16))
    return {
        "HuggingFaceTB/SmolLM2-135M-Instruct": str(
            GgufCache(Path(location.source, location.file or ""), torch.bfloat16).folder
        )
    }


def run_page(page: Path, folder: Path, patch: pytest.MonkeyPatch, hub: dict[str, str], *lanes: str) -> None:
    patch.chdir(folder)
    patch.setattr(sys, "stdin", sys.stdin)
    if not has_bf16_gemm(torch.device("cpu")):
        warnings.filterwarnings("ignore", "optimize has no effect", McsdWarning)
    names: dict[str, object] = {"__name__": "example"}
    for block in blocks(page):
        if block.lane not in lanes:
            continue
        text = block.text
        for name, path in hub.items():
            text = text.replace(name, path)
        if block.language == "python":
            exec(compile(text, str(page), "exec"), names)
        else:
            for command in commands(text):
                run_command(command)


def page_id(page: Path) -> str:
    return page.stem


@pytest.mark.thorough
@pytest.mark.parametrize("page", pages_of("fast"), ids=page_id)
def test_examples(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_models: dict[str, str]) -> None:
    run_page(page, tmp_path, monkeypatch, hub_models, "fast")


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_of("slow"), ids=page_id)
def test_slow_examples(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_models: dict[str, str]) -> None:
    run_page(page, tmp_path, monkeypatch, hub_models, "fast", "slow")


@pytest.mark.large
@pytest.mark.parametrize("page", pages_of("large"), ids=page_id)
def test_large_examples(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_models: dict[str, str]
) -> None:
    run_page(page, tmp_path, monkeypatch, hub_models, "fast", "large")


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_blocks_name_a_lane_and_a_language(page: Path) -> None:
    fences = re.findall(r"^```(\w*)", page.read_text(), re.MULTILINE)[::2]
    assert set(fences) <= {"sh", "python", "text", "json", "bibtex"}
    for block in blocks(page):
        assert block.lane in LANES
        assert (block.lane == "never") == bool(block.reason)
    assert len(re.findall("<!-- run:", page.read_text())) == sum(block.lane != "fast" for block in blocks(page))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"(?:\]\(|(?:src|srcset|href)=\")([^)\"#\s]*)(?:#[^)\"]*)?[)\"]", page.read_text()):
        if target and not target.startswith(("http:", "https:")):
            assert (page.parent / target).exists(), target
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)]+)\)", page.read_text()):
        other = page.parent / target if target else page
        if not target.startswith("http"):
            headings = re.findall(r"^#+ (.+)$", other.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{target}#{anchor}"
