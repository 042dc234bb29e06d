"""What schemes share that judge a tree as a whole."""

import torch
from torch import Tensor

from mcsd.rng import Randomness
from mcsd.sampling import SparseDistributions
from mcsd.schemes.candidates import Target, Verdict
from mcsd.schemes.residual import on_support, sample_residual


def emit_after(
    column: Tensor, left: Tensor, changed: Tensor, target: Target, q: SparseDistributions, random: Randomness
) -> Verdict:
    """The verdict on trees of which the path to a node was accepted: the token after it, of all rows together.

    p outside of the support is asked for here once more, rather than kept for every node on the way.

    Args:
        column: int64 ``[B]``, the node, 0 for the root.
        left: ``[B, S + 1]``, what is left of p there; changed: bool ``[B]``, whether that is anything but p.
        target, q: of the trees.
        random: the judging stream.
    """
    tree = target.tree
    path, failed = tree.shape.paths.to(column.device)[column], tree.failed.clone()
    rows = (~failed).nonzero()[:, 0]
    p, broken = target.after(column[rows], path[rows], rows)
    failed[rows[broken]] = True
    rows, p = rows[~broken], p[~broken]
    support = q.support[rows, column[rows]]
    r, outside = on_support(p, support)
    r = torch.where(changed[rows, None], left[rows].to(r.dtype), r)
    token = torch.zeros_like(column)
    token[rows] = sample_residual(r, outside, support, rows, random)
    return Verdict(path, (path >= 0).sum(-1), token, failed)
