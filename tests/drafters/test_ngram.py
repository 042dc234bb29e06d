"""The n-gram drafter proposes what followed the last tokens earlier in the text, and nothing else."""

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from mcsd.drafters.ngram import NgramDrafter
from mcsd.params import SamplingParams
from mcsd.rng import DRAW, PhiloxStream
from mcsd.sampling import BatchSamplingParams
from mcsd.schemes import SCHEMES, CandidateTree
from mcsd.tree import TreeShape

CPU = torch.device("cpu")
Path = tuple[int, ...]


def drafter_for(texts: list[list[int]]) -> NgramDrafter:
    drafter = NgramDrafter(CPU)
    for text in texts:
        drafter.add(text, None)
    return drafter


def draft(drafter: NgramDrafter, texts: list[list[int]], tree: str | list[int]) -> CandidateTree:
    batch = len(texts)
    random = PhiloxStream(torch.zeros(batch, dtype=torch.int64), torch.zeros(batch, dtype=torch.int64), DRAW)
    sampling = BatchSamplingParams.of([SamplingParams()] * batch, CPU)
    return drafter.draft([list(text) for text in texts], TreeShape.parse(tree), SCHEMES["top-k"](), sampling, random)


def paths(tree: CandidateTree, sequence: int = 0) -> list[Path]:
    """The tokens from the root to each valid node, in order of the nodes."""
    found: dict[int, Path] = {-1: ()}
    for node, parent in enumerate(tree.shape.parents):
        if tree.valid[sequence, node]:
            found[node] = (*found[parent], int(tree.tokens[sequence, node]))  # an invalid parent is a KeyError
    return [found[node] for node in sorted(found) if node >= 0]


def proposed(text: list[int], tree: str | list[int]) -> list[Path]:
    return paths(draft(drafter_for([text]), [text], tree))


@pytest.mark.parametrize(
    ("text", "tree", "expected"),
    [
        ([1, 2, 3, 4, 1], "chain:3", [(2,), (2, 3), (2, 3, 4)]),
        ([1, 2, 1], "chain:4", [(2,), (2, 1)]),  # the text ends, and with it the continuation
        ([5, 5, 5], "chain:4", [(5,), (5, 5)]),  # one token follows the latest occurrence, two the other
        ([1, 7, 1, 8, 1, 9, 1], "4", [(9,), (8,), (7,)]),  # the latest first
        ([1, 7, 1, 8, 1, 9, 1], "2", [(9,), (8,)]),  # as many as the tree has
        ([2, 1, 7, 3, 1, 8, 2, 1], "2", [(7,), (8,)]),  # a longer n-gram before a later occurrence
        ([4, 3, 2, 1, 5, 3, 2, 1, 6, 2, 1, 7, 1, 8, 4, 3, 2, 1], "4", [(5,), (6,), (7,), (8,)]),  # 4, 3, 2, 1 tokens
        ([9, 4, 3, 2, 1, 5, 8, 4, 3, 2, 1, 6, 9, 4, 3, 2, 1], "2", [(6,), (5,)]),  # n-grams of five tokens are not used
        ([1, 7, 1, 7, 1, 8, 1], "3", [(8,), (7,)]),  # the same continuation twice is one candidate
        ([1, 2, 3, 0, 1, 2, 4, 0, 1], "1x2", [(2,), (2, 4), (2, 3)]),  # two occurrences merged under one node
        (
            [1, 2, 3, 9, 1, 5, 6, 8, 1, 2, 4, 9, 0, 1],
            "2x2x1",  # the second child has one continuation, so one of its nodes stays empty
            [(2,), (5,), (2, 4), (2, 3), (5, 6), (2, 4, 9), (2, 3, 9), (5, 6, 8)],
        ),
        ([1, 7, 1, 8, 1], [-1, 0, -1], [(8,), (7,), (8, 1)]),
        ([1, 2, 3, 4], "4x2", []),
        ([1], "2x2", []),
        ([1, 2, 1], "none", []),
    ],
)
def test_continuations_by_hand(text: list[int], tree: str | list[int], expected: list[Path]) -> None:
    assert proposed(text, tree) == expected


def test_the_tree_is_empty_if_no_sequence_has_a_match() -> None:
    texts = [[1, 2, 3], [4], [5, 6]]
    tree = draft(drafter_for(texts), texts, "3x2")
    assert len(tree.shape) == 0
    assert tree.tokens.shape == tree.valid.shape == tree.choice.shape == (3, 0)
    assert not tree.failed.any()


def test_sequences_without_a_match_have_no_valid_nodes() -> None:
    texts = [[1, 2, 3], [1, 2, 1], [7, 7]]
    tree = draft(drafter_for(texts), texts, "2x1")
    assert tree.valid.tolist() == [[False] * 4, [True, False, True, False], [True, False, False, False]]
    assert [paths(tree, sequence) for sequence in range(3)] == [[], [(2,), (2, 1)], [(7,)]]
    assert tree.tokens.dtype == torch.int64
    assert tree.q is None
    assert tree.failed.tolist() == [False] * 3


def test_sixteen_occurrences_are_merged() -> None:
    """Of twenty occurrences the four oldest are not used."""
    text = [token for follower in range(2, 22) for token in (1, follower)] + [1]
    assert proposed(text, "20") == [(follower,) for follower in range(21, 5, -1)]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=30), st.sampled_from(["3x2x2x1", "chain:6", "1x3x1"]))
@examples(deadline=None, max_examples=200)
def test_candidates_occur_in_the_text(text: list[int], tree: str) -> None:
    """Each path has followed the last token; the first comes from the latest occurrence of the longest n-gram."""
    found = proposed(text, tree)
    assert len(set(found)) == len(found)
    for path in found:
        here = [text[-1], *path]
        assert any(text[i : i + len(here)] == here for i in range(len(text)))
    matches = [
        (n, end) for end in range(1, len(text)) for n in range(1, 1 + min(4, end)) if text[end - n : end] == text[-n:]
    ]
    assert found[:1] == ([(text[max(matches)[1]],)] if matches else [])


@given(
    st.lists(st.integers(0, 2), min_size=1, max_size=12),
    st.lists(st.lists(st.integers(0, 2), max_size=5), max_size=6),
)
@examples(deadline=None, max_examples=100)
def test_updating_the_index_equals_building_it_anew(prompt: list[int], steps: list[list[int]]) -> None:
    text = list(prompt)
    drafter = drafter_for([prompt])
    for step in [[], *steps]:
        text += step
        assert paths(draft(drafter, [text], "3x2x1")) == proposed(text, "3x2x1")


@given(st.data())
@examples(deadline=None, max_examples=60)
def test_removed_sequences_do_not_change_the_others(data: st.DataObject) -> None:
    """Sequences are added and removed, the last taking the index of the removed one; each drafts as if alone."""
    tokens = st.lists(st.integers(0, 3), min_size=1, max_size=8)
    drafter = NgramDrafter(CPU)
    texts: list[list[int]] = []
    for _ in range(data.draw(st.integers(1, 8))):
        if texts and data.draw(st.booleans()):
            sequence = data.draw(st.integers(0, len(texts) - 1))
            drafter.remove(sequence)
            texts[sequence] = texts[-1]
            texts.pop()
        else:
            texts.append(data.draw(tokens))
            drafter.add(texts[-1], None)
        if texts:
            tree = draft(drafter, texts, "2x2")
            for sequence, text in enumerate(texts):
                assert paths(tree, sequence) == proposed(text, "2x2")
            drafter.commit(torch.full((len(texts), 2), -1), [[] for _ in texts], None)
        texts = [text + data.draw(tokens) for text in texts]
