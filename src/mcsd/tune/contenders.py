"""Which trees and schemes are run against each other: those that measurements promise most of."""

from collections.abc import Iterator
from dataclasses import dataclass

from mcsd.planning import Profile
from mcsd.planning.search import LARGEST, PLAIN, Choice, best, expected
from mcsd.schemes import SCHEMES
from mcsd.tree import TreeShape

_COUNTS = (8, 6, 4, 3, 2, 1)
_LEVELS = 6
"""Of the product trees that are looked at: children of a node, and levels."""

_RIVALS = ("greedy-draft", "traversal", "block")
"""Schemes that have accepted more than the usual one somewhere."""


@dataclass(frozen=True)
class Entrant:
    """A scheme with a tree, in a race at one temperature.

    Attributes:
        scheme: its name.
        choice: the tree, and what is expected of it; of rivals of the scheme that was measured, by that scheme's rates.
    """

    scheme: str
    choice: Choice

    @property
    def name(self) -> str:
        """For people, and in the log."""
        tree = self.choice.shape
        return f"{self.scheme} {tree}" if len(tree) else str(tree)


def entrants(profile: Profile, scheme: str, temperature: float, draws: bool) -> list[Entrant]:
    """Plain decoding, the best chain, product tree and tree of any form, and other schemes with trees that they judge.

    Args:
        profile: what has been measured, with ``scheme``.
        scheme: the scheme that was asked for.
        temperature: of the race.
        draws: whether candidates are drawn; those that are not have only one scheme.
    """
    rates, costs = profile.sampled if temperature else profile.greedy, profile.costs
    law = SCHEMES[scheme]
    chain = best(rates, costs, 1, 1, law.deepest, speculative=True)
    tree = best(rates, costs, 1, law.widest, law.deepest, speculative=True)
    product = max(
        (expected(shape, rates, costs, 1) for shape in _products(law.widest or _COUNTS[0])), key=lambda one: one.rate
    )
    plain = expected(PLAIN, rates, costs, 1)
    found = [Entrant(scheme, choice) for choice in (plain, chain, product, tree)]
    # At temperature 0 all schemes are one.
    for rival in _RIVALS if temperature and draws else ():
        for choice in (tree, product, chain):
            if rival != scheme and SCHEMES[rival].judges(choice.shape):
                found.append(Entrant(rival, choice))
                break
    return list({entrant.name: entrant for entrant in found}.values())


def _products(widest: int) -> Iterator[TreeShape]:
    """Product trees whose levels grow no wider with depth."""

    def extended(counts: tuple[int, ...], width: int, nodes: int) -> Iterator[tuple[int, ...]]:
        for count in _COUNTS:
            larger = nodes + width * count
            if count <= (counts[-1] if counts else widest) and larger <= LARGEST:
                yield (*counts, count)
                if len(counts) + 1 < _LEVELS:
                    yield from extended((*counts, count), width * count, larger)

    for counts in extended((), 1, 0):
        yield TreeShape.parse("x".join(map(str, counts)))
