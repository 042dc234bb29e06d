"""The tree with the highest expected tokens per second, by acceptance rates and step costs.

A node adds to the expected number of tokens the probability that its whole path is accepted: the product of the rates
along it. Rates fall from sibling to sibling and products fall along a path, so the n most probable nodes form a tree,
and no tree of n nodes (within a depth limit) is expected to emit more: the result of Sequoia's dynamic programming
(Chen et al. 2024, arXiv 2402.12374, section 3.2). Only n and the depth remain to be searched, by time. Product trees,
chains and the empty tree are among the results.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass

from mcsd.planning.acceptance import DEPTH, RANKS, Rates, sibling_ranks
from mcsd.planning.costs import StepCosts
from mcsd.tree import PLAIN, TreeShape

MAX_NODES = 63
"""Nodes of the largest tree that is considered."""


@dataclass(frozen=True)
class TreeChoice:
    """A tree and its expected speed.

    Attributes:
        shape: the tree.
        tokens: expected to be emitted per step and sequence.
        seconds: expected duration of a step.
    """

    shape: TreeShape
    tokens: float
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second and sequence."""
        return self.tokens / self.seconds


def best_tree(
    rates: Rates,
    costs: StepCosts,
    batch_size: int,
    max_width: int | None = None,
    max_depth: int | None = None,
    speculative: bool = False,
) -> TreeChoice:
    """The fastest tree for a batch size.

    Args:
        rates: acceptance rates.
        costs: of steps.
        batch_size: sequences that run together.
        max_width, max_depth: limits of the tree, for example of the scheme; None: no limit.
        speculative: exclude plain decoding.
    """
    found: tuple[list[int], int] | None = None
    plain = expected_speed(PLAIN, rates, costs, batch_size)
    fastest = 0.0 if speculative else plain.rate
    for depth in range(1, 1 + min(DEPTH, max_depth or DEPTH)):
        parents: list[int] = []
        inner: list[int] = []
        tokens = 1.0
        for parent, level, probability, first in _by_probability(rates, depth, max_width or RANKS):
            if first:
                # Its parent was a leaf until now.
                inner += [0] * (level - len(inner))
                inner[level - 1] += 1
            parents.append(parent)
            tokens += probability
            rate = tokens / costs.step(batch_size, len(parents), inner, tokens)
            if rate > fastest:
                fastest, found = rate, (parents, len(parents))
    if found is None:
        return plain
    parents, nodes = found
    return expected_speed(TreeShape(parents[:nodes]), rates, costs, batch_size)


def expected_speed(shape: TreeShape, rates: Rates, costs: StepCosts, batch_size: int) -> TreeChoice:
    """The expected speed of a tree."""
    products = [1.0]
    for parent, depth, rank in zip(shape.parents, shape.depths, sibling_ranks(shape)[0], strict=True):
        products.append(products[1 + parent] * rates[min(depth, DEPTH) - 1][min(rank, RANKS - 1)])
    tokens = sum(products)
    inner = [len(level) for level in shape.levels]
    return TreeChoice(shape, tokens, costs.step(batch_size, len(shape), inner, tokens))


def _by_probability(rates: Rates, max_depth: int, max_width: int) -> Iterator[tuple[int, int, float, bool]]:
    """Nodes by falling probability of acceptance: parent, depth, probability, and whether it is a first child."""
    waiting = [(-rates[0][0], -1, 1, 0, 1.0)]
    for node in range(MAX_NODES):
        if not waiting:
            return
        probability, parent, depth, rank, above = heapq.heappop(waiting)
        yield parent, depth, -probability, rank == 0
        if rank + 1 < min(max_width, RANKS):
            heapq.heappush(waiting, (-above * rates[depth - 1][rank + 1], parent, depth, rank + 1, above))
        if depth < max_depth:
            heapq.heappush(waiting, (probability * rates[depth][0], node, depth + 1, 0, -probability))
