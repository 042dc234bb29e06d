"""The machine: cache folders on disk, the processor, and the garbage collector. Imports no torch."""

import gc
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_folder(name: str) -> Path:
    """A folder for cached files: ``$MCSD_HOME/name``, by default ``~/.cache/mcsd/name`` (or below XDG_CACHE_HOME)."""
    if home := os.environ.get("MCSD_HOME"):
        return Path(home).expanduser() / name
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG standard ignores relative paths.
    return (Path(cache) if os.path.isabs(cache) else Path.home() / ".cache") / "mcsd" / name


def processor() -> tuple[str, set[str]]:
    """The name of the processor and its flags; no flags if the system does not list them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor(), set()
    entries = dict(line.partition(":")[::2] for line in reversed(lines))
    entries = {name.strip(): value.strip() for name, value in entries.items()}
    name = entries.get("model name") or platform.processor() or platform.machine()
    return name, set(entries.get("flags", "").split())


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the garbage collector, which takes a third of the time of importing and loading, and finds nothing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
