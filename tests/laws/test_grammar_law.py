"""Exact laws of texts in a grammar: token by token, the target's distribution renormalised over what may follow.

The grammars have few words, so what may follow is read from a list of them, without a parser. Tokens are bytes and one
pair of them, so a word has several tokenizations, and each has a probability of its own.
"""

import re
from collections import defaultdict
from itertools import product
from typing import Any

import pytest
import torch
from transformers import TopKLogitsWarper

import mcsd
from laws.test_exact_engine import PROMPT, Law, check, engine_law, head, network
from mcsd.models import TransformersModel
from support.chisquare import runnable
from support.small_tokenizers import byte_level, translated

TOKENIZER = byte_level(["ab", "<eos>"], [("a", "b")])
TOKENIZER.add_special_tokens({"eos_token": "<eos>"})
SIZE = len(TOKENIZER)
EOS: int = TOKENIZER.eos_token_id
BYTES: dict[str, int] = {text: TOKENIZER.convert_tokens_to_ids(text) for text in ("a", "b", "ab", "c")}

REGEX = "(ab|b|ba?b)(a|ab)?"
WORDS = {word for size in range(6) for word in map("".join, product("ab", repeat=size)) if re.fullmatch(REGEX, word)}
GIVEN: dict[str, Any] = {
    "regex": {"regex": REGEX},
    "grammar": {"grammar": 'start: first last?\nfirst: "a" "b" | "b" | "b" "a"? "b"\nlast: "a" "b"?'},
}


def allowed(text: str, words: set[str] = WORDS) -> list[int]:
    """The tokens that may follow a text."""
    found = [token for piece, token in BYTES.items() if any(word.startswith(text + piece) for word in words)]
    return sorted([*found, *([EOS] if text in words else [])])


def constrained_law(model: Any, length: int, temperature: float, top_k: int = 0) -> Law:
    law: Law = defaultdict(float)
    texts = {token: piece for piece, token in BYTES.items()}

    def go_on(tokens: tuple[int, ...], text: str, chance: float) -> None:
        if len(tokens) == length or EOS in tokens:
            law[tokens] += chance
            return
        may_follow = allowed(text)
        with torch.no_grad():
            scores = model(torch.tensor([[*PROMPT, *tokens]])).logits[:, -1]
        scores = torch.full_like(scores, -torch.inf).index_copy(1, torch.tensor(may_follow), scores[:, may_follow])
        scores = scores / temperature
        scores = TopKLogitsWarper(top_k)(None, scores) if top_k else scores
        for token in may_follow:
            if p := float(scores.softmax(-1)[0, token]):
                go_on((*tokens, token), text + texts.get(token, ""), chance * p)

    go_on((), "", 1.0)
    return law


def engine_of(target: Any, draft: Any, tree: str, scheme: str = "mcss-wor", batch: int = 512) -> mcsd.Engine:
    return mcsd.Engine(target, draft, TOKENIZER, tree=tree, scheme=scheme, max_batch=batch, max_length=16)


@pytest.fixture(autouse=True)
def small_support(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the draft has no token that may follow, all that it may draw are enumerated."""
    monkeypatch.setattr("mcsd.drafters.level.SUPPORT", 4)


def test_candidates_are_in_the_grammar() -> None:
    """Any draft is lossless; one that is masked at each node by its own path proposes what may follow."""
    target = network(SIZE, 8, EOS)
    engine = engine_of(target, network(SIZE, 9), "2x2x1", batch=1)
    texts, drafted = {token: piece for piece, token in BYTES.items()}, 0
    for seed in range(8):
        before: list[int] = []
        params = mcsd.SamplingParams(max_new_tokens=8, regex=REGEX, seed=seed)
        for chunk in engine.stream(PROMPT, params, trace=True):
            trace = chunk.trace
            assert trace is not None
            for parent, token in zip(trace.parents, trace.token_ids, strict=True):
                path = []
                while parent >= 0:
                    path, parent = [trace.token_ids[parent], *path], trace.parents[parent]
                whole = [*before, *path]
                if token is None or EOS in whole:
                    continue
                text = "".join(texts[each] for each in whole if each is not None and each in texts)
                assert token in allowed(text)
                drafted += 1
            before += chunk.token_ids
    assert drafted > 8


FAST = [("mcss-wor", "2x1"), ("block", "chain:2"), ("traversal", "2x1"), ("mcss", "2"), ("k-seq", "2")]
MINUTES = [("k-seq", "2x1"), ("naive", "2x1")]
ALL = [one for one in runnable("2", "chain:2", "2x1") if one not in MINUTES]


@pytest.mark.parametrize(
    ("scheme", "tree"), [*FAST, *(pytest.param(*one, marks=pytest.mark.slow) for one in ALL if one not in FAST)]
)
def test_law_of_texts(scheme: str, tree: str, monkeypatch: pytest.MonkeyPatch) -> None:
    target = network(SIZE, 1, EOS)
    engine = engine_of(target, network(SIZE, 2), tree, scheme)
    params = mcsd.SamplingParams(temperature=0.8, max_new_tokens=4, regex=REGEX)
    check(engine_law(engine, params, monkeypatch), constrained_law(target, 4, 0.8))


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("top_k", [0, 2])
def test_law_of_texts_with_a_head(given: str, top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head has no end of text: where nothing else may follow, its candidates are rejected."""
    target = TransformersModel(network(SIZE, 3, EOS))
    engine = engine_of(target, head(target), "2x1")
    params = mcsd.SamplingParams(max_new_tokens=4, top_k=top_k, **GIVEN[given])
    check(engine_law(engine, params, monkeypatch), constrained_law(target.network, 4, 1.0, top_k))


def test_law_of_texts_with_a_draft_of_another_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    own = byte_level(["<end>", "ba"], [("b", "a")])
    target = network(SIZE, 4, EOS)
    draft = translated(TransformersModel(target), TOKENIZER, TransformersModel(network(len(own), 5)), own)
    params = mcsd.SamplingParams(max_new_tokens=4, regex=REGEX)
    check(engine_law(engine_of(target, draft, "2x1"), params, monkeypatch), constrained_law(target, 4, 1.0))


def test_law_of_texts_with_looked_up_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked-up tokens know no grammar: a wrong one is rejected."""
    target = network(SIZE, 6, EOS)
    prediction = [BYTES["b"], BYTES["a"], BYTES["c"]]
    params = mcsd.SamplingParams(max_new_tokens=4, regex=REGEX, prediction=prediction)
    expected = constrained_law(target, 4, 1.0)
    check(engine_law(engine_of(target, network(SIZE, 7), "2"), params, monkeypatch), expected)
    check(engine_law(engine_of(target, "ngram", "chain:2"), params, monkeypatch), expected)
