"""The playground in Chromium, on real servers of SmolLM2. Skipped where playwright or Chromium is missing."""

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2 as httpx
import pytest

from support.threads import LIMIT, wait_for

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def serving(*words: str, **environment: str) -> Iterator[str]:
    """`mcsd serve` on a free port; the address of its page."""
    command = [sys.executable, "-m", "mcsd", "serve", "-m", "smollm2-135m", "--port", "0", *words]
    process = subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(process.stderr), daemon=True)  # type: ignore[arg-type]
    reader.start()

    def page() -> str:
        found = [line.rpartition("playground on ")[2].strip() for line in lines if "playground on " in line]
        return found[0] if found else ""

    try:
        wait_for(lambda: page() or process.poll() is not None, 4 * LIMIT)
        assert page(), "".join(lines)
        wait_for(lambda: httpx.get(f"{page()}ready").status_code == 200, 4 * LIMIT)
        yield page()
    finally:
        process.terminate()
        process.wait(LIMIT)
        reader.join()
        process.stderr.close()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: make page")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    # Its sandbox refuses to run as root.
    words = ["--no-sandbox"] if os.geteuid() == 0 else []
    with playwright.sync_playwright() as library:
        browser = library.chromium.launch(executable_path=CHROMIUM, args=words)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def server(browser: Any) -> Iterator[str]:
    with serving("--tree", "4x2x2") as url:
        yield url


@pytest.fixture(scope="session")
def server_with_key(browser: Any) -> Iterator[tuple[str, str]]:
    """The short command, so tree auto; and its key."""
    key = "secret"
    with serving(MCSD_API_KEY=key) as url:
        yield url, key


Open = Callable[..., Any]


@pytest.fixture
def visit(browser: Any) -> Iterator[Open]:
    """Opens pages, and checks at the end that they logged no error and asked no other host.

    Arguments: the address, statuses of answers that the test expects besides 200, and options of the browser's context.
    """
    contexts, problems = [], []

    def visit(url: str, *statuses: int, **options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(1000 * LIMIT)
        page.on("pageerror", lambda error: problems.append(str(error)))

        def log(message: Any) -> None:
            expected = any(f"status of {status}" in message.text for status in statuses)
            if message.type in ("error", "warning") and not expected:
                problems.append(message.text)

        page.on("console", log)
        page.on("request", lambda sent: sent.url.startswith(url) or problems.append(f"asked {sent.url}"))
        page.goto(url)
        return page

    yield visit
    for context in contexts:
        context.close()
    assert not problems
