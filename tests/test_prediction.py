"""Predicted output: a source of candidates that changes no text, alone and beside a draft."""

import random
from typing import Any

import pytest
import torch

import mcsd
from mcsd.drafters import MixedDrafter
from mcsd.errors import InvalidParameter, TokenOutOfVocabulary
from mcsd.models import TransformersModel
from mcsd.models.bound_head import BoundHead
from mcsd.models.draft_head import DraftHead, HeadConfig
from mcsd.planning import LookUpPlan
from support.parity import compare, reference
from support.tiny import VOCABULARY, tiny

NEW = 40
PROMPTS = [[5, 6, 7], [9, 8], [1, 2, 3, 4, 1, 2], [11]]


def network(seed: int) -> Any:
    """A tiny model whose attention matters."""
    model = tiny("llama", seed)
    for layer in model.model.layers:
        for parameter in layer.parameters():
            if parameter.dim() > 1:
                parameter.data *= 8
    model.lm_head.weight.data *= 20
    return model


def draft_of(kind: str, target: TransformersModel) -> Any:
    if kind == "ngram":
        return kind
    if kind == "model":
        return network(1)
    torch.manual_seed(0)
    return BoundHead(DraftHead(HeadConfig("tiny", VOCABULARY, 32, (1, -1), 1, VOCABULARY)), target, "head")


def damaged(tokens: list[int], seed: int, share: float = 0.1) -> list[int]:
    """Tokens of which a share is replaced, left out or preceded by another one."""
    chance, found = random.Random(seed), []
    for token in tokens:
        change = chance.choice(("replace", "leave out", "insert")) if chance.random() < share else ""
        if change in ("replace", "insert"):
            found.append(chance.randrange(VOCABULARY))
        if change in ("", "insert"):
            found.append(token)
    return found


@pytest.mark.parametrize("tree", ["2x1", "chain:4"])
@pytest.mark.parametrize("kind", ["ngram", "model", "head"])
def test_the_text_is_that_of_generate(kind: str, tree: str) -> None:
    """In a batch of right, damaged, wrong and missing predictions; the right ones shorten it."""
    target = TransformersModel(network(0))
    engine = mcsd.Engine(target, draft_of(kind, target), tree=tree, max_batch=4, max_length=64)
    expected = [reference(target.network, prompt, NEW) for prompt in PROMPTS]
    predictions = [list(expected[0]), damaged(list(expected[1]), 0), list(range(50, 90)), None]
    params = [mcsd.SamplingParams(temperature=0, max_new_tokens=NEW, prediction=each) for each in predictions]
    done = engine.generate(PROMPTS, params)
    assert compare(target.network, expected, PROMPTS, done) == 0
    assert done[0].stats.mean_acceptance_length > 2.5
    assert done[1].stats.mean_acceptance_length > 2
    assert isinstance(engine.drafter, MixedDrafter) == (kind != "ngram")


@pytest.mark.parametrize("seed", range(3))
def test_a_tenth_of_wrong_tokens_leaves_long_steps(seed: int) -> None:
    target = network(seed)
    engine = mcsd.Engine(target, "ngram", tree="chain:12")
    text = list(engine.generate([1, 2, 3], temperature=0, max_new_tokens=200).token_ids)
    done = engine.generate([1, 2, 3], temperature=0, max_new_tokens=200, prediction=damaged(text, seed))
    assert list(done.token_ids) == text
    assert done.stats.mean_acceptance_length > 3


def test_the_draft_reads_what_was_looked_up() -> None:
    """A draft that is the target itself has the right candidate in every step, whatever was accepted before."""
    # No chain is expected to be longer than this tree, so the draft is never left out.
    engine = mcsd.Engine(network(0), network(0), tree="chain:17")
    text = list(engine.generate([1, 2, 3], temperature=0, max_new_tokens=120).token_ids)
    done = engine.generate([1, 2, 3], temperature=0, max_new_tokens=120, prediction=damaged(text, 1, share=0.3))
    assert list(done.token_ids) == text
    histogram = done.stats.acceptance_histogram
    assert not histogram[0]
    # Looked-up chains were accepted up to their first wrong token.
    assert sum(histogram[1:17]) > 1


def test_sampled_completions_share_a_prediction() -> None:
    target = network(0)
    engine = mcsd.Engine(target, network(1), tree="2x1")
    done = engine.generate([1, 2, 3], n=3, seed=5, max_new_tokens=20, prediction=[4] * 20)
    alone = engine.generate([1, 2, 3], seed=5, max_new_tokens=20, prediction=[4] * 20)
    assert done[0].token_ids == alone.token_ids


def test_predictions_that_cannot_be() -> None:
    engine = mcsd.Engine(tiny("llama"), "ngram")
    with pytest.raises(TokenOutOfVocabulary, match="token id 96"):
        engine.generate([1], prediction=[96])
    with pytest.raises(InvalidParameter, match="needs a tokenizer"):
        engine.generate([1], prediction="a text")


def test_tree_auto_takes_chains_as_long_as_they_are_worth() -> None:
    """Long where the prediction is right, none where copies were wrong."""
    target = network(0)
    engine = mcsd.Engine(target, "ngram", tree="auto")
    text = list(engine.generate([1, 2, 3], temperature=0, max_new_tokens=100).token_ids)
    assert isinstance(engine.plan, LookUpPlan)
    assert engine.plain_seconds
    # Measured costs differ from run to run.
    engine.drafter.cost = lambda batch_size, nodes: 1 + 0.1 * nodes  # type: ignore[attr-defined]
    good = engine.generate([1, 2, 3], temperature=0, max_new_tokens=100, prediction=text).stats
    assert good.mean_acceptance_length > 2.5
    wrong = engine.generate([1, 2, 3], temperature=0, max_new_tokens=100, prediction=[95] * 100).stats
    assert wrong.draft_tokens < 2.5 * wrong.new_tokens
