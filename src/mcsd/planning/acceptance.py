"""How often the b-th candidate is the accepted one, by depth: measured while the engine runs.

Sequoia (Chen et al. 2024, arXiv 2402.12374) calls this the acceptance vector. Under recursive rejection, and wherever
the target is sampled and looked up, it does not depend on how many candidates come after the b-th; under the other
schemes it holds for trees like the ones it was measured on.
"""

from collections.abc import Sequence
from functools import lru_cache

from mcsd.tree import TreeShape

DEPTH, RANKS = 8, 16
"""Levels and candidates that are told apart; beyond them the last one stands for the rest."""

Rates = tuple[tuple[float, ...], ...]
"""``[DEPTH][RANKS]``: the probability that, below an accepted node, the b-th child is the accepted one."""


class Acceptance:
    """A running estimate, which begins with what was believed before.

    Args:
        prior: the rates to begin with.
        weight: visits of a node that they count for.
        memory: visits of a level that are remembered: older ones fade, for texts change.
    """

    def __init__(self, prior: Rates, weight: float, memory: float) -> None:
        self._prior = prior
        self._weight = weight
        self._fade = 1 - 1 / memory
        self._visits = [[0.0] * RANKS for _ in range(DEPTH)]
        self._hits = [[0.0] * RANKS for _ in range(DEPTH)]

    def observe(self, shape: TreeShape, path: Sequence[int]) -> None:
        """Take in one judgement.

        Args:
            shape: the tree that was judged.
            path: the accepted nodes, from the root down.
        """
        ranks, counts = places(shape)
        column = 0
        for depth in range(shape.depth):
            level = min(depth, DEPTH - 1)
            visits, hits = self._visits[level], self._hits[level]
            judged = min(counts[column], RANKS)
            if not judged:
                return
            for rank in range(judged):
                visits[rank] = visits[rank] * self._fade + 1
                hits[rank] *= self._fade
            if depth == len(path):
                return
            hits[min(ranks[path[depth]], RANKS - 1)] += 1
            column = path[depth] + 1

    def rates(self) -> Rates:
        """The estimate now."""
        return tuple(self.level(depth, believed) for depth, believed in enumerate(self._prior))

    def level(self, depth: int, believed: Sequence[float]) -> tuple[float, ...]:
        """The estimate of one level, falling with the rank: the likeliest candidates come first, or are drawn so.

        Args:
            depth: of the level, from 0.
            believed: its rates, as far as it has not been seen.
        """
        weights = [self._weight + visits for visits in self._visits[depth]]
        sums = [self._weight * rate + hits for rate, hits in zip(believed, self._hits[depth], strict=True)]
        return _falling(sums, weights)


def _falling(sums: Sequence[float], weights: Sequence[float]) -> tuple[float, ...]:
    """The means ``sums / weights``, the nearest that do not rise: neighbours that do are averaged."""
    pools: list[tuple[float, float, int]] = []
    for total, weight in zip(sums, weights, strict=True):
        count = 1
        while pools and pools[-1][0] * weight < total * pools[-1][1]:
            before, heavy, many = pools.pop()
            total, weight, count = total + before, weight + heavy, count + many
        pools.append((total, weight, count))
    return tuple(total / weight for total, weight, count in pools for _ in range(count))


@lru_cache(maxsize=256)
def places(shape: TreeShape) -> tuple[list[int], list[int]]:
    """The place of each node among its siblings, and the number of children of each column."""
    ranks, counts = [], [0] * (1 + len(shape))
    for parent in shape.parents:
        ranks.append(counts[1 + parent])
        counts[1 + parent] += 1
    return ranks, counts


def falling(first: float, second: float) -> Rates:
    """Rates of a usual form, alike on all levels: the first, the second, each further one half of the one before."""
    return ((first, *(second * 0.5**rank for rank in range(RANKS - 1))),) * DEPTH
