"""The verification schemes by name: where each is implemented and which trees it supports. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from mcsd.errors import InvalidTree
from mcsd.tree import TreeShape


@dataclass(frozen=True)
class SchemeEntry:
    """Where a scheme is implemented, and its limits.

    Attributes:
        module, class_name: of the `mcsd.schemes.base.Scheme` subclass.
        max_width: the most children of a node; None for any number.
        max_depth: the deepest tree; None for any depth.
        tree_level: whether trees are verified as a whole, which looked-up candidates beside drawn ones are not.
    """

    module: str
    class_name: str
    max_width: int | None = None
    max_depth: int | None = None
    tree_level: bool = False


REGISTRY: Mapping[str, SchemeEntry] = MappingProxyType(
    {
        "mcss-wor": SchemeEntry("mcsd.schemes.recursive", "McssWithoutReplacement"),
        "mcss": SchemeEntry("mcsd.schemes.recursive", "Mcss"),
        "naive": SchemeEntry("mcsd.schemes.naive", "Naive"),
        "top-k": SchemeEntry("mcsd.schemes.naive", "TopK"),
        "greedy-draft": SchemeEntry("mcsd.schemes.greedy_draft", "GreedyDraft"),
        "k-seq": SchemeEntry("mcsd.schemes.kseq", "KSeq"),
        "spechub": SchemeEntry("mcsd.schemes.spechub", "SpecHub", max_width=2),
        "block": SchemeEntry("mcsd.schemes.block", "BlockVerification", max_width=1, tree_level=True),
        "traversal": SchemeEntry("mcsd.schemes.traversal", "Traversal", max_depth=256, tree_level=True),
    }
)


def check_tree(name: str, shape: TreeShape) -> None:
    """Check that a scheme supports a tree.

    Args:
        name: a key of `REGISTRY`.
        shape: the tree.

    Raises:
        InvalidTree: a node has more children than the scheme supports, or the tree is too deep for it.
    """
    scheme = REGISTRY[name]
    if scheme.max_depth is not None and shape.depth > scheme.max_depth:
        raise InvalidTree(
            f"scheme {name} supports trees of depth {scheme.max_depth}, and tree {shape!s:.80} has depth {shape.depth}",
            "give a shallower tree, or another scheme",
        )
    if scheme.max_width is not None and shape.width > scheme.max_width:
        limit = "chains" if scheme.max_width == 1 else f"up to {scheme.max_width} candidates for a position"
        raise InvalidTree(
            f"scheme {name} supports {limit}, and tree {shape!s:.80} has up to {shape.width}",
            f"give a narrower tree, such as {'chain:4' if scheme.max_width == 1 else '2x2x1'}, or another scheme",
        )


def supports(name: str, shape: TreeShape) -> bool:
    """Whether `check_tree` accepts a tree."""
    try:
        check_tree(name, shape)
    except InvalidTree:
        return False
    return True
