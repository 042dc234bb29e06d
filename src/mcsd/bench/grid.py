"""The systems of ``mcsd bench``: every tree with every scheme, and the baselines."""

from collections.abc import Collection, Sequence

from mcsd.bench.experiment import BASELINES, DRAFT, MULTI, NAIVE, PEER, PLAIN, SINGLE, TRANSFORMERS, TUNED, System
from mcsd.config import parse_tree
from mcsd.errors import InvalidOption

DEFAULT_SCHEME = "mcss-wor"

PLAIN_SYSTEM = System(PLAIN, "", "none", DEFAULT_SCHEME)

_CHAIN = 3
"""Depth of the one-candidate baseline where no tree gives a depth."""


def grid(
    trees: Sequence[str],
    schemes: Sequence[str],
    baselines: Sequence[str],
    tuned: bool = False,
    peers: Collection[str] = (),
) -> list[System]:
    """Systems in the order of their rows in a table.

    Args:
        trees: as `TreeShape.parse` reads them, or "auto"; "none" is plain decoding, which is there in any case.
        schemes: names in `mcsd.SCHEMES`.
        baselines: names in `BASELINES`. The one-candidate baseline is a chain as deep as the deepest tree.
        tuned: whether a second draft runs every tree too.
        peers: names of other programs.

    Raises:
        InvalidOption: an unknown baseline, a peer with the name of another system, or two trees of one name.
        InvalidTree, UnknownScheme: an unknown tree or scheme, or a scheme that does not support a tree.
    """
    for baseline in baselines:
        if baseline not in BASELINES:
            raise InvalidOption(f"baseline {baseline!r:.40} is unknown", f"some of {', '.join(BASELINES)}")
    trees = [tree for tree in trees if tree != "none"]
    shapes = [parse_tree(scheme, tree) for tree in trees for scheme in schemes]
    systems = [PLAIN_SYSTEM]
    systems += [System(baseline) for baseline in TRANSFORMERS if baseline in baselines]
    if SINGLE in baselines:
        depth = max((shape.depth for shape in shapes if shape is not None), default=_CHAIN)
        systems.append(System(SINGLE, DRAFT, f"chain:{depth}", DEFAULT_SCHEME))
    for draft in (DRAFT, TUNED) if tuned else (DRAFT,):
        systems += [System(MULTI, draft, tree, scheme) for tree in trees for scheme in schemes]
    if NAIVE in baselines:
        systems += [System(NAIVE, DRAFT, tree, "naive") for tree in trees]
    return [*distinct(systems), *peer_systems(peers, systems)]


def peer_systems(peers: Collection[str], systems: Sequence[System]) -> list[System]:
    """Other programs, to run beside some systems.

    Raises:
        InvalidOption: a peer has the name of another system, or none.
    """
    for name in peers:
        if not name or name in {*BASELINES, *(system.name for system in systems)}:
            raise InvalidOption(f"peer {name!r:.40} has the name of another system, or none", "give it another name")
    return [System(PEER, "", peer=name) for name in peers]


def distinct(systems: Sequence[System]) -> list[System]:
    """The first of each name: a tree that was asked for may be a baseline too.

    Raises:
        InvalidOption: two different trees have the same name, which files of the same name do.
    """
    named: dict[str, System] = {}
    for system in systems:
        same = named.setdefault(system.name, system)
        if system.tree and parse_tree(system.scheme, system.tree) != parse_tree(same.scheme, same.tree):
            raise InvalidOption(
                f"trees {same.tree!r:.40} and {system.tree!r:.40} have the same name", "rename one of the files"
            )
    return list(named.values())
