"""Exact laws: the outcomes of the shipped drafter and verification, enumerated, sum to the target's law.

A case is a scheme and a tree; an instance is a random pair of tables. Single nodes with up to 4 candidates among 5
tokens, chains to depth 3, branching trees of depth 2 among 3 tokens, with zeros, one-hots, ties and p = q. What a step
emits may have any length up to depth + 1; the target's own law completes it. The sums agree to 1e-12.
"""

import os

import pytest
import torch
from torch import Tensor

import mcsd
from mcsd.drafters import ModelDrafter
from mcsd.models import TokenLayout
from mcsd.sampling import BatchSamplingParams
from mcsd.schemes import CandidateTree, TokenHistory
from mcsd.testing import TabularModel
from support.chisquare import SEED, runnable
from support.distributions import distributions
from support.enumeration import Decisions, Enumerated, enumerate_all

INSTANCES = int(os.environ.get("MCSD_LAW_INSTANCES", "9"))
"""Instances of each case; ``make laws`` runs more."""

TREES = {
    **dict.fromkeys(("1", "2", "3", "4"), 5),
    **dict.fromkeys(("chain:2", "chain:3", "2x1", "2x2", "3x1", "parents:-1,-1,0,0,1"), 3),
}
"""Vocabulary by tree."""

CASES = runnable(*TREES)
TOLERANCE = 1e-12


def instances(count: int, vocabulary: int, seed: int) -> tuple[Tensor, Tensor]:
    """``[count, V, V]`` twice: target and draft by last token, a tenth of the rows equal."""
    generator = torch.Generator().manual_seed(seed)
    target = distributions(count * vocabulary, vocabulary, generator)
    draft = distributions(count * vocabulary, vocabulary, generator)
    same = torch.rand(len(target), generator=generator) < 0.1
    draft[same] = target[same]
    return target.view(count, vocabulary, vocabulary), draft.view(count, vocabulary, vocabulary)


def law_of_a_step(target: Tensor, draft: Tensor, tree: str, scheme: str) -> tuple[Tensor, Tensor]:
    """One step of every instance. Instance i has tokens iV ... iV + V - 1 of one vocabulary: all run in one batch.

    Returns:
        The law of the first depth + 1 tokens ``[count, V, ..., V]``, where the target completes the tokens of a step;
        and the mean number of tokens the step emits ``[count]``.
    """
    count, size, _ = target.shape
    models = [TabularModel(torch.block_diag(*tables)) for tables in (target, draft)]
    shape, verifier = mcsd.TreeShape.parse(tree), mcsd.SCHEMES[scheme]()
    length = shape.depth + 1
    mass = [torch.zeros(count, *[size] * n, dtype=torch.float64) for n in range(1, length + 1)]

    def run(decisions: Decisions, start: Tensor) -> list[list[int]]:
        runs = torch.arange(len(start))
        texts = [[int(s) * size] for s in start]
        drafter = ModelDrafter(models[1], count * size, len(start), 2 + length + len(shape))
        for text in texts:
            drafter.add(text, None)
        random = Enumerated(decisions, runs)
        sampling = BatchSamplingParams.of([mcsd.SamplingParams()] * len(start), torch.device("cpu"))
        drawn: CandidateTree = drafter.draft(texts, shape, verifier, sampling, random)
        columns = torch.cat([start[:, None] * size, drawn.tokens], dim=1)
        logits = models[0].forward(columns, TokenLayout.tree(shape), models[0].new_cache(len(start), 1)).logits
        result = verifier.verify(drawn, logits, sampling, TokenHistory(texts, [[]] * len(start)), random)
        assert not result.failed.any()
        path = drawn.tokens.gather(1, result.path.clamp(min=0)).tolist()
        accepted, last = result.accepted.tolist(), result.token.tolist()
        return [[*path[i][: accepted[i]], last[i]] for i in range(len(start))]

    total = torch.zeros(count, dtype=torch.float64)
    for start, emitted, chance in enumerate_all(count, run):
        total.index_add_(0, start, chance)
        for one, tokens, probability in zip(start.tolist(), emitted, chance.tolist(), strict=True):
            assert all(token // size == one for token in tokens) or probability < TOLERANCE
            mass[len(tokens) - 1][(one, *[token % size for token in tokens])] += probability
    assert (total - 1).abs().max() < TOLERANCE
    law, tokens = mass[0], mass[0].flatten(1).sum(-1)
    for emitted, longer in enumerate(mass[1:], start=2):
        law = law[..., None] * _after(target, law.dim() - 1) + longer
        tokens = tokens + emitted * longer.flatten(1).sum(-1)
    return law, tokens


def target_law(target: Tensor, length: int) -> Tensor:
    """``[count, V, ..., V]``: the target's law of ``length`` tokens after token 0."""
    law = target[:, 0]
    for _ in range(length - 1):
        law = law[..., None] * _after(target, law.dim() - 1)
    return law


def _after(target: Tensor, known: int) -> Tensor:
    """``[count, 1, ..., V, V]``: the next token by the last of ``known`` tokens."""
    count, size, _ = target.shape
    return target.view(count, *[1] * (known - 1), size, size)


@pytest.mark.parametrize(("scheme", "tree"), runnable("1", "2", "4", "chain:2"))
@pytest.mark.parametrize("support", [2, 3])
def test_law_with_a_sparse_q(scheme: str, tree: str, support: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft's support is smaller than the vocabulary, and sometimes than the number of candidates."""
    monkeypatch.setattr("mcsd.drafters.level.SUPPORT", support)
    target, draft = instances(INSTANCES, TREES[tree], seed=1000 * SEED + 500 + support)
    law, _ = law_of_a_step(target, draft, tree, scheme)
    assert (law - target_law(target, law.dim() - 1)).abs().max() <= TOLERANCE


@pytest.mark.parametrize(("scheme", "tree"), CASES)
def test_law(scheme: str, tree: str) -> None:
    target, draft = instances(INSTANCES, TREES[tree], seed=1000 * SEED + CASES.index((scheme, tree)))
    law, _ = law_of_a_step(target, draft, tree, scheme)
    assert (law - target_law(target, law.dim() - 1)).abs().max() <= TOLERANCE


@pytest.mark.parametrize(
    ("tree_level", "node_level", "tree"),
    [
        *(("block", "mcss", tree) for tree in ("chain:2", "chain:3")),
        *(("traversal", "mcss-wor", tree) for tree in ("chain:3", "2x1", "2x2", "3x1")),
    ],
)
def test_tree_level_verification_accepts_no_less(tree_level: str, node_level: str, tree: str) -> None:
    """No less for every pair of tables, and more on average."""
    target, draft = instances(40, 3, seed=1000 * SEED + 700)
    gain = law_of_a_step(target, draft, tree, tree_level)[1] - law_of_a_step(target, draft, tree, node_level)[1]
    assert gain.min() >= -TOLERANCE
    assert gain.mean() > 0.005
