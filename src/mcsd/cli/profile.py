"""Where the time of a step goes, and how far its forwards are from what memory allows."""

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mcsd.cli.output import columns
from mcsd.params import Completion

if TYPE_CHECKING:
    import torch

    from mcsd.engine import Engine

_BYTES = 1 << 28
"""Summed to see how fast memory is read: more than any cache of a processor holds."""


@dataclass(frozen=True)
class Part:
    """One part of an average step.

    Attributes:
        name: draft, target, judge, commit or other.
        seconds: of wall time.
        bytes_read: weights that its forwards cannot do without; 0 where there are none.
        least: seconds in which memory delivers those.
    """

    name: str
    seconds: float
    bytes_read: int
    least: float


@dataclass(frozen=True)
class Profile:
    """An average step.

    Attributes:
        steps: how many were measured.
        bandwidth: of memory, bytes a second.
        parts: of the step.
    """

    steps: int
    bandwidth: float
    parts: tuple[Part, ...]


class Profiler:
    """Measures an engine's steps from its making on.

    Args:
        engine: that nothing else uses meanwhile.
    """

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._before = engine.seconds

    def profile(self, done: Completion) -> Profile:
        """The steps of the one request that has run since."""
        engine, steps = self._engine, max(1, done.stats.target_calls)
        after, rate = engine.seconds, bandwidth(engine.target.device)
        # A draft reads its weights once for each level of the tree.
        reads = dict.fromkeys(("draft", "target", "judge", "commit", "other"), 0)
        reads["draft"] = engine.drafter.weight_bytes * engine.tree.depth
        reads["target"] = getattr(engine.target, "weight_bytes", 0)
        parts = [
            Part(name, (after[name] - self._before[name]) / steps, size, size / rate) for name, size in reads.items()
        ]
        return Profile(steps, rate, tuple(parts))


def bandwidth(device: "torch.device | str") -> float:
    """Bytes a second that a plain sum reads, the best of several."""
    import torch

    block = torch.ones(_BYTES // 4, dtype=torch.float32, device=device)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        block.sum().item()
        seconds.append(time.perf_counter() - start)
    return _BYTES / min(seconds)


def table(profile: Profile) -> list[str]:
    """A profile as people read it, a line an entry."""
    total = sum(part.seconds for part in profile.parts)
    rows = [
        ("PART", "MS", "SHARE", "READS", "MEMORY ALONE", "TIMES THAT"),
        *(_row(part, total) for part in profile.parts),
    ]
    return [
        f"{profile.steps} steps of {1e3 * total:.1f} ms; memory gives {profile.bandwidth / 1e9:.1f} GB/s",
        *(f"  {line}" for line in columns(rows)),
    ]


def _row(part: Part, total: float) -> tuple[str, ...]:
    share = part.seconds / total if total else 0.0
    memory = ("", "", "")
    if part.least:
        times = part.seconds / part.least
        memory = (f"{part.bytes_read / 1e6:.0f} MB", f"{1e3 * part.least:.1f} ms", f"{times:.1f}")
    return (part.name, f"{1e3 * part.seconds:.2f}", f"{share:.1%}", *memory)
