"""The systems of ``mcsd bench``: every tree with every scheme, and the baselines beside them."""

from collections.abc import Sequence

from mcsd.bench.experiment import ASSISTED, BASELINES, DRAFT, MULTI, NAIVE, PLAIN, SINGLE, TUNED, System
from mcsd.errors import InvalidOption
from mcsd.options import check_options

LOSSLESS = "mcss-wor"

PLAINLY = System(PLAIN, "", "none", LOSSLESS)

_CHAIN = 3
"""Depth of the one-candidate baseline where no tree says another."""


def grid(trees: Sequence[str], schemes: Sequence[str], baselines: Sequence[str], tuned: bool = False) -> list[System]:
    """Systems in the order of their rows in a table.

    Args:
        trees: as `TreeShape.parse` reads them, or "auto"; "none" is plain decoding, which is there in any case.
        schemes: names in `mcsd.SCHEMES`.
        baselines: names in `BASELINES`. The one-candidate baseline is a chain as deep as the deepest tree.
        tuned: whether a second draft runs every tree too.

    Raises:
        InvalidOption: a baseline that is none.
        InvalidTree, UnknownScheme: a tree or scheme that is none, or a scheme that cannot run a tree.
    """
    for baseline in baselines:
        if baseline not in BASELINES:
            raise InvalidOption(f"baseline {baseline!r:.40} is unknown", f"some of {', '.join(BASELINES)}")
    trees = [tree for tree in trees if tree != "none"]
    shapes = [check_options(scheme, tree, 1, 1) for tree in trees for scheme in schemes]
    systems = [PLAINLY]
    if ASSISTED in baselines:
        systems.append(System(ASSISTED))
    if SINGLE in baselines:
        depth = max((shape.depth for shape in shapes if shape is not None), default=_CHAIN)
        systems.append(System(SINGLE, DRAFT, f"chain:{depth}", LOSSLESS))
    for draft in (DRAFT, TUNED) if tuned else (DRAFT,):
        systems += [System(MULTI, draft, tree, scheme) for tree in trees for scheme in schemes]
    if NAIVE in baselines:
        systems += [System(NAIVE, DRAFT, tree, "naive") for tree in trees]
    return distinct(systems)


def distinct(systems: Sequence[System]) -> list[System]:
    """The first of each name: a tree that was asked for may be a baseline too."""
    named: dict[str, System] = {}
    for system in systems:
        named.setdefault(system.name, system)
    return list(named.values())
