"""The k - 1 likeliest candidates for sure and one draw from the rest (Hu et al. 2025, arXiv 2502.18779)."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mcsd.rng import Randomness
from mcsd.schemes.base import NodeScheme, likeliest, likeliest_where
from mcsd.schemes.candidates import Node
from mcsd.schemes.residual import at, on_support, renormalised, sample_where_none, subtract, unless_empty
from mcsd.schemes.walk import look


class GreedyDraft(NodeScheme):
    """T holds the k - 1 likeliest tokens of q, and x is drawn from q', which is q outside T.

    x is accepted with probability min(1, p / q'); else y is drawn from the residual (p - q')₊, and counts as accepted
    where it is in T. Acceptance: p(T) + Σ min(p, q') outside T, the most that this draw allows.
    """

    name = "greedy-draft"

    def draw(self, q: Tensor, counts: Sequence[int], greedy: Tensor, random: Randomness) -> Tensor:
        """See `Scheme.draw`. x comes last, in the place of a node's last child."""

        def draw(q: Tensor, most: int) -> Tensor:
            size = q.shape[-1]
            top = likeliest(q, most)
            place = torch.arange(most, device=q.device)
            last = torch.tensor(counts, device=q.device)[:, None] - 1
            sure = (place < last) & (top >= 0)
            rest = torch.nn.functional.pad(q, (0, 1)).scatter(2, top.where(sure, size), 0.0)[..., :size]
            x = random.sample_without_replacement(rest, 1)
            return torch.where(place == last, x, top.where(sure, -1))

        return likeliest_where(greedy, q, max(counts), draw)

    def judge_node(self, node: Node, random: Randomness) -> tuple[Tensor, Tensor]:
        """See `NodeScheme.judge_node`."""
        r, outside = on_support(node.p, node.q.support)
        last = node.count - 1
        drawn = torch.arange(node.tokens.shape[1], device=last.device) == last[:, None]
        size = r.shape[1] - 1
        sure = node.valid & ~drawn
        rest = torch.nn.functional.pad(node.q.weights, (0, 1)).scatter(1, node.choice.where(sure, size), 0.0)[:, :-1]
        there = (node.valid & drawn).any(-1)
        # Without a draw nothing can be rejected: the residual is p.
        q = renormalised(rest) * there[:, None]
        x = (node.choice * drawn).sum(-1)
        yes = random.accept((at(r, x) / at(q, x)).where(there, 0.0), node.rows)
        picked = last.where(yes, -1)
        r = unless_empty(subtract(r, q)[0], r)
        y = sample_where_none(picked, r, outside, node.q.support, node.rows, random)
        found, _ = look(replace(node, valid=sure), y)
        return torch.where(yes, picked, found), y
