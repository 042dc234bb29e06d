"""Shared by schemes that verify a tree as a whole."""

import torch
from torch import Tensor

from mcsd.rng import Randomness
from mcsd.sampling import SparseDistributions
from mcsd.schemes.residual import on_support, sample_residual
from mcsd.schemes.types import TargetDistributions, VerificationResult


def emit_token(
    column: Tensor,
    residual: Tensor,
    changed: Tensor,
    target: TargetDistributions,
    q: SparseDistributions,
    random: Randomness,
) -> VerificationResult:
    """The result for trees whose accepted path ends in a node: samples the token after it, for all sequences at once.

    p outside of the support is computed again here rather than kept for every node that was visited.

    Args:
        column: int64 ``[B]``, the node, 0 for the root.
        residual: ``[B, S + 1]``, the residual of p there; changed: bool ``[B]``, false where it is p itself.
        target, q: of the trees.
        random: the `mcsd.rng.VERIFY` stream.
    """
    tree = target.tree
    path, failed = tree.shape.paths.to(column.device)[column], tree.failed.clone()
    sequences = (~failed).nonzero()[:, 0]
    p, broken = target.after(column[sequences], path[sequences], sequences)
    failed[sequences[broken]] = True
    sequences, p = sequences[~broken], p[~broken]
    support = q.support[sequences, column[sequences]]
    r, outside = on_support(p, support)
    r = torch.where(changed[sequences, None], residual[sequences].to(r.dtype), r)
    token = torch.zeros_like(column)
    token[sequences] = sample_residual(r, outside, support, sequences, random)
    return VerificationResult(path, (path >= 0).sum(-1), token, failed)
