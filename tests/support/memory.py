"""The peak of this process's memory while something runs (Linux)."""

from collections.abc import Callable
from pathlib import Path


def resident(field: str) -> int:
    """Bytes: ``VmRSS`` now, ``VmHWM`` at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def peak_growth(run: Callable[[], object]) -> int:
    """Bytes by which the peak during ``run`` exceeds what is resident before it."""
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before
