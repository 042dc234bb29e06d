"""K-SEQ (SpecTr: Sun et al. 2023, arXiv 2310.15141, section 5)."""

import torch
from torch import Tensor

from mcsd.rng import Randomness
from mcsd.schemes.base import IndependentDraws, NodeScheme
from mcsd.schemes.residual import at, on_support, sample_if_rejected, subtract, unless_empty
from mcsd.schemes.types import Node

_BISECTIONS = 30
"""Of the interval that contains ρ. Every ρ that satisfies the condition is lossless; the smallest accepts most."""


class KSeq(IndependentDraws, NodeScheme):
    """k independent draws, each accepted with probability min(1, p / (ρ q)) by the same p and q.

    With β(ρ) = Σ min(p / ρ, q), the chance that one draw is accepted, ρ is the smallest number from 1 to k for which
    1 - (1 - β)^k ≤ ρ β: then no token is accepted with more than its probability p. The residual is
    p - min(p / ρ, q) · (1 - (1 - β)^k) / β.
    """

    name = "k-seq"

    def verify_node(self, node: Node, random: Randomness) -> tuple[Tensor, Tensor]:
        """See `NodeScheme.verify_node`."""
        q = node.q.weights
        r, outside = on_support(node.p, node.q.support)
        p, tries = r[:, :-1], node.valid.sum(-1, keepdim=True)
        children = node.tokens.shape[1]
        rho = smallest_rho(p, q, tries, children)
        picked = torch.full_like(node.sequences, -1)
        for j in range(children):
            choice = node.choice[:, j]
            tried = node.valid[:, j] & (picked < 0)
            accepted = random.accept((at(p, choice) / (rho[:, 0] * at(q, choice))).where(tried, 0.0), node.sequences)
            picked = torch.where(accepted, j, picked)
        each = torch.minimum(p / rho, q)
        beta = each.sum(-1, keepdim=True)
        accepted_mass = each * _geometric_sum(beta, tries, children)
        r = unless_empty(subtract(r, accepted_mass)[0], r)
        return picked, sample_if_rejected(picked, r, outside, node.q.support, node.sequences, random)


def smallest_rho(p: Tensor, q: Tensor, tries: Tensor, most: int) -> Tensor:
    """ρ ``[A, 1]``, for p and q ``[A, S]`` and the number of tries ``[A, 1]``, at most ``most``; by bisection."""
    low = torch.ones_like(p[:, :1])
    high = tries.to(p.dtype).clamp(min=1)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        enough = _geometric_sum(torch.minimum(p / middle, q).sum(-1, keepdim=True), tries, most) <= middle
        low, high = torch.where(enough, low, middle), torch.where(enough, middle, high)
    return high


def _geometric_sum(beta: Tensor, tries: Tensor, most: int) -> Tensor:
    """(1 - (1 - β)^k) / β as a sum of powers, which is exact for small β too."""
    total, power = torch.zeros_like(beta), torch.ones_like(beta)
    for exponent in range(most):
        total = total + power * (exponent < tries)
        power = power * (1 - beta)
    return total
