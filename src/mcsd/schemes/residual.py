"""What is left of the target's distribution after rejections.

Only the S tokens of the draft's support can be candidates, and outside of it the target only changes by a factor. So
judgements run on S entries and one number, the mass outside: ``[A, S + 1]``.
"""

import torch
from torch import Tensor

from mcsd.rng import Randomness


def on_support(p: Tensor, support: Tensor) -> tuple[Tensor, Tensor]:
    """The target on a support.

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
    """A residual ``[A, S + 1]``, or r where it has no mass: the rejection had probability 0 and came of rounding."""
    return torch.where(residual.sum(-1, keepdim=True) > 0, residual, r)


def renormalised(weights: Tensor) -> Tensor:
    """``[A, S]`` scaled to the sum 1; 0 where there is nothing."""
    return weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def at(weights: Tensor, choice: Tensor) -> Tensor:
    """``[A]``: an entry of each row of ``[A, S]``, by index ``[A]``."""
    return weights.gather(1, choice[:, None])[:, 0]


def sample_residual(r: Tensor, outside: Tensor, support: Tensor, rows: Tensor, random: Randomness) -> Tensor:
    """A token, int64 ``[A]``.

    Args:
        r: ``[A, S + 1]``, of any positive sum.
        outside: ``[A, V]``, proportional to p outside of the support.
        support: int64 ``[A, S]``.
        rows: int64 ``[A]``, of the batch.
        random: the judging stream.
    """
    size = support.shape[1]
    place = random.sample(r[:, None], 1, rows)[:, 0]
    off = [row for row, (found,) in enumerate(place.tolist()) if found == size]
    # Asked for even when no row needs it: every row's stream moves on alike.
    chosen = off or slice(0)
    beyond = random.sample(outside[chosen, None], 1, rows[chosen])[:, 0, 0]
    inside = support.gather(1, place.clamp(max=size - 1))[:, 0]
    return inside.index_put((torch.tensor(off, device=rows.device),), beyond) if off else inside


def sample_where_none(
    picked: Tensor, r: Tensor, outside: Tensor, support: Tensor, rows: Tensor, random: Randomness
) -> Tensor:
    """`sample_residual` for the rows that have accepted no child, ``picked [A]`` being -1; 0 for the others."""
    found = picked.tolist()
    lost = [row for row, place in enumerate(found) if place < 0]
    if len(lost) == len(found):
        return sample_residual(r, outside, support, rows, random)
    if not lost:
        # As many numbers as `sample_residual` takes.
        for weights in (r, outside):
            random.sample(weights[:0, None], 1, rows[:0])
        return torch.zeros_like(picked)
    drawn = sample_residual(r[lost], outside[lost], support[lost], rows[lost], random)
    return torch.zeros_like(picked).index_put((torch.tensor(lost, device=rows.device),), drawn)
