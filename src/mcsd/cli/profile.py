"""Where the time of a step goes, and how far its forwards are from what memory allows."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

from mcsd.cli.output import columns
from mcsd.params import Chunk

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
        weight_bytes: weights that its forwards cannot do without; 0 where there are none.
        cache_bytes: keys and values of the text before the step, which they read too.
        least: seconds in which memory delivers both.
    """

    name: str
    seconds: float
    weight_bytes: float
    cache_bytes: float
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
        self._before, self._levels = engine.seconds, engine.levels

    def profile(self, chunks: Sequence[Chunk]) -> Profile:
        """The steps of the one request that has run since, of which these are all chunks."""
        engine, steps = self._engine, len(chunks)
        after, rate = engine.seconds, bandwidth(engine.target.device)
        tokens = _tokens_before(chunks)
        # A draft reads its weights, and what it keeps of the text, once for each level of the tree.
        levels = (engine.levels - self._levels) / steps
        weights = getattr(engine.target, "weight_bytes", 0)
        reads = dict.fromkeys(("draft", "target", "judge", "commit", "other"), (0.0, 0.0))
        reads["draft"] = levels * engine.drafter.weight_bytes, levels * engine.drafter.token_bytes * tokens
        reads["target"] = weights, engine.token_bytes * tokens
        parts = [
            Part(name, (after[name] - self._before[name]) / steps, *both, sum(both) / rate)
            for name, both in reads.items()
        ]
        return Profile(steps, rate, tuple(parts))


def _tokens_before(chunks: Sequence[Chunk]) -> float:
    """Tokens that caches hold when a step begins, on average: all of the text but the last one."""
    done = chunks[-1].completion
    assert done is not None
    lengths = accumulate((len(chunk.token_ids) for chunk in chunks[:-1]), initial=done.stats.prompt_tokens - 1)
    return sum(lengths) / len(chunks)


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
        ("PART", "MS", "SHARE", "WEIGHTS", "KEYS AND VALUES", "MEMORY ALONE", "TIMES THAT"),
        *(_row(part, total) for part in profile.parts),
    ]
    return [
        f"{profile.steps} steps of {1e3 * total:.1f} ms; memory gives {profile.bandwidth / 1e9:.1f} GB/s",
        *(f"  {line}" for line in columns(rows)),
    ]


def _row(part: Part, total: float) -> tuple[str, ...]:
    share = part.seconds / total if total else 0.0
    memory = ("", "", "", "")
    if part.least:
        sizes = (f"{part.weight_bytes / 1e6:.0f} MB", f"{part.cache_bytes / 1e6:.1f} MB")
        memory = (*sizes, f"{1e3 * part.least:.1f} ms", f"{part.seconds / part.least:.1f}")
    return (part.name, f"{1e3 * part.seconds:.2f}", f"{share:.1%}", *memory)
