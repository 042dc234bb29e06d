"""The top k - 1 candidates and one draw from the rest (Hu et al. 2025, arXiv 2502.18779)."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from mcsd.rng import Randomness
from mcsd.sampling import BatchSamplingParams
from mcsd.schemes.base import NodeScheme, top_k_if_greedy, top_k_indices
from mcsd.schemes.node_level import match
from mcsd.schemes.residual import at, on_support, renormalised, sample_if_rejected, subtract, unless_empty
from mcsd.schemes.types import Node


@lru_cache(maxsize=64)
def _last_child(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """int64 ``[N]``: the index of the last child of each of N nodes."""
    return torch.tensor(counts, device=device) - 1


class GreedyDraft(NodeScheme):
    """T holds the k - 1 most probable tokens of q, and x is drawn from q', which is q outside T.

    x is accepted with probability min(1, p / q'); else y is drawn from the residual (p - q')₊, and counts as accepted
    if it is in T. Acceptance: p(T) + Σ min(p, q') outside T, the most that this draw allows.
    """

    name = "greedy-draft"

    def draw(self, q: Tensor, counts: Sequence[int], sampling: BatchSamplingParams, random: Randomness) -> Tensor:
        """See `Scheme.draw`. x comes last, as a node's last child."""

        def draw(q: Tensor, count: int) -> Tensor:
            size = q.shape[-1]
            top = top_k_indices(q, count)
            index = torch.arange(count, device=q.device)
            last = _last_child(tuple(counts), q.device)[:, None]
            deterministic = (index < last) & (top >= 0)
            rest = torch.nn.functional.pad(q, (0, 1)).scatter(2, top.where(deterministic, size), 0.0)[..., :size]
            x = random.sample_without_replacement(rest, 1)
            return torch.where(index == last, x, top.where(deterministic, -1))

        return top_k_if_greedy(sampling, q, max(counts), draw)

    def verify_node(self, node: Node, random: Randomness) -> tuple[Tensor, Tensor]:
        """See `NodeScheme.verify_node`."""
        r, outside = on_support(node.p, node.q.support)
        last = node.count - 1
        drawn = torch.arange(node.tokens.shape[1], device=last.device) == last[:, None]
        size = r.shape[1] - 1
        deterministic = node.valid & ~drawn
        rest = torch.nn.functional.pad(node.q.weights, (0, 1)).scatter(1, node.choice.where(deterministic, size), 0.0)[
            :, :-1
        ]
        has_draw = (node.valid & drawn).any(-1)
        # Without a draw nothing can be rejected: the residual is p.
        q = renormalised(rest) * has_draw[:, None]
        x = (node.choice * drawn).sum(-1)
        accepted = random.accept((at(r, x) / at(q, x)).where(has_draw, 0.0), node.sequences)
        picked = last.where(accepted, -1)
        r = unless_empty(subtract(r, q)[0], r)
        y = sample_if_rejected(picked, r, outside, node.q.support, node.sequences, random)
        matched, _ = match(replace(node, valid=deterministic), y)
        return torch.where(accepted, picked, matched), y
