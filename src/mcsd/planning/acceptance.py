"""Acceptance rates by depth and rank of a candidate, estimated while the engine runs.

Sequoia (Chen et al. 2024, arXiv 2402.12374) calls them the acceptance vector. Under recursive rejection, and wherever
the target is sampled and matched, the rate of the b-th candidate does not depend on how many follow it; under the other
schemes the rates hold for trees like those they were measured on.
"""

from collections.abc import Sequence
from functools import lru_cache

from mcsd.tree import TreeShape

DEPTH, RANKS = 8, 16
"""Levels and ranks that are distinguished; deeper levels and higher ranks count as the last one."""

Rates = tuple[tuple[float, ...], ...]
"""``[DEPTH][RANKS]``: the probability that, below an accepted node, the b-th child is accepted."""


class AcceptanceEstimate:
    """A running estimate of acceptance rates that starts from a prior.

    Args:
        prior: the rates to start from.
        weight: visits of a node that the prior counts for.
        memory: visits of a level that are remembered; older ones fade, because texts change.
    """

    def __init__(self, prior: Rates, weight: float, memory: float) -> None:
        self._prior = prior
        self._weight = weight
        self._decay = 1 - 1 / memory
        self._visits = [[0.0] * RANKS for _ in range(DEPTH)]
        self._hits = [[0.0] * RANKS for _ in range(DEPTH)]

    def observe(self, shape: TreeShape, path: Sequence[int]) -> None:
        """Count one verification.

        Args:
            shape: the tree that was verified.
            path: the accepted nodes, from the root down.
        """
        ranks, counts = sibling_ranks(shape)
        column = 0
        for depth in range(shape.depth):
            level = min(depth, DEPTH - 1)
            visits, hits = self._visits[level], self._hits[level]
            verified = min(counts[column], RANKS)
            if not verified:
                return
            for rank in range(verified):
                visits[rank] = visits[rank] * self._decay + 1
                hits[rank] *= self._decay
            if depth == len(path):
                return
            hits[min(ranks[path[depth]], RANKS - 1)] += 1
            column = path[depth] + 1

    def rates(self) -> Rates:
        """The current estimate."""
        return tuple(self.level(depth, prior) for depth, prior in enumerate(self._prior))

    def level(self, depth: int, prior: Sequence[float]) -> tuple[float, ...]:
        """The estimate of one level, not rising with the rank, because more probable candidates tend to come first.

        Args:
            depth: of the level, from 0.
            prior: its rates before any visit.
        """
        weights = [self._weight + visits for visits in self._visits[depth]]
        sums = [self._weight * rate + hits for rate, hits in zip(prior, self._hits[depth], strict=True)]
        return _isotonic(sums, weights)


def _isotonic(sums: Sequence[float], weights: Sequence[float]) -> tuple[float, ...]:
    """Isotonic regression of the means ``sums / weights``: the closest sequence that does not rise."""
    pools: list[tuple[float, float, int]] = []
    for total, weight in zip(sums, weights, strict=True):
        count = 1
        while pools and pools[-1][0] * weight < total * pools[-1][1]:
            previous_total, previous_weight, previous_count = pools.pop()
            total, weight, count = total + previous_total, weight + previous_weight, count + previous_count
        pools.append((total, weight, count))
    return tuple(total / weight for total, weight, count in pools for _ in range(count))


@lru_cache(maxsize=256)
def sibling_ranks(shape: TreeShape) -> tuple[list[int], list[int]]:
    """The rank of each node among its siblings, and the number of children of each column (root first)."""
    ranks, counts = [], [0] * (1 + len(shape))
    for parent in shape.parents:
        ranks.append(counts[1 + parent])
        counts[1 + parent] += 1
    return ranks, counts


def geometric_rates(first: float, second: float) -> Rates:
    """Typical rates, equal on all levels: the first, the second, and each further one half of the previous."""
    return ((first, *(second * 0.5**rank for rank in range(RANKS - 1))),) * DEPTH
