"""Same law as the target: every scheme, several trees and settings, whole sequences through the whole engine.

Odds. Every case compares whole sequences of 3 tokens at 5·10⁴ sequences with fixed seeds. The level for the family
of all cases in this file is 10⁻³, Bonferroni: a correct engine fails this file on one seed in a thousand at most,
and since the seeds are fixed it fails always or never.

Power (`test_a_broken_scheme_is_rejected`). A judgement wrong by 5 % had a p-value of 2·10⁻¹⁰ with 5·10⁴ sequences,
by 2 % one of .09. Smaller errors are for exact enumeration to find; what enumeration cannot see, because it takes the
place of the random numbers, is found here.
"""

import os
from dataclasses import replace

import pytest
import torch
from chisquare import engine_of, p_value, runnable, sample, sequence_law, table, warped
from torch import Tensor

import mcsd
from mcsd.rng import Randomness
from mcsd.sampling import SparseDistributions
from mcsd.schemes.base import Node
from mcsd.schemes.recursive import McssWithoutReplacement

SEQUENCES = int(os.environ.get("MCSD_LAW_SEQUENCES", "50000"))
"""Of a case; ``make laws`` asks for a million."""

PLAIN = mcsd.SamplingParams(max_new_tokens=3)
TOP_P = mcsd.SamplingParams(top_p=0.9, max_new_tokens=3)
COOL = mcsd.SamplingParams(temperature=0.7, top_p=0.9, max_new_tokens=3)
WITH = {"3x2": PLAIN, "chain:2": COOL, "2x2x1": TOP_P}
CASES = runnable(*WITH)
MIXED = [PLAIN, COOL]
TESTS = len(CASES) + len(MIXED) + 3 + 3
LEVEL = 1e-3 / TESTS


@pytest.mark.parametrize(("scheme", "tree"), CASES)
def test_law(scheme: str, tree: str) -> None:
    seed, params = CASES.index((scheme, tree)), WITH[tree]
    target, draft = table(5, seed), table(5, seed + 1000, sharpness=0.5)
    (seen,) = sample(engine_of(target, draft, tree, scheme), [params], SEQUENCES, seed)
    assert seen.total() == SEQUENCES
    assert p_value(seen, sequence_law(warped(target, params), 3)) > LEVEL


def test_law_of_rows_with_different_settings_in_one_batch() -> None:
    target, draft = table(5, 21), table(5, 1021, sharpness=0.5)
    counts = sample(engine_of(target, draft, "2x2", "mcss-wor"), MIXED, SEQUENCES, 21)
    for seen, params in zip(counts, MIXED, strict=True):
        assert p_value(seen, sequence_law(warped(target, params), 3)) > LEVEL


@pytest.mark.parametrize("scheme", ["mcss-wor", "mcss", "traversal"])
def test_law_at_a_larger_vocabulary_with_an_irregular_tree(scheme: str) -> None:
    target, draft = table(8, seed=5), table(8, seed=6)
    params = mcsd.SamplingParams(temperature=0.7, top_k=6, min_p=0.02, max_new_tokens=3)
    engine = engine_of(target, draft, [-1, -1, -1, 0, 0, 1, 3], scheme)
    (seen,) = sample(engine, [params], SEQUENCES, 77)
    assert p_value(seen, sequence_law(warped(target, params), 3)) > LEVEL


@pytest.mark.parametrize("draft", ["no overlap", "equal", "one-hot"])
def test_law_with_extreme_drafts(draft: str) -> None:
    """A draft that never proposes what the target wants, one that is the target, and one that is sure of itself."""
    target = table(6, seed=8)
    target[:, 3:] = 0.0
    target = target / target.sum(-1, keepdim=True)
    q = {
        "no overlap": torch.cat([torch.zeros(6, 3), torch.full((6, 3), 1 / 3)], dim=1).double(),
        "equal": target,
        "one-hot": torch.eye(6).double().roll(1, dims=1),
    }[draft]
    (seen,) = sample(engine_of(target, q, "2x2", "mcss-wor"), [PLAIN], SEQUENCES, 99)
    assert p_value(seen, sequence_law(target, 3)) > LEVEL


class Broken(McssWithoutReplacement):
    """Judges by a q that is 5 % smaller than the one it drew from."""

    def judge_node(self, node: Node, random: Randomness) -> tuple[Tensor, Tensor]:
        weaker = SparseDistributions(node.q.support, node.q.weights * 0.95)
        return super().judge_node(replace(node, q=weaker), random)


class NewQ(McssWithoutReplacement):
    """Judges draws without replacement as if they were independent."""

    without_replacement = False


@pytest.mark.parametrize("scheme", [Broken(), NewQ()], ids=lambda scheme: type(scheme).__name__)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_broken_scheme_is_rejected(
    scheme: McssWithoutReplacement, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The power is that on these tables, wherever the laws' seeds are moved.
    monkeypatch.setattr("chisquare.SEED", 0)
    target, draft = table(5, seed=3), table(5, seed=1003, sharpness=0.5)
    (seen,) = sample(engine_of(target, draft, "3x2", scheme), [PLAIN], SEQUENCES, seed)
    assert p_value(seen, sequence_law(target, 3)) < LEVEL
