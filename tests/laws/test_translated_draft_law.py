"""Exact laws of the whole engine with a draft that has another tokenizer, as in `test_exact_engine`.

Target and draft split the prompt otherwise. Each has tokens that the other lacks; the draft's have mass in every
distribution. In the target's tokenizer "b" is beyond the model's vocabulary.
"""

import pytest

import mcsd
from laws.test_exact_engine import PROMPT, check, engine_law, network, target_law
from mcsd.models import TransformersModel
from mcsd.models.vocabulary_map import TranslatedModel
from support.chisquare import runnable
from support.small_tokenizers import pieces, translated

TARGET = pieces({"a": 0, "bc": 1, "c": 2, "b": 3}, [("b", "c")])
DRAFT = pieces({"c": 0, "b": 1, "a": 2, "ab": 3}, [("a", "b")])


def draft() -> TranslatedModel:
    return translated(TransformersModel(network(3, 1)), TARGET, TransformersModel(network(4, 2)), DRAFT)


@pytest.mark.parametrize(("scheme", "tree"), [*runnable("2", "chain:2"), ("mcss-wor", "2x1"), ("traversal", "2x1")])
def test_law_of_texts(scheme: str, tree: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = network(3, 1)
    engine = mcsd.Engine(target, draft(), tree=tree, scheme=scheme, max_batch=512, max_length=16)
    params = mcsd.SamplingParams(temperature=0.8, max_new_tokens=3)
    check(engine_law(engine, params, monkeypatch), target_law(target, 3, 0.8))


def test_the_prompt_is_split_otherwise_and_two_tokens_are_shared() -> None:
    model = draft()
    assert TARGET.decode(PROMPT) == "abc"
    assert DRAFT.decode(model.vocabulary_map.encode(PROMPT)[0]) == "ab"
    assert model.vocabulary.tolist() == [2, 0]
    assert model.columns.tolist() == [0, 2]
