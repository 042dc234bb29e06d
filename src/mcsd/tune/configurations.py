"""The configurations that ``mcsd tune`` compares: trees and schemes that the cost model expects to be fast."""

from collections.abc import Iterator
from dataclasses import dataclass

from mcsd.planning import Profile
from mcsd.planning.search import MAX_NODES, TreeChoice, best_tree, expected_speed
from mcsd.schemes.registry import REGISTRY, supports
from mcsd.tree import PLAIN, TreeShape

_COUNTS = (8, 6, 4, 3, 2, 1)
_MAX_LEVELS = 6
"""Of product trees: children of a node, and levels."""

_ALTERNATIVES = ("greedy-draft", "traversal", "block")
"""Schemes that have accepted more than the default one in some setting."""


@dataclass(frozen=True)
class Configuration:
    """A scheme with a tree, in a comparison at one temperature.

    Attributes:
        scheme: its name.
        choice: the tree and its expected speed; of an alternative scheme, by the rates of the scheme that was measured.
    """

    scheme: str
    choice: TreeChoice

    @property
    def name(self) -> str:
        """As progress lines and the log have it."""
        tree = self.choice.shape
        return f"{self.scheme} {tree}" if len(tree) else str(tree)


def configurations(profile: Profile, scheme: str, temperature: float, is_sampled: bool) -> list[Configuration]:
    """Plain decoding; the best chain, product tree and tree of any shape; alternative schemes with a tree they support.

    Args:
        profile: measured with ``scheme``.
        scheme: the scheme that was asked for.
        temperature: of the comparison.
        is_sampled: whether candidates are sampled; if they are not, all schemes are the same.
    """
    rates, costs = profile.sampled if temperature else profile.greedy, profile.costs
    limits = REGISTRY[scheme]
    chain = best_tree(rates, costs, 1, 1, limits.max_depth, speculative=True)
    tree = best_tree(rates, costs, 1, limits.max_width, limits.max_depth, speculative=True)
    product = max(
        (expected_speed(shape, rates, costs, 1) for shape in _products(limits.max_width or _COUNTS[0])),
        key=lambda choice: choice.rate,
    )
    plain = expected_speed(PLAIN, rates, costs, 1)
    found = [Configuration(scheme, choice) for choice in (plain, chain, product, tree)]
    # At temperature 0 all schemes are the same.
    for alternative in _ALTERNATIVES if temperature and is_sampled else ():
        for choice in (tree, product, chain):
            if alternative != scheme and supports(alternative, choice.shape):
                found.append(Configuration(alternative, choice))
                break
    return list({configuration.name: configuration for configuration in found}.values())


def _products(max_width: int) -> Iterator[TreeShape]:
    """Product trees whose levels grow no wider with depth."""

    def extended(counts: tuple[int, ...], width: int, nodes: int) -> Iterator[tuple[int, ...]]:
        for count in _COUNTS:
            larger = nodes + width * count
            if count <= (counts[-1] if counts else max_width) and larger <= MAX_NODES:
                yield (*counts, count)
                if len(counts) + 1 < _MAX_LEVELS:
                    yield from extended((*counts, count), width * count, larger)

    for counts in extended((), 1, 0):
        yield TreeShape.parse("x".join(map(str, counts)))
