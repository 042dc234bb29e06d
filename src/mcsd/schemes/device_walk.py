"""Node-level verification on a GPU: the host waits for nothing and copies nothing.

The same results as `mcsd.schemes.node_level`, number for number: every sequence draws the same random numbers whether
its verification goes on or has ended. Ended sequences are computed with the others and masked. They get a uniform
distribution, because an index beyond a vocabulary is an error from which a GPU does not recover.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from mcsd import ops
from mcsd.sampling import SparseDistributions
from mcsd.schemes.mixed_shape import looked_up
from mcsd.schemes.types import Node, TargetDistributions, VerificationResult, children_of


class _Walk:
    """The paths of a batch of trees.

    Attributes:
        active: bool ``[B]``, sequences whose verification goes on.
        column: int64 ``[B]``, the last accepted column.
        path: int64 ``[B, depth]``, the accepted nodes, padded with -1.
        token, failed: as in `VerificationResult`.
    """

    def __init__(self, target: TargetDistributions) -> None:
        tree = target.tree
        self._children = children_of(tree.shape, tree.failed.device)
        self.failed, self.active = tree.failed, ~tree.failed
        self.column = torch.zeros_like(tree.failed, dtype=torch.int64)
        self.token = self.column
        self.path = torch.full((len(self.column), tree.shape.depth), -1, device=self.column.device)
        self.widths = (*tree.shape.widths, 0)

    def fail(self, broken: Tensor) -> None:
        """End the active sequences that are ``broken [B]`` without a token."""
        self.failed, self.active = self.failed | (self.active & broken), self.active & ~broken

    def children(self, width: int) -> tuple[Tensor, Tensor]:
        """The first ``width`` children of each column: nodes ``[B, width]``, 0 where there is none, and which exist."""
        nodes = self._children[self.column][:, :width]
        return nodes.clamp(min=0), nodes >= 0

    def advance(self, level: int, nodes: Tensor, picked: Tensor, token: Tensor) -> None:
        """Each active sequence moves to the child ``picked [B]``, or ends with its token where that is -1."""
        moves = self.active & (picked >= 0)
        self.token = torch.where(self.active & ~moves, token, self.token)
        self.active = moves
        if nodes.shape[1]:
            node = nodes.gather(1, picked.clamp(min=0)[:, None])[:, 0]
            self.path[:, level] = torch.where(moves, node, -1)
            self.column = torch.where(moves, node + 1, self.column)

    def result(self) -> VerificationResult:
        """The result, once no sequence is active."""
        return VerificationResult(self.path, (self.path >= 0).sum(-1), self.token, self.failed)


def verify_nodes_on_device(
    target: TargetDistributions, verify_node: Callable[[Node], tuple[Tensor, Tensor]]
) -> VerificationResult:
    """`mcsd.schemes.node_level.verify_nodes` for a GPU."""
    tree, walk = target.tree, _Walk(target)
    rows = torch.arange(len(walk.column), device=walk.column.device)
    for level, width in enumerate(walk.widths):
        p, broken = target.after(walk.column, walk.path)
        walk.fail(broken)
        p = p.where(walk.active[:, None], 1 / p.shape[1])
        nodes, exists = walk.children(width)
        tokens, choice, valid = (part.gather(1, nodes) for part in (tree.tokens, tree.choice, tree.valid))
        q = SparseDistributions(tokens[:, :0], p[:, :0])
        if tree.q is not None and width:
            q = SparseDistributions(*(part[rows, walk.column] for part in (tree.q.support, tree.q.weights)))
        is_looked_up = looked_up(tree.mixed, level, walk.column)
        node = Node(p, tokens, valid & exists, exists.sum(-1), choice, q, rows, level, is_looked_up)
        picked, token = verify_node(node)
        walk.advance(level, nodes, picked, token)
    return walk.result()


def verify_greedy_on_device(target: TargetDistributions) -> VerificationResult:
    """`mcsd.schemes.node_level.verify_greedy` for a GPU."""
    tree, walk = target.tree, _Walk(target)
    rows = torch.arange(len(walk.column), device=walk.column.device)
    # Where logits do not depend on the tokens before (penalties), the argmax of all nodes is computed in one call.
    at_once = not target.sampling.any_penalties
    if at_once:
        values, best = (part.view(target.logits.shape[:2]) for part in ops.argmax(target.logits.flatten(0, 1)))
    for level, width in enumerate(walk.widths):
        if at_once:
            value, token = values[rows, walk.column], best[rows, walk.column]
        else:
            value, token = ops.argmax(target.logits_after(walk.column, walk.path))
        walk.fail(~value.isfinite())
        nodes, exists = walk.children(width)
        hit = (tree.tokens.gather(1, nodes) == token[:, None]) & tree.valid.gather(1, nodes) & exists
        first = torch.nn.functional.pad(hit, (0, 1), value=True).to(torch.int8).argmax(-1)
        walk.advance(level, nodes, first.masked_fill(first == width, -1), token)
    return walk.result()
