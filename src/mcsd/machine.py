"""What processor this is: measurements are of one machine."""

import platform
from pathlib import Path


def processor() -> tuple[str, set[str]]:
    """Its name, and the flags of what it can do; none where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor(), set()
    entries = dict(line.partition(":")[::2] for line in reversed(lines))
    entries = {name.strip(): value.strip() for name, value in entries.items()}
    name = entries.get("model name") or platform.processor() or platform.machine()
    return name, set(entries.get("flags", "").split())
