"""Multi-candidate speculative sampling by recursive rejection (Yang et al. 2024, arXiv 2401.06706, section 3)."""

import torch
from torch import Tensor

from mcsd.rng import Randomness
from mcsd.schemes.base import DrawsWithoutReplacement, IndependentDraws, NodeScheme
from mcsd.schemes.residual import on_support, renormalised, sample_if_rejected, subtract
from mcsd.schemes.types import Node


class _Recursive(NodeScheme):
    """Try the candidates in draw order; after each rejection the target becomes the normalised residual."""

    without_replacement: bool

    def verify_node(self, node: Node, random: Randomness) -> tuple[Tensor, Tensor]:
        """See `NodeScheme.verify_node`."""
        q = node.q.weights
        r, outside = on_support(node.p, node.q.support)
        picked = torch.full_like(node.sequences, -1)
        children = node.tokens.shape[1]
        for j in range(children):
            choice = node.choice[:, j : j + 1]
            tried = node.valid[:, j] & (picked < 0)
            accepted = random.accept(
                (r.gather(1, choice) / q.gather(1, choice))[:, 0].where(tried, 0.0), node.sequences
            )
            picked = picked.masked_fill(accepted, j)
            rejected = tried & ~accepted
            # On a GPU the synchronisation takes longer than the subtraction.
            if rejected.device.type == "cpu" and not rejected.any():
                continue
            residual, mass = subtract(r, q)
            # No mass: the rejection had probability 0 and is due to rounding. The old residual stays.
            r = torch.where((rejected & (mass > 0))[:, None], residual / mass[:, None], r)
            if self.without_replacement and j + 1 < children:
                rest = q.scatter(1, choice, 0.0)
                q = torch.where(rejected[:, None], renormalised(rest), q)
        return picked, sample_if_rejected(picked, r, outside, node.q.support, node.sequences, random)


class Mcss(IndependentDraws, _Recursive):
    """k independent draws from q, each verified against the same q (section 3.1; SpecInfer's MSS)."""

    name = "mcss"
    without_replacement = False


class McssWithoutReplacement(DrawsWithoutReplacement, _Recursive):
    """k draws from q without replacement, q shrinking with each rejection (section 3.2)."""

    name = "mcss-wor"
    without_replacement = True
