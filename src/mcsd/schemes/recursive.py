"""Multi-candidate speculative sampling by recursive rejection (Yang et al. 2024, arXiv 2401.06706, section 3)."""

import torch
from torch import Tensor

from mcsd.rng import Randomness
from mcsd.schemes.base import Node, Scheme, likeliest_where


class _Recursive(Scheme):
    """Try the candidates in draw order; after each rejection the target becomes the normalised residual.

    Only the S tokens of the draft's support can be candidates, and the residual outside it only changes by a factor.
    So the rejections run on S entries and one number, the mass outside.
    """

    without_replacement: bool

    def judge_node(self, node: Node, random: Randomness) -> tuple[Tensor, Tensor]:
        """See `Scheme.judge_node`."""
        if node.q is None:
            if node.valid.any():
                raise TypeError(f"scheme {self.name} judges by q, and these candidates were not drawn from one")
            return torch.full_like(node.rows, -1), random.sample(node.p[:, None], 1, node.rows)[:, 0, 0]
        q = node.q.weights
        outside = node.p.scatter(1, node.q.support, 0.0)
        # r: [A, S + 1], the normalised residual on the support and, last, its mass outside.
        r = torch.cat([node.p.gather(1, node.q.support), outside.sum(-1, keepdim=True)], dim=1)
        picked = torch.full_like(node.rows, -1)
        for j in range(node.tokens.shape[1]):
            choice = node.choice[:, j : j + 1].clamp(min=0)
            tried = node.valid[:, j] & (picked < 0)
            yes = random.accept((r.gather(1, choice) / q.gather(1, choice))[:, 0], node.rows) & tried
            picked = torch.where(yes, j, picked)
            rejected = (tried & ~yes)[:, None]
            residual = torch.cat([(r[:, :-1] - q).clamp(min=0), r[:, -1:]], dim=1)
            mass = residual.sum(-1, keepdim=True)
            # No mass left: the rejection had probability 0 and came of rounding. The old residual stays.
            r = torch.where(rejected & (mass > 0), residual / mass, r)
            if self.without_replacement:
                rest = q.scatter(1, choice, 0.0)
                q = torch.where(rejected, rest / rest.sum(-1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny), q)
        return picked, _sample_residual(r, outside, node, random)


class Mcss(_Recursive):
    """k independent draws from q, each judged against the same q (section 3.1; SpecInfer's MSS)."""

    name = "mcss"
    without_replacement = False

    def draw(self, q: Tensor, count: int, greedy: Tensor, random: Randomness) -> Tensor:
        """See `Scheme.draw`."""
        return likeliest_where(greedy, q, count, random.sample)


class McssWithoutReplacement(_Recursive):
    """k draws from q without replacement, q shrinking with each rejection (section 3.2)."""

    name = "mcss-wor"
    without_replacement = True

    def draw(self, q: Tensor, count: int, greedy: Tensor, random: Randomness) -> Tensor:
        """See `Scheme.draw`."""
        return likeliest_where(greedy, q, count, random.sample_without_replacement)


def _sample_residual(r: Tensor, outside: Tensor, node: Node, random: Randomness) -> Tensor:
    """A token from the residual, int64 ``[A]``. ``r [A, S + 1]`` as above, ``outside [A, V]``: p off the support."""
    assert node.q is not None
    place = random.sample(r[:, None], 1, node.rows)[:, 0, 0]
    inside = node.q.support.gather(1, place.clamp(max=r.shape[1] - 2)[:, None])[:, 0]
    off = (place == r.shape[1] - 1).nonzero()[:, 0]
    # Asked for even when no row needs it: every row's stream moves on alike.
    return inside.index_put((off,), random.sample(outside[off, None], 1, node.rows[off])[:, 0, 0])
