"""The residual: the target's distribution after rejections.

Only the S tokens of the draft's support can be candidates, and outside of it rejections only scale the target's
distribution. So verification works on S entries and the total mass outside: ``[A, S + 1]``.
"""

import torch
from torch import Tensor

from mcsd.rng import Randomness


def on_support(p: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
    """The target's distribution on a support.

    Args:
        p: ``[A, V]``; support: int64 ``[A, S]``.

    Returns:
        ``[A, S + 1]``: p on the support and, last, its mass outside; and ``[A, V]``: p outside, 0 on the support.
    """
    outside = p.scatter(1, support, 0.0)
    return torch.cat([p.gather(1, support), outside.sum(-1, keepdim=True)], dim=1), outside


def subtract(r: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """``(r - q)₊`` for r ``[A, S + 1]`` and q ``[A, S]``, not normalised, and its mass ``[A]``."""
    residual = (r - torch.nn.functional.pad(q, (0, 1))).clamp(min=0)
    return residual, residual.sum(-1)


def unless_empty(residual: Tensor, r: Tensor) -> Tensor:
    """A residual ``[A, S + 1]``, or r where it has no mass: the rejection had probability 0 and is due to rounding."""
    return torch.where(residual.sum(-1, keepdim=True) > 0, residual, r)


def renormalised(weights: Tensor) -> Tensor:
    """``[A, S]`` scaled to sum 1; 0 where all weights are 0."""
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def at(weights: Tensor, choice: Tensor) -> Tensor:
    """``[A]``: the entry of each row of ``[A, S]`` at index ``choice [A]``."""
    return weights.gather(1, choice[:, None])[:, 0]


def sample_residual(r: Tensor, outside: Tensor, support: Tensor, sequences: Tensor, random: Randomness) -> Tensor:
    """A token, int64 ``[A]``.

    Args:
        r: ``[A, S + 1]``, of any positive sum.
        outside: ``[A, V]``, proportional to p outside of the support.
        support: int64 ``[A, S]``.
        sequences: int64 ``[A]``, indices in the batch.
        random: the `mcsd.rng.VERIFY` stream.
    """
    size = support.shape[1]
    if support.device.type != "cpu":
        # Both draws for all sequences, so that the host need not know which of them are used. Those that are not
        # used must be possible.
        inside, beyond = (
            random.sample(weights.where(weights.sum(-1, keepdim=True) > 0, 1.0)[:, None], 1, sequences)[:, 0, 0]
            for weights in (r, outside)
        )
        on = support.gather(1, inside.clamp(max=size - 1)[:, None])[:, 0] if size else beyond
        return torch.where(inside == size, beyond, on)
    index = random.sample(r[:, None], 1, sequences)[:, 0]
    off_support = [i for i, (sampled,) in enumerate(index.tolist()) if sampled == size]
    # Drawn even if no sequence needs it: the streams of all sequences advance equally.
    chosen = off_support or slice(0)
    beyond = random.sample(outside[chosen, None], 1, sequences[chosen])[:, 0, 0]
    token = support.gather(1, index.clamp(max=size - 1))[:, 0]
    return token.index_put((torch.tensor(off_support, device=token.device),), beyond) if off_support else token


def sample_if_rejected(
    picked: Tensor, r: Tensor, outside: Tensor, support: Tensor, sequences: Tensor, random: Randomness
) -> Tensor:
    """`sample_residual` for the sequences that accepted no child, ``picked [A]`` being -1; 0 for the others."""
    if picked.device.type != "cpu":
        return sample_residual(r, outside, support, sequences, random).masked_fill(picked >= 0, 0)
    indices = picked.tolist()
    rejected = [i for i, index in enumerate(indices) if index < 0]
    if len(rejected) == len(indices):
        return sample_residual(r, outside, support, sequences, random)
    if not rejected:
        # Draws as many numbers as `sample_residual`.
        for weights in (r, outside):
            random.sample(weights[:0, None], 1, sequences[:0])
        return torch.zeros_like(picked)
    drawn = sample_residual(r[rejected], outside[rejected], support[rejected], sequences[rejected], random)
    return torch.zeros_like(picked).index_put((torch.tensor(rejected, device=picked.device),), drawn)
