"""The shape of a candidate tree: named before a token is drafted. Knows no tokens and no models.

Nodes 0 ... n-1 are candidates in order of depth. The root, which is the last committed token, is not one of them and
is written -1 in `parents`. Tensors that include the root put it first: column 0 is the root, column 1 + i is node i.
Torch is imported only by the properties that give tensors.
"""

import json
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from mcsd.errors import InvalidTree

if TYPE_CHECKING:
    from torch import Tensor

MAX_NODES = 1024

_HINT = "give level counts such as 4x2x1, chain:4, none, auto, or a JSON file with a list of parents"


class TreeShape:
    """An immutable tree of candidates.

    Args:
        parents: the parent of each node, -1 for the root. Nodes may come in any order in which a parent comes
            before its children; they are renumbered by depth and parent, siblings keeping their order.
        name: how the shape is printed; by default its level counts if it is a product tree, else its parents.

    Raises:
        InvalidTree: a parent does not come before its child, or there are more than `MAX_NODES` nodes.
    """

    def __init__(self, parents: Sequence[int], name: str | None = None) -> None:
        if len(parents) > MAX_NODES:
            raise InvalidTree(f"a tree of {len(parents)} nodes: at most {MAX_NODES} are allowed", _HINT)
        depths: list[int] = []
        for node, parent in enumerate(parents):
            if not isinstance(parent, int) or isinstance(parent, bool) or not -1 <= parent < node:
                raise InvalidTree(f"node {node} has parent {parent!r:.40}: not -1 (the root) or an earlier node", _HINT)
            depths.append(1 if parent < 0 else depths[parent] + 1)
        # Within a depth by parent, so that equal trees get equal numbers however they were written.
        levels: list[list[int]] = [[] for _ in range(max(depths, default=0))]
        for node, depth in enumerate(depths):
            levels[depth - 1].append(node)
        order: list[int] = []
        renumbered = {-1: -1}
        for level in levels:
            for node in sorted(level, key=lambda node: renumbered[parents[node]]):
                renumbered[node] = len(order)
                order.append(node)
        self.parents: tuple[int, ...] = tuple(renumbered[parents[old]] for old in order)
        self.depths: tuple[int, ...] = tuple(depths[old] for old in order)
        self._name = name

    @classmethod
    def parse(cls, text: "str | Path | Sequence[int] | TreeShape") -> "TreeShape":
        """Read a shape.

        Args:
            text: level counts ``4x2x2x1`` (each node at depth d has k_d children: the paper's k-config),
                ``chain:4``, ``none`` (plain decoding), ``parents:-1,-1,0``, a JSON file that contains
                ``{"parents": [...]}`` or a bare list, a list of parents, or a shape, which is returned unchanged.

        Raises:
            InvalidTree: ``text`` is none of these, or the tree is too large.
        """
        if isinstance(text, TreeShape):
            return text
        if isinstance(text, Path) or (isinstance(text, str) and text.endswith(".json")):
            return cls._read(Path(text))
        if isinstance(text, Sequence) and not isinstance(text, str):
            return cls(text)
        if not isinstance(text, str):
            raise InvalidTree(f"tree {text!r:.80} is not a tree", _HINT)
        if text == "none":
            return cls((), text)
        if re.fullmatch(r"parents:(-1|[0-9]{1,5})(,(-1|[0-9]{1,5}))*", text):
            return cls([int(parent) for parent in text.removeprefix("parents:").split(",")])
        if re.fullmatch(r"chain:[0-9]{1,9}", text):
            counts = [1] * min(int(text[6:]), MAX_NODES + 1)
        elif re.fullmatch(r"[0-9]{1,9}(x[0-9]{1,9})*", text):
            counts = [int(count) for count in text.split("x")]
        else:
            raise InvalidTree(f"tree {text!r:.80} is not a tree", _HINT)
        return cls._product(counts, text)

    @classmethod
    def _product(cls, counts: list[int], name: str) -> "TreeShape":
        if not counts or min(counts) < 1:
            raise InvalidTree(f"tree {name!r:.80} has a level without candidates", _HINT)
        total, width = 0, 1
        for count in counts:
            width *= count
            total += width
            if total > MAX_NODES:
                raise InvalidTree(f"tree {name!r:.80} has more than {MAX_NODES} nodes", _HINT)
        parents: list[int] = []
        level = [-1]
        for count in counts:
            start = len(parents)
            parents += [parent for parent in level for _ in range(count)]
            level = list(range(start, len(parents)))
        return cls(parents, name)

    @classmethod
    def _read(cls, path: Path) -> "TreeShape":
        try:
            data = json.loads(path.read_text())
        except (OSError, ValueError, RecursionError) as error:
            raise InvalidTree(f"tree file {str(path)!r:.200} cannot be read: {error!r:.200}", _HINT) from error
        parents = data.get("parents") if isinstance(data, dict) else data
        if not isinstance(parents, list):
            raise InvalidTree(f"tree file {str(path)!r:.200} holds no list of parents", _HINT)
        return cls(parents, path.name)

    def __len__(self) -> int:
        return len(self.parents)

    def __str__(self) -> str:
        if self._name is not None:
            return self._name
        if not self.parents:
            return "none"
        counts = self._counts()
        if counts is None:
            return "parents:" + ",".join(map(str, self.parents))
        return f"chain:{len(counts)}" if len(counts) > 1 and max(counts) == 1 else "x".join(map(str, counts))

    def _counts(self) -> list[int] | None:
        """Children of a node, level by level, if equal for all nodes of a level."""
        levels: list[set[int]] = [set() for _ in range(1 + self.depth)]
        for children, depth in zip(self._child_lists, (0, *self.depths), strict=True):
            levels[depth].add(len(children))
        return None if any(len(level) > 1 for level in levels) else [min(level) for level in levels[:-1]]

    def __repr__(self) -> str:
        return f"TreeShape({self})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TreeShape) and self.parents == other.parents

    def __hash__(self) -> int:
        return hash(self.parents)

    @property
    def depth(self) -> int:
        """Depth of the deepest node; 0 for plain decoding."""
        return self.depths[-1] if self.depths else 0

    @property
    def width(self) -> int:
        """The most children of a node; 0 for plain decoding."""
        return max(self.widths, default=0)

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """The most children of a node, for each entry of `levels`."""
        return tuple(max(len(self._child_lists[1 + node]) for node in level) for level in self.levels)

    @cached_property
    def levels(self) -> tuple[tuple[int, ...], ...]:
        """The inner nodes (those with children) by depth: entry d holds those at depth d; entry 0 is ``(-1,)``.

        A drafter runs one forward a level and none for leaves. Empty for plain decoding.
        """
        levels: list[list[int]] = [[] for _ in range(self.depth)]
        for node in sorted(set(self.parents)):
            levels[0 if node < 0 else self.depths[node]].append(node)
        return tuple(map(tuple, levels))

    def to_depth(self, depth: int) -> "TreeShape":
        """The nodes of the first ``depth`` levels, with the same numbers."""
        return (
            self
            if depth >= self.depth
            else TreeShape([p for p, d in zip(self.parents, self.depths, strict=True) if d <= depth])
        )

    @cached_property
    def _child_lists(self) -> list[list[int]]:
        """The children of each column."""
        lists: list[list[int]] = [[] for _ in range(1 + len(self))]
        for node, parent in enumerate(self.parents):
            lists[1 + parent].append(node)
        return lists

    @cached_property
    def children(self) -> "Tensor":
        """int64 ``[1 + n, width]``: the children of each column, padded with -1."""
        import torch

        table = [children + [-1] * (self.width - len(children)) for children in self._child_lists]
        return torch.tensor(table, dtype=torch.int64).view(1 + len(self), self.width)

    @cached_property
    def paths(self) -> "Tensor":
        """int64 ``[1 + n, depth]``: the nodes from the root to each column, its own included, padded with -1."""
        import torch

        paths = torch.full((1 + len(self), self.depth), -1, dtype=torch.int64)
        for node, parent in enumerate(self.parents):
            paths[1 + node] = paths[1 + parent]
            paths[1 + node, self.depths[node] - 1] = node
        return paths

    @cached_property
    def mask(self) -> "Tensor":
        """bool ``[1 + n, 1 + n]``: entry (i, j) is true if column j is i or an ancestor of i."""
        import torch

        mask = torch.eye(1 + len(self), dtype=torch.bool)
        for node, parent in enumerate(self.parents):
            mask[1 + node] |= mask[1 + parent]
        return mask

    @cached_property
    def offsets(self) -> "Tensor":
        """int64 ``[1 + n]``: depth of each column, to be added to the root's position."""
        import torch

        return torch.tensor([0, *self.depths], dtype=torch.int64)


PLAIN = TreeShape(())
"""The tree without candidates: plain decoding."""
