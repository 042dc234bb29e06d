"""Traversal verification of a tree (Weng et al. 2025, arXiv 2505.12398)."""

import torch
from torch import Tensor

from mcsd.rng import Randomness
from mcsd.sampling import SparseDistributions
from mcsd.schemes.base import DrawsWithoutReplacement
from mcsd.schemes.residual import at, on_support, renormalised, subtract
from mcsd.schemes.tree_level import emit_token
from mcsd.schemes.types import TargetDistributions, VerificationResult


class Traversal(DrawsWithoutReplacement):
    """From the leaves up: a leaf is accepted with its whole path, or deleted and its parent's p and q updated.

    α is 1 at the root and min(1, α p / q) of its parent at a child. The first leaf, depth first, is accepted with
    probability α; a token after it comes from its p. Otherwise, at its parent, with S = Σ (α p - q)₊: p becomes
    (α p - q)₊ / S, the leaf leaves q, and α becomes S / (S + 1 - α). A node without remaining children is a leaf. Only
    acceptance ends this, so all sequences of a batch visit the nodes in the same order.
    """

    name = "traversal"

    def _verify(self, target: TargetDistributions, q: SparseDistributions, random: Randomness) -> VerificationResult:
        verification = _BottomUpVerification(target, q, random)
        sequences = (~target.tree.failed).nonzero()[:, 0]
        verification.visit(0, sequences, torch.ones(len(sequences), dtype=q.weights.dtype, device=sequences.device))
        return emit_token(verification.column, verification.residual, verification.changed, target, q, random)


class _BottomUpVerification:
    """The state of one verification: ``column``, ``residual`` and ``changed`` are the arguments of `emit_token`."""

    def __init__(self, target: TargetDistributions, q: SparseDistributions, random: Randomness) -> None:
        batch, _, size = q.weights.shape
        self._target, self._q, self._random = target, q, random
        self._children = [[node for node in nodes if node >= 0] for nodes in target.tree.shape.children.tolist()]
        self._paths = target.tree.shape.paths.to(q.weights.device)
        self.column = torch.zeros(batch, dtype=torch.int64, device=q.weights.device)
        dtype = torch.promote_types(q.weights.dtype, target.logits.dtype)
        self.residual = torch.zeros(batch, size + 1, dtype=dtype, device=q.weights.device)
        self.changed = torch.zeros_like(self.column, dtype=torch.bool)

    def visit(self, column: int, sequences: Tensor, alpha: Tensor) -> Tensor:
        """Try the nodes below a node, then the node itself.

        Args:
            column: the node, root 0.
            sequences: int64 ``[A]``, those that have accepted nothing yet; alpha: ``[A]``, their α at the node.

        Returns:
            bool ``[A]``, whether a sequence has accepted a node now.
        """
        accepted = torch.ones_like(sequences, dtype=torch.bool)
        undecided = torch.arange(len(sequences), device=sequences.device)
        r, changed = self.residual[sequences], torch.zeros_like(accepted)
        children = self._children[column]
        if children:
            p, broken = self._target.after(
                torch.full_like(sequences, column), self._paths[column].expand(len(sequences), -1), sequences
            )
            r, _ = on_support(p.nan_to_num(0.0), self._q.support[sequences, column])
            q = self._q.weights[sequences, column]
        for child in children:
            choice, valid = self._target.tree.choice[sequences, child], self._target.tree.valid[sequences, child]
            valid = valid & ~broken
            child_alpha = (alpha * at(r, choice) / at(q, choice)).clamp(max=1.0).where(valid, 0.0)
            rest = ~self.visit(child + 1, sequences, child_alpha)
            sequences, undecided, choice, valid = sequences[rest], undecided[rest], choice[rest], valid[rest]
            broken, alpha, r, q, changed = broken[rest], alpha[rest], r[rest], q[rest], changed[rest]
            residual, mass = subtract(alpha[:, None] * r, q)
            updated = valid & (mass > 0)
            r, changed = torch.where(updated[:, None], residual / mass[:, None], r), changed | updated
            q = torch.where(valid[:, None], renormalised(q.scatter(1, choice[:, None], 0.0)), q)
            if column:
                alpha = torch.where(valid & (alpha < 1), mass / (mass + 1 - alpha), alpha)
        accepts = self._random.accept(alpha, sequences)
        self.column[sequences[accepts]], self.changed[sequences[accepts]] = column, changed[accepts]
        self.residual[sequences[accepts]] = r[accepts].to(self.residual.dtype)
        accepted[undecided] = accepts
        return accepted
