"""Block verification of a chain (Sun et al. 2024, arXiv 2403.10444)."""

import torch

from mcsd.rng import Randomness
from mcsd.sampling import SparseDistributions
from mcsd.schemes.base import IndependentDraws
from mcsd.schemes.residual import at, on_support, subtract
from mcsd.schemes.tree_level import emit_token
from mcsd.schemes.types import TargetDistributions, VerificationResult, paths_of


class BlockVerification(IndependentDraws):
    """Verify a chain as a whole: on average the accepted prefix is never shorter than with token-level verification.

    With w_0 = 1 and w_i = min(1, w_(i-1) p / q), the first i tokens are kept if i is the last position whose
    Bernoulli test with probability h_i succeeds: h_i = S_i / (S_i + 1 - w_i), where S_i = Σ (w_i p - q)₊ over the
    tokens after position i, and h_L = w_L at the end. Then a token is drawn from (w_i p - q)₊, or from p at the end.
    """

    name = "block"

    def _verify(self, target: TargetDistributions, q: SparseDistributions, random: Randomness) -> VerificationResult:
        tree = target.tree
        batch, length = tree.tokens.shape
        sequences = torch.arange(batch, device=tree.tokens.device)
        paths = paths_of(tree.shape, sequences.device)
        kept = torch.zeros_like(sequences)
        active = ~tree.failed
        weight = torch.ones_like(q.weights[:, 0, 0])
        residuals = []
        for column in range(length + 1):
            p, broken = target.after(torch.full_like(sequences, column), paths[column].expand(batch, -1))
            r, _ = on_support(p.nan_to_num(0.0), q.support[:, column])
            continues = active & ~broken & (tree.valid[:, column] if column < length else False)
            residual, mass = subtract(weight[:, None] * r, q.weights[:, column])
            share = torch.where(weight < 1, mass / (mass + 1 - weight), 1.0)
            if column:
                probability = torch.where(continues, share, weight)
                kept = torch.where(random.accept(probability.where(active, 0.0)), column, kept)
            residuals.append(residual.where((continues & (mass > 0))[:, None], r))
            if column < length:
                choice = tree.choice[:, column]
                ratio = weight * at(r, choice) / at(q.weights[:, column], choice)
                weight = ratio.clamp(max=1.0)
                active = continues
        return emit_token(kept, torch.stack(residuals)[kept, sequences], kept >= 0, target, q, random)
