"""The largest acceptance that any verification of a draw can reach. For tests and theory; generation does not read it.

A verification of candidates S is a joint distribution of S and the emitted token y in which y follows p. A candidate is
accepted if y is in S. By max-flow min-cut the largest probability of that is α* = 1 + min over token sets H of
p(H) - P(S ⊆ H): the cut goes through the tokens of H and through the sets that are not inside H (SpecTr,
arXiv 2310.15141; Hu et al. 2025, arXiv 2502.18779).
"""

import torch
from torch import Tensor


def iid_optimum(p: Tensor, q: Tensor, k: int) -> Tensor:
    """α* of k independent draws from q, in O(V log V).

    Here P(S ⊆ H) = q(H)^k. Only the H with the largest q/p have to be tried: p(H) - q(H)^k is concave in
    (p(H), q(H)) and falls with q(H), so its minimum is at a corner of the upper edge of the attainable pairs.

    Args:
        p: ``[A, V]``; q: ``[A, S]``, S ≤ V, of the first S of the V tokens (0 for the others). The last column of p may
            be the mass of many tokens that q never draws.
        k: number of draws.

    Returns:
        ``[A]``.
    """
    q = torch.nn.functional.pad(q, (0, p.shape[1] - q.shape[1]))
    # Tokens with p = q = 0 give NaN and sort anywhere: they add nothing.
    order = (q / p).argsort(dim=-1, descending=True)
    cut = p.gather(1, order).cumsum(-1) - q.gather(1, order).cumsum(-1) ** k
    # The empty set gives 0.
    return 1 + cut.amin(-1).clamp(max=0)


def set_optimum(p: Tensor, set_probabilities: Tensor) -> Tensor:
    """α* of any draw over a small vocabulary, by trying every H.

    Args:
        p: ``[A, V]``.
        set_probabilities: ``[A, 2^V]``, of each set of candidates; token t is in set i if bit t of i is 1.

    Returns:
        ``[A]``.
    """
    singletons = torch.zeros_like(set_probabilities)
    singletons[:, [1 << token for token in range(p.shape[1])]] = p
    return 1 + (subset_sums(singletons) - subset_sums(set_probabilities)).amin(-1)


def subset_sums(weights: Tensor) -> Tensor:
    """For each set the sum of the weights of its subsets: ``[A, 2^V]``, sets as bits."""
    sums = weights.clone()
    for token in range(weights.shape[1].bit_length() - 1):
        pairs = sums.view(len(sums), -1, 2, 1 << token)
        pairs[:, :, 1] += pairs[:, :, 0]
    return sums
