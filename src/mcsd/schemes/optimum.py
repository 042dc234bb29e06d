"""The most that any judgement can accept of a draw. For reports: nothing that generates reads it.

A judgement of candidates S, drawn with whatever law, is a joint law of S and the emitted token y in which y follows p.
One of the candidates is accepted where y is in S. By max-flow min-cut the largest probability of that is
α* = 1 + min over token sets H of p(H) - P(S ⊆ H): the cut that goes through the tokens of H and through the sets that
are not inside H (SpecTr, arXiv 2310.15141; Hu et al. 2025, arXiv 2502.18779).
"""

import torch
from torch import Tensor


def iid_optimum(p: Tensor, q: Tensor, k: int) -> Tensor:
    """α* of k independent draws from q, in O(V log V).

    Here P(S ⊆ H) = q(H)^k. Only H that hold the tokens of largest q/p need a look: p(H) - q(H)^k is concave in
    (p(H), q(H)) and falls with q(H), so it is least at a corner of the upper edge of what these two can be.

    Args:
        p: ``[A, V]``; q: ``[A, S]``, S ≤ V, of the first S of the V tokens (0 for the others). The last column of p may
            be the mass of many tokens that q never draws.
        k: how many draws.

    Returns:
        ``[A]``.
    """
    q = torch.nn.functional.pad(q, (0, p.shape[1] - q.shape[1]))
    # Tokens that neither has come as nan, and sort anywhere: they add nothing.
    order = (q / p).argsort(dim=-1, descending=True)
    cut = p.gather(1, order).cumsum(-1) - q.gather(1, order).cumsum(-1) ** k
    # The empty set gives 0.
    return 1 + cut.amin(-1).clamp(max=0)


def set_optimum(p: Tensor, law: Tensor) -> Tensor:
    """α* of any draw over a few tokens, by trying every H.

    Args:
        p: ``[A, V]``.
        law: ``[A, 2^V]``, the probability of each set of candidates; token t is in set i if bit t of i is 1.

    Returns:
        ``[A]``.
    """
    one = torch.zeros_like(law)
    one[:, [1 << token for token in range(p.shape[1])]] = p
    return 1 + (within(one) - within(law)).amin(-1)


def within(weights: Tensor) -> Tensor:
    """For each set the sum of the weights of its subsets: ``[A, 2^V]``, sets as bits."""
    sums = weights.clone()
    for token in range(weights.shape[1].bit_length() - 1):
        pairs = sums.view(len(sums), -1, 2, 1 << token)
        pairs[:, :, 1] += pairs[:, :, 0]
    return sums
