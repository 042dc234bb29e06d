"""Verification of nodes that have a looked-up child beside drawn ones.

The looked-up child was not drawn from a distribution. So a token y is sampled from p, and if it is the looked-up one,
that child is accepted. Otherwise y is distributed as p without that token, renormalised; in place of y the scheme emits
a token of this distribution, by verifying the drawn children against it. The looked-up token may depend on the past,
and not on the random numbers of this step.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from mcsd.rng import Randomness
from mcsd.schemes.node_level import sample_and_match
from mcsd.schemes.types import Node


def verify_mixed(
    node: Node, random: Randomness, drawn: int, verify_drawn: Callable[[Node], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """As `NodeScheme.verify_node`, where the first child may be looked up.

    Args:
        node: with `Node.looked_up`.
        random: the `mcsd.rng.VERIFY` stream; of `verify_drawn` too, which uses as much of it as without look-up.
        drawn: the most drawn children of a node of this level.
        verify_drawn: accepts a drawn child, or none.
    """
    assert node.looked_up is not None
    if not drawn:
        return sample_and_match(node, random)
    first = node.tokens[:, :1]
    is_candidate = node.looked_up & node.valid[:, 0]
    y = random.beside.sample(node.p[:, None], 1, node.sequences)[:, 0, 0]
    hit = is_candidate & (first[:, 0] == y)
    rest = node.p.scatter(1, first, 0.0)
    mass = rest.sum(-1, keepdim=True)
    # Without any mass the token was sampled: what is verified then is not used.
    p = torch.where(is_candidate[:, None] & (mass > 0), rest / mass, node.p)
    picked, token = verify_drawn(_drawn_children(node, p, drawn))
    picked = torch.where(picked >= 0, picked + node.looked_up.long(), -1)
    return picked.masked_fill(hit, 0), token


def _drawn_children(node: Node, p: Tensor, drawn: int) -> Node:
    """A node without its looked-up child, ``p`` in place of its distribution."""
    assert node.looked_up is not None
    index = torch.arange(drawn, device=p.device) + node.looked_up.long()[:, None]
    tokens, valid, choice = (
        torch.nn.functional.pad(part, (0, 1)).gather(1, index) for part in (node.tokens, node.valid, node.choice)
    )
    count = node.count - node.looked_up.long()
    return replace(node, p=p, tokens=tokens, valid=valid, count=count, choice=choice, looked_up=None)
