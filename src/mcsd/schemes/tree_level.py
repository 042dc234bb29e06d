"""Shared by schemes that verify a tree as a whole."""

import torch
from torch import Tensor

from mcsd.rng import Randomness
from mcsd.sampling import SparseDistributions
from mcsd.schemes.residual import on_support, sample_residual
from mcsd.schemes.types import TargetDistributions, VerificationResult, paths_of


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
    rows = torch.arange(len(column), device=column.device)
    path = paths_of(tree.shape, column.device)[column]
    p, broken = target.after(column, path)
    failed = tree.failed | broken
    p = p.where(~failed[:, None], 1 / p.shape[1])
    support = q.support[rows, column]
    r, outside = on_support(p, support)
    r = torch.where((changed & ~failed)[:, None], residual.to(r.dtype), r)
    token = sample_residual(r, outside, support, rows, random)
    return VerificationResult(path, (path >= 0).sum(-1), token.masked_fill(failed, 0), failed)
