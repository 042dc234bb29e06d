"""Looked-up candidates beside drawn ones keep the target's law: exactly for whole engines, and by chi-square.

The chain is always proposed, right or wrong, and every scheme that may stand beside it verifies the drawn candidates.
False alarms and power of the chi-square tests are those of `test_engine_law`, with a level of 10⁻³ for this file.
"""

from typing import Any

import pytest
import torch

import mcsd
from laws.test_engine_law import draft_of, p_values
from laws.test_exact_engine import check, engine_law, head, network, target_law
from mcsd.drafters import MixedDrafter, NgramDrafter
from mcsd.models import TransformersModel
from mcsd.schemes.mixed_shape import MixedShape
from mcsd.schemes.registry import REGISTRY
from mcsd.testing import TabularModel
from support.chisquare import BLOCKS, others_slow, runnable, table

MIXING = [(scheme, tree) for scheme, tree in runnable("2", "chain:2", "2x1") if not REGISTRY[scheme].tree_level]


def eager(engine: mcsd.Engine) -> mcsd.Engine:
    """The engine, always proposing what it looks up."""
    assert isinstance(engine.drafter, MixedDrafter | NgramDrafter)
    engine.drafter.cost = lambda batch_size, nodes: 1 / (1 + nodes)
    return engine


def shapes_of(engine: mcsd.Engine) -> list[Any]:
    """The mixed shapes of the steps that the engine is about to run."""
    shapes: list[Any] = []
    draft = engine.drafter.draft

    def recorded(*args: Any) -> Any:
        tree = draft(*args)
        shapes.append(tree.mixed)
        return tree

    engine.drafter.draft = recorded  # type: ignore[method-assign]
    return shapes


@pytest.mark.parametrize(("scheme", "tree"), MIXING)
def test_law_of_texts(scheme: str, tree: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size, length = (3, 2) if tree == "2" else (2, 3)
    target = network(size, 1)
    engine = mcsd.Engine(target, [network(size, 2), "ngram"], tree=tree, scheme=scheme, max_batch=512, max_length=16)
    shapes = shapes_of(eager(engine))
    params = mcsd.SamplingParams(temperature=0.8, max_new_tokens=length, prediction=(1, 0))
    check(engine_law(engine, params, monkeypatch), target_law(target, length, 0.8))
    drawn = {mcsd.TreeShape.parse(tree)}
    # Where verification does not read q, the looked-up chain may take the place of the draft.
    may_stand_alone = not mcsd.SCHEMES[scheme].needs_q
    allowed = drawn | {mcsd.TreeShape.parse("none")} if may_stand_alone else drawn
    assert drawn <= {shape.drawn for shape in shapes if shape} <= allowed


@pytest.mark.parametrize("scheme", ["mcss-wor", "mcss"])
def test_law_of_texts_with_a_head(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The draft head reads accepted tokens again, looked-up ones too."""
    target = TransformersModel(network(3, 3))
    engine = mcsd.Engine(target, [head(target), "ngram"], tree="2x1", scheme=scheme, max_batch=512, max_length=16)
    params = mcsd.SamplingParams(max_new_tokens=2, prediction=(1, 0))
    check(engine_law(eager(engine), params, monkeypatch), target_law(target.network, 2, 1.0))


def test_law_of_texts_without_a_draft(monkeypatch: pytest.MonkeyPatch) -> None:
    target = network(3, 1)
    engine = mcsd.Engine(target, "ngram", tree="chain:3", max_batch=512, max_length=16)
    params = mcsd.SamplingParams(temperature=0.8, max_new_tokens=3, prediction=(1, 0, 1))
    check(engine_law(eager(engine), params, monkeypatch), target_law(target, 3, 0.8))


SETTINGS = [
    mcsd.SamplingParams(),
    mcsd.SamplingParams(temperature=0.7, top_p=0.9),
    mcsd.SamplingParams(temperature=0),
    mcsd.SamplingParams(prediction=[1, 4, 2, 0, 3] * 10),
]
DRAFTS = {"3x2": "another", "2x1": "sharper"}
GROUPS = [(scheme, tree) for scheme, tree in runnable(*DRAFTS) if not REGISTRY[scheme].tree_level]
LEVEL = 1e-3 / (2 * len(GROUPS) * (len(SETTINGS) + 1))


def mixed_engine(target: torch.Tensor, draft: torch.Tensor, tree: str, scheme: str) -> mcsd.Engine:
    models = TabularModel(target.float()), [TabularModel(draft.float()), "ngram"]
    return eager(mcsd.Engine(*models, tree=tree, scheme=scheme, max_batch=2048, max_length=3 * BLOCKS + 8))


@pytest.mark.parametrize(
    ("scheme", "tree"), others_slow(GROUPS, lambda scheme, tree: tree == "2x1" or scheme == "mcss-wor")
)
def test_law(scheme: str, tree: str) -> None:
    seed = GROUPS.index((scheme, tree))
    target = table(5, seed)
    engine = mixed_engine(target, draft_of(DRAFTS[tree], target, seed), tree, scheme)
    assert min(p_values(engine, target, SETTINGS, seed=7)) > LEVEL


def test_a_seed_gives_the_same_text_beside_other_sequences() -> None:
    """Those of others may have chains where this one has none: it draws the same numbers."""
    target, draft = table(5, 3), table(5, 4)
    params = mcsd.SamplingParams(seed=11, max_new_tokens=40)
    alone, together = (
        mcsd.Engine(TabularModel(target.float()), [TabularModel(draft.float()), "ngram"], tree="2x1", max_batch=9)
        for _ in range(2)
    )
    others = [mcsd.SamplingParams(seed=i, max_new_tokens=40, prediction=[i % 5] * 40) for i in range(8)]
    expected = alone.generate([0, 1], params).token_ids
    assert together.generate([[0, 1]] * 9, [*others[:4], params, *others[4:]])[4].token_ids == expected


@pytest.mark.parametrize("tree", ["none", "2x1", "chain:3", "3"])
@pytest.mark.parametrize("chain", [1, 2, 5])
def test_the_chain_is_the_first_node_of_its_depths(tree: str, chain: int) -> None:
    mixed = MixedShape(mcsd.TreeShape.parse(tree), chain)
    nodes = [column - 1 for column in mixed.chain_columns[1:]]
    assert [mixed.shape.parents[node] for node in nodes] == [-1, *nodes[:-1]]
    assert sorted(mixed.order) == list(range(chain + len(mixed.drawn)))
    for node, number in enumerate(mixed.drawn_nodes):
        if number >= 0:
            parent = mixed.shape.parents[node]
            assert (mixed.drawn_nodes[parent] if parent >= 0 else -1) == mixed.drawn.parents[number]
            assert mixed.drawn_path([node]) == [number]
        else:
            assert mixed.drawn_path([node]) is None
