"""The tree that emits the most tokens a second, by acceptance and cost.

A node adds to the expected number of tokens the probability that its whole path is accepted: the product of the rates
along it. Rates fall from sibling to sibling and products fall along a path, so the n nodes of highest probability are a
tree, and no tree of n nodes (of limited depth, if depth is limited) is expected to emit more: what Sequoia (Chen et al.
2024, arXiv 2402.12374, section 3.2) finds by dynamic programming. What is left to choose is n and the depth, of which
time decides. Product trees and chains are among the trees that this can be, and so is none.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from mcsd.planning.acceptance import DEPTH, RANKS, Rates, places
from mcsd.planning.costs import Costs
from mcsd.tree import TreeShape

LARGEST = 63
"""Nodes of the largest tree that is looked at."""

PLAIN = TreeShape.parse("none")
"""No tree."""


@dataclass(frozen=True)
class Choice:
    """A tree and what is expected of it.

    Attributes:
        shape: the tree.
        tokens: that a step is expected to emit for each row.
        seconds: that a step takes.
    """

    shape: TreeShape
    tokens: float
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens a second, for each row."""
        return self.tokens / self.seconds


def best(
    rates: Rates,
    costs: Costs,
    rows: int,
    widest: int | None = None,
    deepest: int | None = None,
    speculative: bool = False,
) -> Choice:
    """The fastest tree, for so many rows.

    Args:
        rates: of acceptance.
        costs: of steps.
        rows: that run together.
        widest, deepest: children of a node and levels at most; None: as many as pay.
        speculative: whether it must have a candidate.
    """
    found: tuple[float, list[int], int] | None = None
    plain = expected(PLAIN, rates, costs, rows)
    fastest = 0.0 if speculative else plain.rate
    for depth in range(1, 1 + min(DEPTH, deepest or DEPTH)):
        parents: list[int] = []
        inner: list[int] = []
        tokens = 1.0
        for parent, level, probability, first in _by_probability(rates, depth, widest or RANKS):
            if first:
                # Its parent was a leaf until now.
                inner += [0] * (level - len(inner))
                inner[level - 1] += 1
            parents.append(parent)
            tokens += probability
            rate = tokens / costs.step(rows, len(parents), inner, tokens)
            if rate > fastest:
                fastest, found = rate, (tokens, parents, len(parents))
    if found is None:
        return plain
    tokens, parents, nodes = found
    return expected(TreeShape(parents[:nodes]), rates, costs, rows)


def expected(shape: TreeShape, rates: Rates, costs: Costs, rows: int) -> Choice:
    """What is expected of a tree."""
    products = [1.0]
    for parent, depth, rank in zip(shape.parents, shape.depths, places(shape)[0], strict=True):
        products.append(products[1 + parent] * rates[min(depth, DEPTH) - 1][min(rank, RANKS - 1)])
    tokens = sum(products)
    inner = [len(level) for level in shape.levels]
    return Choice(shape, tokens, costs.step(rows, len(shape), inner, tokens))


def _by_probability(rates: Rates, deepest: int, widest: int) -> Iterator[tuple[int, int, float, bool]]:
    """Nodes, the likeliest to be accepted first: parent, depth, probability, and whether it is a first child."""
    waiting = [(-rates[0][0], -1, 1, 0, 1.0)]
    for node in range(LARGEST):
        if not waiting:
            return
        probability, parent, depth, rank, above = heapq.heappop(waiting)
        yield parent, depth, -probability, rank == 0
        if rank + 1 < min(widest, RANKS):
            heapq.heappush(waiting, (-above * rates[depth - 1][rank + 1], parent, depth, rank + 1, above))
        if depth < deepest:
            heapq.heappush(waiting, (probability * rates[depth][0], node, depth + 1, 0, -probability))
