"""The engine's outputs follow the target's law: every scheme on several trees, with several sampling parameters.

A case is a scheme, a tree, a draft and a setting. The settings of a group run mixed in the same batches, together with
sequences at temperature 0. Of 10⁴ blocks of three tokens a case two things are tested: the blocks, which show dependent
errors, and the single transitions, which show smaller errors; for each case, and for each group's cases together.

False alarms. The level for the family of all these hypotheses is 10⁻³: a correct engine fails this file on one seed in
a thousand at most, and since the seeds are fixed it fails always or never. A test fails if its p-value is below the
family's level over the number of hypotheses: Holm's first step, so whether any fails does not depend on the others.

Power (`test_a_broken_scheme_is_rejected`). With a verification wrong by 10 % the p-values of a group are below 10⁻²⁰;
by 5 %, 8·10⁻¹⁵ with one seed and 4·10⁻⁴ with another; by 2 %, 10⁻⁴ and .06. Exact enumeration finds smaller errors; the
random numbers, which enumeration replaces, are tested here.
"""

import os

import pytest
import torch
from torch import Tensor

import mcsd
from mcsd.schemes import Scheme
from support.broken_schemes import Broken, NewQ
from support.chisquare import (
    block_law,
    chi_square,
    engine_of,
    others_slow,
    p_value,
    runnable,
    sample,
    table,
    transitions,
    warped,
)

SEQUENCES = int(os.environ.get("MCSD_LAW_SEQUENCES", "10000"))
"""Blocks of a case; ``make laws`` runs a million."""

SETTINGS = [
    mcsd.SamplingParams(),
    mcsd.SamplingParams(temperature=0.7, top_p=0.9),
    mcsd.SamplingParams(temperature=1.4, top_k=3),
    mcsd.SamplingParams(min_p=0.15),
    mcsd.SamplingParams(temperature=0),
]
FEWER = SETTINGS[:2]

DRAFTS = {"3x2": "another", "chain:2": "sharper", "2x2x1": "cut"}
"""The draft for each tree: see `draft_of`."""

GROUPS = runnable(*DRAFTS)
EXTREMES = ["no overlap", "equal", "one-hot"]
SMALL = dict(runnable("chain:2", "2x2"))
"""For each scheme a small tree, with branches if it supports them."""

_CASES = len(GROUPS) * (len(SETTINGS) + 1) + len(SMALL) * len(EXTREMES) * (len(FEWER) + 1) + 3 + 4
LEVEL = 1e-3 / (2 * _CASES)


def draft_of(kind: str, target: Tensor, seed: int) -> Tensor:
    """A draft's table.

    Independent of the target; the target at temperature 0.6; probability 0 for the target's second most probable token;
    support disjoint from the target's, which is half of the tokens; equal to the target; one-hot.
    """
    size = len(target)
    match kind:
        case "another":
            return table(size, seed + 1000, sharpness=0.5)
        case "sharper":
            return (target.log() / 0.6).softmax(-1)
        case "cut":
            q = table(size, seed + 1000, sharpness=0.5).scatter(1, target.topk(2, dim=1).indices[:, 1:], 0.0)
            return q / q.sum(-1, keepdim=True)
        case "no overlap":
            return torch.cat([torch.zeros(size, size // 2), torch.ones(size, size - size // 2)], 1).double() / (
                size - size // 2
            )
        case "one-hot":
            return torch.eye(size).double().roll(1, dims=1)
    return target


def check(engine: mcsd.Engine, target: Tensor, settings: list[mcsd.SamplingParams], seed: int) -> None:
    """Test every setting, and all together, against the target's law."""
    assert min(p_values(engine, target, settings, seed)) > LEVEL


def p_values(engine: mcsd.Engine, target: Tensor, settings: list[mcsd.SamplingParams], seed: int) -> list[float]:
    """p-values of all settings together and of each, by blocks and then by transitions."""
    counts = sample(engine, settings, SEQUENCES, seed)
    assert all(one.sum() >= SEQUENCES for one in counts)
    laws = [warped(target, params) for params in settings]
    blocks = [chi_square(one, block_law(law)) for one, law in zip(counts, laws, strict=True)]
    single = [chi_square(transitions(one), law) for one, law in zip(counts, laws, strict=True)]
    return [value for part in (blocks, single) for value in (p_value(*part), *map(p_value, part))]


@pytest.mark.parametrize(
    ("scheme", "tree"), others_slow(GROUPS, lambda scheme, tree: tree != "3x2" or scheme == "mcss-wor")
)
def test_law(scheme: str, tree: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seed = GROUPS.index((scheme, tree))
    target = table(5, seed)
    if DRAFTS[tree] == "cut":
        monkeypatch.setattr("mcsd.drafters.level.SUPPORT", 4)
    check(engine_of(target, draft_of(DRAFTS[tree], target, seed), tree, scheme), target, SETTINGS, seed)


@pytest.mark.parametrize("draft", EXTREMES)
@pytest.mark.parametrize(("scheme", "tree"), SMALL.items())
def test_law_with_extreme_drafts(scheme: str, tree: str, draft: str) -> None:
    target = table(6, seed=8)
    target[:, 3:] = 0.0
    target = target / target.sum(-1, keepdim=True)
    check(engine_of(target, draft_of(draft, target, 8), tree, scheme), target, FEWER, 99)


@pytest.mark.parametrize("scheme", ["mcss-wor", "mcss", "traversal"])
def test_law_at_a_larger_vocabulary_with_an_irregular_tree(scheme: str) -> None:
    target = table(8, seed=5)
    settings = [mcsd.SamplingParams(temperature=0.7, top_k=6, min_p=0.02)]
    check(engine_of(target, table(8, seed=6), [-1, -1, -1, 0, 0, 1, 3], scheme), target, settings, 77)


@pytest.mark.parametrize("scheme", [Broken(), NewQ()], ids=lambda scheme: type(scheme).__name__)
@pytest.mark.parametrize("seed", [1, 2])
def test_a_broken_scheme_is_rejected(scheme: Scheme, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The power is known for these tables, so `SEED` does not apply.
    monkeypatch.setattr("support.chisquare.SEED", 0)
    target = table(5, seed=3)
    engine = engine_of(target, draft_of("another", target, 3), "3x2", scheme)
    assert min(p_values(engine, target, SETTINGS, seed)) < LEVEL
