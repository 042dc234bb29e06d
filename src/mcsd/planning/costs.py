"""What a step costs on this machine, in seconds, by its tree and the number of rows: interpolated measurements."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

Curve = tuple[tuple[int, float], ...]
"""``((tokens, seconds), ...)``, ascending: what a forward of so many tokens, of all rows together, takes."""


@dataclass(frozen=True)
class Costs:
    """Latencies.

    Attributes:
        target: of the target's forward.
        level: of drafting a level, by the nodes that the draft reads for it, of all rows together. Empty where
            drafting costs nothing.
        first: what the first level takes more, which reads what was committed.
        plain: of all else in a step without candidates: judging, committing, emitting.
        judged: of all else in a step with candidates; accepted: more of it for each accepted candidate.
    """

    target: Curve
    level: Curve
    first: float
    plain: float
    judged: float
    accepted: float

    def step(self, rows: int, nodes: int, inner: Sequence[int], tokens: float) -> float:
        """Seconds of one step.

        Args:
            rows: that run together.
            nodes: of the tree.
            inner: how many nodes with children each level has, the root being the first level; empty without a tree.
            tokens: that a row is expected to emit.
        """
        seconds = seconds_at(self.target, rows * (1 + nodes))
        if not inner:
            return seconds + self.plain
        if self.level:
            seconds += self.first + sum(seconds_at(self.level, rows * count) for count in inner)
        return seconds + self.judged + self.accepted * (tokens - 1)


@lru_cache(maxsize=4096)
def seconds_at(curve: Curve, tokens: int) -> float:
    """Interpolate; beyond the last point go on with the last slope."""
    if len(curve) == 1 or tokens <= curve[0][0]:
        return curve[0][1]
    place = min(bisect_left(curve, (tokens, 0.0)), len(curve) - 1)
    (low, before), (high, after) = curve[place - 1], curve[place]
    return before + (after - before) * (tokens - low) / (high - low)


def rising(points: Sequence[tuple[int, float]]) -> Curve:
    """Measured points as a curve that never falls: what more tokens have taken, fewer need not take longer than.

    Measurements are only ever too slow, so of two that contradict each other the slower one is wrong.
    """
    least, curve = float("inf"), []
    for tokens, seconds in sorted(points, reverse=True):
        least = min(least, seconds)
        curve.append((tokens, least))
    return tuple(reversed(curve))
