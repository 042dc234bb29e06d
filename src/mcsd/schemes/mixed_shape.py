"""The shape of a tree in which a chain of looked-up tokens hangs at the root, beside candidates that were drawn."""

from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from mcsd.tree import TreeShape


@dataclass(frozen=True)
class MixedShape:
    """A tree of drawn candidates and a chain.

    Attributes:
        drawn: the tree; it may be empty.
        chain: length of the chain, at least 1.
    """

    drawn: TreeShape
    chain: int

    @cached_property
    def shape(self) -> TreeShape:
        """Both together. The chain is the first node of each of the first ``chain`` depths."""
        shifted = [self.chain + parent if parent >= 0 else -1 for parent in self.drawn.parents]
        return TreeShape([*range(-1, self.chain - 1), *shifted])

    @cached_property
    def chain_columns(self) -> list[int]:
        """The columns of the root and of the chain."""
        return [0, *(1 + self.shape.depths.index(depth) for depth in range(1, 1 + self.chain))]

    @cached_property
    def drawn_nodes(self) -> list[int]:
        """For each node its number in the drawn tree; -1 for the chain."""
        # Both trees are numbered by depth and then by parent.
        numbers = iter(range(len(self.drawn)))
        return [-1 if 1 + node in self.chain_columns else next(numbers) for node in range(len(self.shape))]

    @cached_property
    def order(self) -> list[int]:
        """For each node its index among the chain's nodes and then the drawn ones."""
        chain = iter(range(self.chain))
        return [next(chain) if node < 0 else self.chain + node for node in self.drawn_nodes]

    def drawn_path(self, path: list[int]) -> list[int] | None:
        """Accepted nodes as nodes of the drawn tree; None if they were looked up."""
        nodes = [self.drawn_nodes[node] for node in path]
        return None if -1 in nodes else nodes


@cache
def order_of(mixed: MixedShape, device: torch.device) -> Tensor:
    """`MixedShape.order` on a device."""
    return torch.tensor(mixed.order, device=device)


def looked_up(mixed: MixedShape | None, level: int, columns: Tensor) -> Tensor | None:
    """Which of some nodes of a level, in these ``columns [A]``, have a child in the chain; None if none can."""
    return columns == mixed.chain_columns[level] if mixed and level < mixed.chain else None
