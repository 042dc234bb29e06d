"""A corpus finds the longest match of the last tokens in the texts that a user gives."""

import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

import mcsd
from mcsd.config import split_draft
from mcsd.drafters import MixedDrafter, NgramDrafter
from mcsd.drafters.corpus import MAX_TOKENS, Corpus, CorpusSource
from mcsd.drafters.look_up import MAX_MATCH
from mcsd.errors import DataError, InvalidOption
from mcsd.testing import TabularModel

TEXTS = st.lists(st.lists(st.integers(0, 2), max_size=40), max_size=4)


@given(TEXTS, st.lists(st.integers(0, 2), min_size=1, max_size=40))
@examples(deadline=None, max_examples=200)
def test_the_longest_match_is_found(texts: list[list[int]], text: list[int]) -> None:
    """Compared with a search through all positions; a match lies in one text and is followed by a token of it."""
    lengths = [0]
    for one in texts:
        for end in range(len(one) - 1):
            most = min(end + 1, len(text), MAX_MATCH)
            lengths.append(next((n for n in range(most) if one[end - n] != text[-1 - n]), most))
    corpus = Corpus(texts)
    length, position = corpus.find(text, len(text) - 1)
    # With hundreds of equally long matches the neighbours may all end a text.
    assert length == max(lengths)
    if length:
        assert corpus.tokens[position - length : position] == text[-length:]
        assert corpus.tokens[position] >= 0


def test_the_most_frequent_token_continues_equal_matches() -> None:
    corpus = Corpus([[1, 2, 7], [1, 2, 8], [1, 2, 8], [5, 2, 7]])
    length, position = corpus.find([1, 2], 1)
    assert (length, corpus.tokens[position]) == (2, 8)


def test_a_continuation_ends_with_its_text() -> None:
    source = CorpusSource(Corpus([[1, 2, 3, 4], [5, 6]]))
    source.start([1, 2], 1)
    assert source.continuation([1, 2], 9) == [3, 4]
    assert len(source.acceptance(9)) == 2
    source.follow([1, 2, 3], 2)
    assert source.continuation([1, 2, 3], 9) == [4]
    source.follow([1, 2, 3, 4], 3)
    assert not source.points


def test_a_large_corpus_is_indexed_once_and_searched_fast() -> None:
    tokens = torch.randint(1000, (200_000,), generator=torch.Generator().manual_seed(0)).tolist()
    corpus = Corpus([tokens])
    corpus.find([1], 0)
    started = time.perf_counter()
    for end in range(500, 1500):
        assert corpus.find(tokens, end)[0] == MAX_MATCH
    assert time.perf_counter() - started < 5


def test_a_corpus_is_bounded() -> None:
    with pytest.raises(InvalidOption, match="more than"):
        Corpus([range(MAX_TOKENS), [1]])
    with pytest.raises(InvalidOption, match="token id -3"):
        NgramDrafter(corpus=[[1, -3]])


def cycle(size: int) -> TabularModel:
    """A model that counts up."""
    return TabularModel(torch.eye(size).roll(1, dims=1) * 0.98 + 0.02 / size)


@pytest.mark.parametrize("beside", [False, True])
def test_an_engine_looks_up_in_earlier_outputs(beside: bool) -> None:
    """Without them the text has no earlier occurrence to copy from."""
    size, params = 60, mcsd.SamplingParams(temperature=0, max_new_tokens=40)
    lengths = []
    for corpus in ([], [list(range(2, 60))]):
        drafter = NgramDrafter(corpus=corpus)
        engine = mcsd.Engine(cycle(size), drafter, tree="chain:8")
        if beside:
            engine = mcsd.Engine(cycle(size), TabularModel(torch.eye(size)), tree="1")
            engine.drafter = MixedDrafter(engine.drafter, always=True, corpus=corpus)  # type: ignore[arg-type]
        done = engine.generate([0, 1, 2, 3], params)
        assert list(done.token_ids) == list(range(4, 44))
        lengths.append(done.stats.mean_acceptance_length)
    assert lengths[0] == 1
    assert lengths[1] > 4


class Letters:
    """A tokenizer of letters."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 60 for letter in text]}


def test_a_corpus_by_name(tmp_path: Path) -> None:
    """A file, and the files of a folder; what cannot be read is a named error."""
    (tmp_path / "a.txt").write_text("ABC")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.txt").write_text("XY")
    for place, tokens in (("a.txt", [5, 6, 7, -1]), (".", [5, 6, 7, -1, 28, 29, -1])):
        engine = mcsd.Engine(cycle(60), f"ngram:{tmp_path / place}", Letters(), tree="chain:4")
        assert engine.drafter._corpus.tokens == tokens  # type: ignore[attr-defined]
    mixed = mcsd.Engine(cycle(60), [cycle(60), f"ngram:{tmp_path / 'a.txt'}"], Letters(), tree="1")
    assert mixed.drafter._corpus.tokens == [5, 6, 7, -1]  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="cannot be read"):
        mcsd.Engine(cycle(60), "ngram:missing.txt", Letters())
    with pytest.raises(InvalidOption, match="needs a tokenizer"):
        mcsd.Engine(cycle(60), f"ngram:{tmp_path / 'a.txt'}")


@pytest.mark.parametrize(
    ("draft", "expected"),
    [
        (None, (None, None)),
        ("ngram", (None, "ngram")),
        ("ngram:a/b.txt", (None, "ngram:a/b.txt")),
        ("smollm2-135m", ("smollm2-135m", None)),
        ("smollm2-135m+ngram", ("smollm2-135m", "ngram")),
        ("a/b+ngram:c+d.txt", ("a/b", "ngram:c+d.txt")),
        ("a+ngrams", ("a+ngrams", None)),
        (["x", "ngram"], ("x", "ngram")),
        (("x", "ngram:y"), ("x", "ngram:y")),
    ],
)
def test_names_of_drafts(draft: object, expected: tuple[object, object]) -> None:
    assert split_draft(draft) == expected


@pytest.mark.parametrize("draft", [["x"], ["ngram", "x"], ["x", "y"], ["ngram", "ngram"], ["x", "ngram", "y"]])
def test_lists_that_are_no_drafts(draft: list[str]) -> None:
    with pytest.raises(InvalidOption, match="not a model and"):
        split_draft(draft)


@pytest.mark.parametrize("scheme", ["block", "traversal"])
def test_schemes_for_whole_trees_take_no_look_up_beside_a_draft(scheme: str) -> None:
    with pytest.raises(InvalidOption, match=f"scheme {scheme} verifies whole trees"):
        mcsd.Engine(cycle(9), [cycle(9), "ngram"], tree="chain:2", scheme=scheme)
    engine = mcsd.Engine(cycle(9), cycle(9), tree="chain:2", scheme=scheme)
    with pytest.raises(mcsd.errors.InvalidParameter, match="takes no prediction"):
        engine.generate([1], prediction=[2, 3])
    assert len(mcsd.Engine(cycle(9), "ngram", scheme=scheme, tree="chain:2").generate([1], prediction=[2]).token_ids)
