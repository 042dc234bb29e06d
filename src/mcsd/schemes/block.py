"""Block verification of a chain (Sun et al. 2024, arXiv 2403.10444)."""

import torch

from mcsd.rng import Randomness
from mcsd.sampling import SparseDistributions
from mcsd.schemes.base import IndependentDraws
from mcsd.schemes.candidates import Target, Verdict
from mcsd.schemes.residual import at, on_support, subtract
from mcsd.schemes.whole import emit_after


class Block(IndependentDraws):
    """Accept as much of a chain as possible, judging it as a whole: never shorter on average than token by token.

    With w_0 = 1 and w_i = min(1, w_(i-1) p / q), the first i tokens are kept if i is the last place whose test, of
    probability h_i, succeeds: h_i = S_i / (S_i + 1 - w_i), where S_i = Σ (w_i p - q)₊ over the tokens after place i,
    and h_L = w_L at the end. Then a token is drawn from (w_i p - q)₊, or from p at the end.
    """

    name = "block"
    widest = 1

    def _judge(self, target: Target, q: SparseDistributions, random: Randomness) -> Verdict:
        tree = target.tree
        batch, length = tree.tokens.shape
        every = torch.arange(batch, device=tree.tokens.device)
        paths = tree.shape.paths.to(every.device)
        kept = torch.zeros_like(every)
        on = ~tree.failed
        weight = torch.ones_like(q.weights[:, 0, 0])
        lefts = []
        for column in range(length + 1):
            p, broken = target.after(torch.full_like(every, column), paths[column].expand(batch, -1), every)
            r, _ = on_support(p.nan_to_num(0.0), q.support[:, column])
            goes_on = on & ~broken & (tree.valid[:, column] if column < length else False)
            left, mass = subtract(weight[:, None] * r, q.weights[:, column])
            share = torch.where(weight < 1, mass / (mass + 1 - weight), 1.0)
            if column:
                chance = torch.where(goes_on, share, weight)
                kept = torch.where(random.accept(chance.where(on, 0.0)), column, kept)
            lefts.append(left.where((goes_on & (mass > 0))[:, None], r))
            if column < length:
                choice = tree.choice[:, column]
                ratio = weight * at(r, choice) / at(q.weights[:, column], choice)
                weight = ratio.clamp(max=1.0)
                on = goes_on
        return emit_after(kept, torch.stack(lefts)[kept, every], kept >= 0, target, q, random)
