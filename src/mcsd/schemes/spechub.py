"""SpecHub: two candidates, one of them always the most probable token (Sun et al. 2024, arXiv 2411.05289)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mcsd.rng import Randomness
from mcsd.sampling import BatchSamplingParams
from mcsd.schemes.base import NodeScheme, top_k_if_greedy
from mcsd.schemes.residual import at, on_support, renormalised, sample_if_rejected, subtract, unless_empty
from mcsd.schemes.types import Node


class SpecHub(NodeScheme):
    """Draws (x, a) with probability q(x), or (a, x) with q(a) q(x) / (1 - q(a)); the hub a is the most probable token.

    The mass of p(x) is taken from (x, a) first and then from (a, x); that of p(a) from the rest of (a, x) and then of
    (x, a). A node with one child has a draw from q and is verified by ordinary rejection.
    """

    name = "spechub"

    def draw(self, q: Tensor, counts: Sequence[int], sampling: BatchSamplingParams, random: Randomness) -> Tensor:
        """See `Scheme.draw`."""

        def draw(q: Tensor, count: int) -> Tensor:
            first = random.sample(q, 1)
            if count == 1:
                return first
            hub = q.argmax(-1, keepdim=True)
            other = random.sample_without_replacement(q.scatter(2, hub, 0.0), 1)
            return torch.cat([first, torch.where(first == hub, other, hub)], dim=-1)

        return top_k_if_greedy(sampling, q, max(counts), draw)

    def verify_node(self, node: Node, random: Randomness) -> tuple[Tensor, Tensor]:
        """See `NodeScheme.verify_node`."""
        q = node.q.weights
        r, outside = on_support(node.p, node.q.support)
        p = r[:, :-1]
        hub = q.argmax(-1, keepdim=True)
        paired = (node.count > 1)[:, None]
        # q off the hub and at it. A node with one child has no hub.
        spokes = q.scatter(1, hub, 0.0).where(paired, q)
        center = q.gather(1, hub).where(paired, 0.0)
        hub_p = p.gather(1, hub).where(paired, 0.0)
        second = center * renormalised(spokes)
        by_first = torch.minimum(p, spokes)
        by_second = torch.minimum(p - by_first, second).scatter(1, hub, 0.0).where(paired, 0.0)
        # The rest of (a, x) and (x, a), and how much of it the hub takes.
        # Rounding must not make it negative: the hub would then be accepted whatever its p.
        rest_first = (center - by_second.sum(-1, keepdim=True)).clamp(min=0)
        rest_second = (spokes - by_first).sum(-1, keepdim=True)
        hub_by_first = torch.minimum(hub_p, rest_first)
        hub_by_second = torch.minimum(hub_p - hub_by_first, rest_second)

        k = node.tokens.shape[1]
        x0, x1 = node.choice[:, 0], node.choice[:, min(1, k - 1)]
        valid0, valid1 = node.valid[:, 0], node.valid[:, min(1, k - 1)]
        hub_leads = (x0 == hub[:, 0]) & paired[:, 0]
        probability = torch.where(hub_leads, at(by_second, x1) / at(second, x1), at(by_first, x0) / at(spokes, x0))
        accepted = random.accept(probability.where(torch.where(hub_leads, valid1, valid0), 0.0), node.sequences)
        hub_probability = torch.where(hub_leads[:, None], hub_by_first / rest_first, hub_by_second / rest_second)[:, 0]
        hub_accepted = random.accept(hub_probability.where(paired[:, 0] & valid0 & ~accepted, 0.0), node.sequences)
        # The hub is child 0 of (a, x) and child 1 of (x, a).
        picked = torch.where(accepted, hub_leads.long(), torch.where(hub_accepted, (~hub_leads).long(), -1))

        taken = (by_first + by_second).scatter_add(1, hub, (hub_by_first + hub_by_second).where(paired, 0.0))
        r = unless_empty(subtract(r, taken.where(valid0[:, None], 0.0))[0], r)
        return picked, sample_if_rejected(picked, r, outside, node.q.support, node.sequences, random)
