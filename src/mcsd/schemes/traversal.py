"""Traversal verification of a tree (Weng et al. 2025, arXiv 2505.12398)."""

import torch
from torch import Tensor

from mcsd.rng import Randomness
from mcsd.sampling import SparseDistributions
from mcsd.schemes.base import DrawsWithoutReplacement
from mcsd.schemes.candidates import Target, Verdict
from mcsd.schemes.residual import at, on_support, renormalised, subtract
from mcsd.schemes.whole import emit_after


class Traversal(DrawsWithoutReplacement):
    """From the leaves up: a leaf is accepted with its whole path, or deleted, and what is left of its parent goes on.

    α is 1 at the root and min(1, α p / q) of its parent at a child. The first leaf, depth first, is accepted with
    probability α; a token after it comes from its p. Otherwise, at its parent, with S = Σ (α p - q)₊: p becomes
    (α p - q)₊ / S, the leaf leaves q, and α becomes S / (S + 1 - α). A node without children left is a leaf. As nothing
    but acceptance ends this, all rows of a batch see the nodes in the same order.
    """

    name = "traversal"
    deepest = 256

    def _judge(self, target: Target, q: SparseDistributions, random: Randomness) -> Verdict:
        walk = _Walk(target, q, random)
        rows = (~target.tree.failed).nonzero()[:, 0]
        walk.visit(0, rows, torch.ones(len(rows), dtype=q.weights.dtype, device=rows.device))
        return emit_after(walk.column, walk.left, walk.changed, target, q, random)


class _Walk:
    """One judgement on its way: ``column``, ``left`` and ``changed`` are what `emit_after` wants to know."""

    def __init__(self, target: Target, q: SparseDistributions, random: Randomness) -> None:
        batch, _, size = q.weights.shape
        self._target, self._q, self._random = target, q, random
        self._children = [[kid for kid in kids if kid >= 0] for kids in target.tree.shape.children.tolist()]
        self._paths = target.tree.shape.paths.to(q.weights.device)
        self.column = torch.zeros(batch, dtype=torch.int64, device=q.weights.device)
        dtype = torch.promote_types(q.weights.dtype, target.logits.dtype)
        self.left = torch.zeros(batch, size + 1, dtype=dtype, device=q.weights.device)
        self.changed = torch.zeros_like(self.column, dtype=torch.bool)

    def visit(self, column: int, rows: Tensor, alpha: Tensor) -> Tensor:
        """Try the nodes below a node, then the node itself.

        Args:
            column: the node, root 0.
            rows: int64 ``[A]``, those that have accepted nothing yet; alpha: ``[A]``, theirs at the node.

        Returns:
            bool ``[A]``, whether a row has accepted something now.
        """
        accepted = torch.ones_like(rows, dtype=torch.bool)
        open_ = torch.arange(len(rows), device=rows.device)
        left, changed = self.left[rows], torch.zeros_like(accepted)
        kids = self._children[column]
        if kids:
            p, broken = self._target.after(
                torch.full_like(rows, column), self._paths[column].expand(len(rows), -1), rows
            )
            left, _ = on_support(p.nan_to_num(0.0), self._q.support[rows, column])
            q = self._q.weights[rows, column]
        for kid in kids:
            choice, there = self._target.tree.choice[rows, kid], self._target.tree.valid[rows, kid] & ~broken
            chance = (alpha * at(left, choice) / at(q, choice)).clamp(max=1.0).where(there, 0.0)
            on = ~self.visit(kid + 1, rows, chance)
            rows, open_, choice, there, broken = rows[on], open_[on], choice[on], there[on], broken[on]
            alpha, left, q, changed = alpha[on], left[on], q[on], changed[on]
            residual, mass = subtract(alpha[:, None] * left, q)
            some = there & (mass > 0)
            left, changed = torch.where(some[:, None], residual / mass[:, None], left), changed | some
            q = torch.where(there[:, None], renormalised(q.scatter(1, choice[:, None], 0.0)), q)
            if column:
                alpha = torch.where(there & (alpha < 1), mass / (mass + 1 - alpha), alpha)
        yes = self._random.accept(alpha, rows)
        self.column[rows[yes]], self.changed[rows[yes]] = column, changed[yes]
        self.left[rows[yes]] = left[yes].to(self.left.dtype)
        accepted[open_] = yes
        return accepted
