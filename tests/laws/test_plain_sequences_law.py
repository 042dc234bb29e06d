"""Sequences without candidates beside others: both follow the target's distribution, and a seed keeps its text."""

from dataclasses import replace

import pytest
import torch

import mcsd
from laws.test_exact_engine import check, engine_law, network, target_law
from mcsd.planning import Planner, Profile
from mcsd.testing import TabularModel
from planning.test_planner import CHEAP, GOOD
from support.chisquare import runnable, table


@pytest.mark.parametrize(("scheme", "tree"), runnable("2", "chain:2", "2x1"))
def test_law_of_texts(scheme: str, tree: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exact, all outcomes enumerated; one batch has all texts of a round."""
    size = 3 if tree == "2" else 2
    target = network(size, 1)
    engine = mcsd.Engine(target, network(size, 2), tree=tree, scheme=scheme, max_batch=2048, max_length=16)
    params = mcsd.SamplingParams(temperature=0.8, max_new_tokens=2)
    plain, longer = replace(params, speculative=False), replace(params, max_new_tokens=6)
    expected = target_law(target, 2, 0.8)
    # Each runs as long as the request beside it, or longer: all its steps are of a mixed batch.
    check(engine_law(engine, params, monkeypatch, [plain]), expected)
    check(engine_law(engine, plain, monkeypatch, [longer]), expected)


class DraftWithoutNumbers(TabularModel):
    """Its distribution after token 0 is NaN."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__(rows)
        self._logits[0] = torch.nan


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("scheme", ["mcss-wor", "top-k", "traversal"])
@pytest.mark.parametrize("adapts", [False, True])
def test_a_seed_gives_the_text_of_plain_decoding(scheme: str, adapts: bool, temperature: float) -> None:
    target, draft = TabularModel(table(5, 1).float()), TabularModel(table(5, 2).float())
    tree = Planner(Profile(CHEAP, GOOD, GOOD), scheme) if adapts else "2x2"
    engine = mcsd.Engine(target, draft, tree=tree, scheme=scheme, max_batch=4, max_length=256)
    plain = mcsd.Engine(target, tree="none", max_length=256)
    params = mcsd.SamplingParams(temperature=temperature, max_new_tokens=40, seed=9, speculative=False)
    other = mcsd.SamplingParams(max_new_tokens=60)
    expected = plain.generate([0, 1], params).token_ids
    alone = engine.generate([0, 1], params)
    beside = engine.generate([[2], [0, 1], [3]], [other, params, other])
    assert [alone.token_ids, beside[1].token_ids] == [expected] * 2
    assert alone.stats.draft_tokens == beside[1].stats.draft_tokens == 0
    assert beside[0].stats.draft_tokens > 0


def test_a_draft_cannot_fail_them() -> None:
    target, broken = TabularModel(table(5, 1).float()), DraftWithoutNumbers(table(5, 2).float())
    engine = mcsd.Engine(target, broken, tree="2", max_batch=2, max_length=256)
    plain = mcsd.SamplingParams(max_new_tokens=4, speculative=False, logit_bias={0: 1e4})
    other = mcsd.SamplingParams(max_new_tokens=4, logit_bias={0: -1e4})
    assert engine.generate([1, 2], plain).token_ids == (0, 0, 0, 0)
    done = engine.generate([[1, 2], [1, 2]], [plain, other])
    assert [each.finish_reason for each in done] == ["length", "length"]
    with pytest.raises(mcsd.errors.NonFiniteLogits):
        engine.generate([1, 2], replace(plain, speculative=True))


def test_look_up_and_predictions_are_not_for_them() -> None:
    target = TabularModel(table(5, 1).float())
    plain = mcsd.SamplingParams(max_new_tokens=40, temperature=0, speculative=False, prediction=[1] * 40)
    other = mcsd.SamplingParams(max_new_tokens=40, temperature=0)
    engine = mcsd.Engine(target, "ngram", tree="chain:3", max_batch=2, max_length=256)
    expected = engine.generate([0, 1] * 9, other)
    assert expected.stats.draft_tokens > 0
    done = engine.generate([[0, 1] * 9] * 2, [plain, other])
    assert [each.token_ids for each in done] == [expected.token_ids] * 2
    assert done[0].stats.draft_tokens == 0 < done[1].stats.draft_tokens
    drawn = mcsd.Engine(target, TabularModel(table(5, 2).float()), tree="chain:2", scheme="block", max_length=256)
    assert drawn.generate([0, 1], plain).stats.draft_tokens == 0
    with pytest.raises(mcsd.errors.InvalidParameter):
        drawn.generate([0, 1], replace(plain, speculative=True))
