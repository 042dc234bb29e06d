"""The duration of a step on this machine, by its tree and batch size, interpolated between measurements."""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

Curve = tuple[tuple[int, float], ...]
"""``((tokens, seconds), ...)``, ascending: the duration of a forward by its tokens, those of all sequences together."""


@dataclass(frozen=True)
class StepCosts:
    """Latencies in seconds.

    Attributes:
        target: of a forward of the target.
        level: of drafting a level, by the nodes that the draft reads for it, of all sequences together. Empty if
            drafting costs nothing.
        first: extra time of the first level, which reads the tokens committed since the last draft.
        plain: of the rest of a step without candidates: verification, commit, emission.
        verified: of the rest of a step with candidates; accepted: extra time per accepted candidate.
    """

    target: Curve
    level: Curve
    first: float
    plain: float
    verified: float
    accepted: float

    def step(self, batch_size: int, nodes: int, inner: Sequence[int], tokens: float) -> float:
        """The duration of a step.

        Args:
            batch_size: sequences that run together.
            nodes: of the tree.
            inner: nodes with children per level, the root being the first level; empty without a tree.
            tokens: expected to be emitted per sequence.
        """
        seconds = seconds_at(self.target, batch_size * (1 + nodes))
        if not inner:
            return seconds + self.plain
        if self.level:
            seconds += self.first + sum(seconds_at(self.level, batch_size * count) for count in inner)
        return seconds + self.verified + self.accepted * (tokens - 1)


@lru_cache(maxsize=4096)
def seconds_at(curve: Curve, tokens: int) -> float:
    """Interpolate linearly; beyond the last point, extrapolate with the last slope."""
    if len(curve) == 1 or tokens <= curve[0][0]:
        return curve[0][1]
    place = min(bisect_left(curve, (tokens, 0.0)), len(curve) - 1)
    (low, before), (high, after) = curve[place - 1], curve[place]
    return before + (after - before) * (tokens - low) / (high - low)


def monotone_curve(points: Sequence[tuple[int, float]]) -> Curve:
    """Measurements as a curve that never falls: fewer tokens take at most the time of more tokens.

    Noise only ever slows a measurement down, so of two contradicting points the slower one is wrong.
    """
    minimum, curve = float("inf"), []
    for tokens, seconds in sorted(points, reverse=True):
        minimum = min(minimum, seconds)
        curve.append((tokens, minimum))
    return tuple(reversed(curve))
