"""Traversal verification of a tree (Weng et al. 2025, arXiv 2505.12398)."""

import torch
from torch import Tensor

from mcsd.rng import Randomness
from mcsd.sampling import SparseDistributions
from mcsd.schemes.base import DrawsWithoutReplacement
from mcsd.schemes.residual import at, on_support, renormalised, subtract
from mcsd.schemes.tree_level import emit_token
from mcsd.schemes.types import TargetDistributions, VerificationResult, paths_of


class Traversal(DrawsWithoutReplacement):
    """From the leaves up: a leaf is accepted with its whole path, or deleted and its parent's p and q updated.

    α is 1 at the root and min(1, α p / q) of its parent at a child. The first leaf, depth first, is accepted with
    probability α; a token after it comes from its p. Otherwise, at its parent, with S = Σ (α p - q)₊: p becomes
    (α p - q)₊ / S, the leaf leaves q, and α becomes S / (S + 1 - α). A node without remaining children is a leaf. All
    sequences of a batch visit all nodes, those that have accepted one too.
    """

    name = "traversal"

    def _verify(self, target: TargetDistributions, q: SparseDistributions, random: Randomness) -> VerificationResult:
        verification = _BottomUpVerification(target, q, random)
        verification.visit(0, ~target.tree.failed, torch.ones_like(q.weights[:, 0, 0]))
        return emit_token(verification.column, verification.residual, verification.changed, target, q, random)


class _BottomUpVerification:
    """The state of one verification: ``column``, ``residual`` and ``changed`` are the arguments of `emit_token`."""

    def __init__(self, target: TargetDistributions, q: SparseDistributions, random: Randomness) -> None:
        batch, _, size = q.weights.shape
        self._target, self._q, self._random = target, q, random
        self._children = [[node for node in nodes if node >= 0] for nodes in target.tree.shape.children.tolist()]
        self._paths = paths_of(target.tree.shape, q.weights.device)
        self.column = torch.zeros(batch, dtype=torch.int64, device=q.weights.device)
        dtype = torch.promote_types(q.weights.dtype, target.logits.dtype)
        self.residual = torch.zeros(batch, size + 1, dtype=dtype, device=q.weights.device)
        self.changed = torch.zeros_like(self.column, dtype=torch.bool)

    def visit(self, column: int, undecided: Tensor, alpha: Tensor) -> Tensor:
        """Try the nodes below a node, then the node itself.

        Args:
            column: the node, root 0.
            undecided: bool ``[B]``, the sequences that have accepted nothing yet; alpha: ``[B]``, their α at the node.

        Returns:
            bool ``[B]``, whether a sequence has accepted a node now.
        """
        tree, before = self._target.tree, undecided
        r, changed = self.residual, torch.zeros_like(undecided)
        children = self._children[column]
        if children:
            path = self._paths[column].expand(len(undecided), -1)
            p, broken = self._target.after(torch.full_like(self.column, column), path)
            r, _ = on_support(p.nan_to_num(0.0), self._q.support[:, column])
            q = self._q.weights[:, column]
        for child in children:
            choice, valid = tree.choice[:, child], tree.valid[:, child] & ~broken
            child_alpha = (alpha * at(r, choice) / at(q, choice)).clamp(max=1.0).where(valid, 0.0)
            undecided = undecided & ~self.visit(child + 1, undecided, child_alpha)
            residual, mass = subtract(alpha[:, None] * r, q)
            updated = valid & (mass > 0)
            r, changed = torch.where(updated[:, None], residual / mass[:, None], r), changed | updated
            q = torch.where(valid[:, None], renormalised(q.scatter(1, choice[:, None], 0.0)), q)
            if column:
                alpha = torch.where(valid & (alpha < 1), mass / (mass + 1 - alpha), alpha)
        accepts = self._random.accept(alpha.where(undecided, 0.0))
        self.column = torch.where(accepts, column, self.column)
        self.changed = torch.where(accepts, changed, self.changed)
        self.residual = torch.where(accepts[:, None], r.to(self.residual.dtype), self.residual)
        return before & (accepts | ~undecided)
