"""The tree that search finds, against every tree there is."""

import random
from collections.abc import Iterator
from itertools import pairwise

import pytest

from mcsd.planning.acceptance import DEPTH, RANKS, Rates
from mcsd.planning.costs import Curve, StepCosts, monotone_curve, seconds_at
from mcsd.planning.search import MAX_NODES, best_tree, expected_speed
from mcsd.tree import TreeShape

FREE: Curve = ((1, 0.0),)


def rates_of(*level: float) -> Rates:
    """The same at each depth."""
    return ((*level, *[0.0] * (RANKS - len(level))),) * DEPTH


def costs_of(
    target: Curve, level: Curve = (), first: float = 0.0, plain: float = 0.0, verified: float = 0.0
) -> StepCosts:
    return StepCosts(target, level, first, plain, verified, 0.0)


def every_tree(nodes: int) -> Iterator[TreeShape]:
    """All trees of up to so many nodes, siblings in order: each node's parent is the root or an earlier node."""

    def extended(parents: list[int]) -> Iterator[list[int]]:
        yield parents
        if len(parents) < nodes:
            for parent in range(-1, len(parents)):
                yield from extended([*parents, parent])

    yield from {TreeShape(parents) for parents in extended([])}


@pytest.mark.parametrize("seed", range(20))
def test_no_tree_is_better(seed: int) -> None:
    rng = random.Random(seed)
    rates = tuple(tuple(sorted((rng.random() * 0.4 for _ in range(RANKS)), reverse=True)) for _ in range(DEPTH))
    # A level costs the same however many nodes it has: then the search is exact.
    slope = rng.random() * 0.1
    target = monotone_curve([(tokens, 1 + slope * max(0, tokens - 4)) for tokens in (1, 4, 8, 64)])
    costs = costs_of(target, ((1, rng.random() * 0.3),), first=0.05, verified=0.02)
    found = best_tree(rates, costs, 1)
    rivals = [expected_speed(shape, rates, costs, 1) for shape in every_tree(6)]
    assert max(rival.rate for rival in rivals) <= found.rate * (1 + 1e-9)
    if len(found.shape) <= 6:
        assert found.rate == pytest.approx(max(rival.rate for rival in rivals))
    assert expected_speed(found.shape, rates, costs, 1) == found


def test_expected_tokens_and_seconds_by_hand() -> None:
    rates = rates_of(0.5, 0.2)
    costs = StepCosts(((1, 1.0), (4, 1.0), (8, 2.0)), ((1, 0.1), (2, 0.3)), 0.05, 0.01, 0.02, 0.001)
    choice = expected_speed(TreeShape.parse("2x1"), rates, costs, 1)
    assert choice.tokens == pytest.approx(1 + 0.7 + 0.7 * 0.5)
    # Five tokens go through the target; the second level reads two nodes.
    assert choice.seconds == pytest.approx(1.25 + 0.05 + 0.1 + 0.3 + 0.02 + 0.001 * (choice.tokens - 1))
    plain = expected_speed(TreeShape.parse("none"), rates, costs, 1)
    assert (plain.tokens, plain.seconds) == (1.0, pytest.approx(1.01))


def test_nothing_pays_when_nothing_is_accepted() -> None:
    costs = costs_of(((1, 1.0), (64, 1.0)), ((1, 0.1),))
    assert best_tree(rates_of(0.05), costs, 1).shape == TreeShape.parse("none")
    assert len(best_tree(rates_of(0.05), costs, 1, speculative=True).shape) > 0
    assert len(best_tree(rates_of(0.2), costs, 1).shape) > 0


def test_limits_are_kept() -> None:
    costs = costs_of(((1, 1.0), (64, 1.0)))
    rates = rates_of(0.6, 0.2, 0.1)
    assert best_tree(rates, costs, 1, max_width=1).shape == TreeShape.parse(f"chain:{DEPTH}")
    assert best_tree(rates, costs, 1, max_depth=1).shape.depth == 1
    assert best_tree(rates, costs, 1, max_width=2).shape.children.shape[1] == 2
    assert len(best_tree(rates, costs, 1).shape) == MAX_NODES


def test_the_tree_shrinks_as_the_batch_grows() -> None:
    # Sixteen tokens for the price of one, then linear.
    costs = costs_of(((1, 1.0), (16, 1.0), (32, 2.0)))
    sizes = [len(best_tree(rates_of(0.5, 0.2, 0.1), costs, rows).shape) for rows in (1, 2, 4, 8, 16)]
    assert sizes[0] >= 15
    assert all(few >= many for few, many in pairwise(sizes))
    assert sizes[-1] < sizes[0]


def test_curves() -> None:
    curve = monotone_curve([(8, 2.0), (1, 1.0), (4, 0.5)])
    assert curve == ((1, 0.5), (4, 0.5), (8, 2.0))
    assert [seconds_at(curve, tokens) for tokens in (1, 2, 4, 6, 8, 16)] == [0.5, 0.5, 0.5, 1.25, 2.0, 5.0]
    assert seconds_at(FREE, 50) == 0.0
