"""SpecHub: two candidates, one of them always the likeliest (Sun et al. 2024, arXiv 2411.05289)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mcsd.rng import Randomness
from mcsd.schemes.base import NodeScheme, likeliest_where
from mcsd.schemes.candidates import Node
from mcsd.schemes.residual import at, on_support, renormalised, sample_where_none, subtract, unless_empty


class SpecHub(NodeScheme):
    """Draws (x, a) with probability q(x), or (a, x) with q(a) q(x) / (1 - q(a)); the hub a is the likeliest token.

    p(x) is served from (x, a) first and then from (a, x); p(a) from what is left of (a, x) and then of (x, a). A node
    with one child has a draw from q and is judged by ordinary rejection.
    """

    name = "spechub"
    widest = 2

    def draw(self, q: Tensor, counts: Sequence[int], greedy: Tensor, random: Randomness) -> Tensor:
        """See `Scheme.draw`."""

        def draw(q: Tensor, count: int) -> Tensor:
            first = random.sample(q, 1)
            if count == 1:
                return first
            hub = q.argmax(-1, keepdim=True)
            other = random.sample_without_replacement(q.scatter(2, hub, 0.0), 1)
            return torch.cat([first, torch.where(first == hub, other, hub)], dim=-1)

        return likeliest_where(greedy, q, max(counts), draw)

    def judge_node(self, node: Node, random: Randomness) -> tuple[Tensor, Tensor]:
        """See `NodeScheme.judge_node`."""
        q = node.q.weights
        r, outside = on_support(node.p, node.q.support)
        p = r[:, :-1]
        hub = q.argmax(-1, keepdim=True)
        paired = (node.count > 1)[:, None]
        # q off the hub and at it. Where there is one child there is no hub.
        spokes = q.scatter(1, hub, 0.0).where(paired, q)
        center = q.gather(1, hub).where(paired, 0.0)
        wanted = p.gather(1, hub).where(paired, 0.0)
        second = center * renormalised(spokes)
        by_first = torch.minimum(p, spokes)
        by_second = torch.minimum(p - by_first, second).scatter(1, hub, 0.0).where(paired, 0.0)
        # What (a, x) and (x, a) have left for the hub, and how much of it the hub takes.
        # Rounding must not bring it below 0, where the hub would be accepted however little it is wanted.
        left_first = (center - by_second.sum(-1, keepdim=True)).clamp(min=0)
        left_second = (spokes - by_first).sum(-1, keepdim=True)
        hub_by_first = torch.minimum(wanted, left_first)
        hub_by_second = torch.minimum(wanted - hub_by_first, left_second)

        k = node.tokens.shape[1]
        x0, x1 = node.choice[:, 0], node.choice[:, min(1, k - 1)]
        there0, there1 = node.valid[:, 0], node.valid[:, min(1, k - 1)]
        hub_leads = (x0 == hub[:, 0]) & paired[:, 0]
        chance = torch.where(hub_leads, at(by_second, x1) / at(second, x1), at(by_first, x0) / at(spokes, x0))
        yes = random.accept(chance.where(torch.where(hub_leads, there1, there0), 0.0), node.rows)
        hub_chance = torch.where(hub_leads[:, None], hub_by_first / left_first, hub_by_second / left_second)[:, 0]
        hub_yes = random.accept(hub_chance.where(paired[:, 0] & there0 & ~yes, 0.0), node.rows)
        # The hub is child 0 of (a, x) and child 1 of (x, a).
        picked = torch.where(yes, hub_leads.long(), torch.where(hub_yes, (~hub_leads).long(), -1))

        taken = (by_first + by_second).scatter_add(1, hub, (hub_by_first + hub_by_second).where(paired, 0.0))
        r = unless_empty(subtract(r, taken.where(there0[:, None], 0.0))[0], r)
        return picked, sample_where_none(picked, r, outside, node.q.support, node.rows, random)
