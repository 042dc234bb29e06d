"""The state of one run: its options, its device, its time limit, its results, and the progress lines."""

import json
import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from gpu.engines import make_engine
from gpu.synthetic_pair import Pair, make_pair
from mcsd.errors import McsdError

SHORT_SECONDS = 300
"""A run with less time leaves out what it can."""

RESULTS_FILE, TABLES_FILE = "gpu.json", "gpu.md"


class Session:
    """One run of the sections.

    Args:
        options: of the command line.

    Attributes:
        results: what the sections measured, as it is written to `RESULTS_FILE`.
        section: the name of the running section.
    """

    def __init__(self, options: Namespace) -> None:
        self.options = options
        self.device = torch.device("cuda", 0) if options.device == "cuda" else torch.device(options.device)
        self.is_cuda = self.device.type == "cuda"
        self.is_short = options.seconds < SHORT_SECONDS
        self.tiny: bool = options.tiny
        self.section = ""
        self.results: dict[str, Any] = {"checks": {}, "failed": {}, "skipped": {}}
        self._deadline: float = time.monotonic() + options.seconds

    @cached_property
    def pair(self) -> Pair:
        """The target and draft of the timings, made on first use."""
        dtype = torch.bfloat16 if self.is_cuda else torch.float32
        pair = make_pair(self.options.target, self.options.draft, self.device, dtype, self.options.eps)
        self.say(f"made {pair.target_name} and {pair.draft_name} in {dtype}")
        return pair

    @cached_property
    def forms(self) -> dict[str, tuple[Any, Any]]:
        """The pair as it is given, and with ``optimize=True`` where that has an effect; by what the names add."""
        forms = {"": (self.pair.target, self.pair.draft)}
        try:
            engine = make_engine(*forms[""], "chain:4", 1, 256, optimize=True)
        except McsdError as error:
            self.results["skipped"]["timing: optimize=True"] = str(error)
            self.say(f"optimize=True not timed: {error}")
        else:
            forms[", optimize=True"] = engine.target, getattr(engine.drafter, "model", None)
        return forms

    @cached_property
    def bandwidth(self) -> float:
        """Bytes per second, read and written together, of a copy that is larger than any cache."""
        size = 2**31 if self.is_cuda else 2**26
        source = torch.ones(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2 * size / self.device_seconds(lambda: target.copy_(source), 10)

    @property
    def seconds_left(self) -> float:
        """Time until the limit."""
        return self._deadline - time.monotonic()

    @property
    def has_failed(self) -> bool:
        """Whether a check was wrong, or a section did not run to its end."""
        return not all(self.results["checks"].values()) or bool(self.results["failed"])

    def say(self, line: str) -> None:
        """Print a progress line."""
        print(f"[{self.section}] {line}", flush=True)

    def check(self, name: str, is_right: bool, detail: str) -> None:
        """Record a check of correctness."""
        self.results["checks"][f"{self.section}: {name}"] = bool(is_right)
        self.say(f"{'ok' if is_right else 'WRONG'}: {name}: {detail}")

    def save(self, tables: str) -> None:
        """Write the results and their tables to the output folder."""
        folder = Path(self.options.out)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RESULTS_FILE).write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        (folder / TABLES_FILE).write_text(tables, encoding="utf-8")

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def wall_seconds(self, function: Callable[[], object], repeats: int = 20) -> float:
        """The median duration of one call by the host's clock; the device is idle before and after it."""
        seconds = []
        for _ in range(repeats):
            self.synchronize()
            start = time.perf_counter()
            function()
            self.synchronize()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds)

    def device_seconds(self, function: Callable[[], object], repeats: int = 20) -> float:
        """The mean duration of one call in a queue of calls, by the device's clock."""
        function()
        if not self.is_cuda:
            return self.wall_seconds(function, repeats)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(repeats):
            function()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / repeats
