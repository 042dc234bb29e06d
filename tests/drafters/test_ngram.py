"""The n-gram drafter proposes what followed the last tokens earlier in the text, and nothing else."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from mcsd.drafters.look_up import LookUp, PredictionSource, Source
from mcsd.drafters.ngram import NgramDrafter
from mcsd.params import SamplingParams
from mcsd.rng import DRAW, PhiloxStream
from mcsd.sampling import BatchSamplingParams
from mcsd.schemes import SCHEMES, CandidateTree
from mcsd.tree import TreeShape

CPU = torch.device("cpu")
Path = tuple[int, ...]


def drafter_for(texts: list[list[int]]) -> NgramDrafter:
    """A drafter that proposes all that it finds, because for it larger steps are faster."""
    drafter = NgramDrafter(CPU)
    drafter.cost = lambda batch_size, nodes: 1 / (1 + nodes)
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
        ([1, 2, 1], "chain:4", [(2,), (2, 1), (2, 1, 2), (2, 1, 2, 1)]),  # a match that reaches the end repeats
        ([5, 5, 5], "chain:3", [(5,), (5, 5), (5, 5, 5)]),
        ([1, 7, 1, 8, 1, 9, 1], "4", [(9,), (8,), (7,)]),  # the latest first
        ([1, 7, 1, 8, 1, 9, 1], "2", [(9,), (8,)]),  # as many as the tree has
        ([2, 1, 7, 3, 1, 8, 2, 1], "2", [(7,), (8,)]),  # a longer n-gram before a later occurrence
        ([4, 3, 2, 1, 5, 3, 2, 1, 6, 2, 1, 7, 1, 8, 4, 3, 2, 1], "4", [(5,), (6,), (7,), (8,)]),  # 4, 3, 2, 1 tokens
        ([9, 4, 3, 2, 1, 5, 8, 4, 3, 2, 1, 6, 9, 4, 3, 2, 1], "2", [(5,), (6,)]),  # five tokens before four
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
    assert tree.valid.tolist() == [[False] * 4, [True, False, True, False], [True, False, True, False]]
    assert [paths(tree, sequence) for sequence in range(3)] == [[], [(2,), (2, 1)], [(7,), (7, 7)]]
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
    """Each path continues an earlier occurrence of the last token; the first one is the latest of the longest match."""
    found = proposed(text, tree)
    assert len(set(found)) == len(found)
    ends = [end for end in range(len(text) - 1) if text[end] == text[-1]]
    # What follows an occurrence, if the text goes on with it.
    followers = [repeated(text, end + 1, 6) for end in ends]
    for path in found:
        assert any(tuple(follower[: len(path)]) == path for follower in followers)
    lengths = [next((n for n in range(end + 1) if text[end - n] != text[-1 - n]), end + 1) for end in ends]
    best = max(zip(lengths, ends, strict=True), default=None)
    assert found[:1] == ([(text[best[1] + 1],)] if best else [])


def repeated(text: list[int], start: int, count: int) -> list[int]:
    tokens = list(text)
    for place in range(start, start + count):
        tokens.append(tokens[place])
    return tokens[len(text) :]


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
    drafter = drafter_for([])
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


def look_up(text: list[int], answer: list[int], *others: Source) -> LookUp:
    """After a prompt and an answer."""
    found = LookUp(text, others)
    found.update(text)
    found.update([*text, *answer])
    return found


def test_weak_evidence_is_no_reason_to_propose() -> None:
    """Where a candidate costs a quarter of a forward, one equal token proposes nothing, and five do."""
    once, often = [1, 2, 3, 4, 1], [5, 1, 2, 3, 4, 6, 7, 8, 5, 1, 2, 3, 4]
    for text, expected in ((once, 0), (often, 1)):
        drafter = NgramDrafter(CPU)
        drafter.cost = lambda batch_size, nodes: 4.0 + nodes
        drafter.add(text, None)
        assert (len(draft(drafter, [text], "chain:8").shape) > 0) == expected


def test_the_depth_follows_what_was_right_so_far() -> None:
    """A text that repeats gets long chains; one whose copies were wrong gets none."""
    numbers = list(range(10, 40))
    repeating = [*numbers, *numbers[:12]]
    # Every pair has occurred before, and another token has followed it.
    misleading = [token for follower in range(100, 125) for token in (1, 2, follower)] + [1, 2]
    for text, prompt, expected in ((repeating, 30, 12), (misleading, 3, 0)):
        drafter = NgramDrafter(CPU)
        drafter.add(text[:prompt], None)
        draft(drafter, [text[:prompt]], "chain:16")
        assert draft(drafter, [text], "chain:16").shape.depth == expected


def test_a_sequence_of_a_batch_has_its_own_depth() -> None:
    """A sequence without evidence has no candidates; the one beside it keeps its own."""
    good = [*range(10, 40), *range(10, 22)]
    drafter = NgramDrafter(CPU)
    for text in (good, [1, 2, 3]):
        drafter.add(text, None)
    valid = draft(drafter, [good, [1, 2, 3]], "chain:16").valid
    assert valid[0].all()
    assert not valid[1].any()


def test_an_expensive_batch_is_not_made_larger_for_one_sequence() -> None:
    good, others = [*range(10, 40), *range(10, 22)], [[1, 2, 3]] * 15
    for texts, depths in (([good, *others], {0}), ([good], {8, 12, 16})):
        drafter = NgramDrafter(CPU)
        drafter.cost = lambda batch_size, nodes: batch_size * (1.0 + 0.05 * nodes)
        for text in texts:
            drafter.add(text, None)
        assert draft(drafter, texts, "chain:16").shape.depth in depths


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ([], [20, 21, 22, 23]),  # from the start
        ([20, 21], [22, 23, 24, 25]),
        ([20, 99], [22, 23, 24, 25]),  # one token replaced
        ([20, 98, 99, 21, 22], [23, 24, 25, 26]),  # two inserted
        ([20, 24], [25, 26, 27, 28]),  # three left out
        ([20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 20, 21], [22, 23, 24, 25]),  # the text begins again
        ([20, 21, 22, 23, 24, 25, 26, 27, 28], [29]),
    ],
)
def test_a_prediction_is_followed_and_resumed(answer: list[int], expected: list[int]) -> None:
    source = PredictionSource(list(range(20, 30)))
    found = look_up([1, 2], answer, source)
    assert found.best(4)[0] is source
    assert found.continuations([1, 2, *answer], 4, 1) == [expected]


def test_a_prediction_that_is_wrong_is_given_up() -> None:
    """After thirty wrong tokens it is no longer proposed."""
    drafter = NgramDrafter(CPU)
    drafter.add([1, 2], None)
    drafter.expect([1, 2], list(range(100, 300)))
    assert draft(drafter, [[1, 2]], "chain:8").shape.depth > 2
    assert not len(draft(drafter, [[1, 2, *range(500, 530)]], "chain:8").shape)


def test_a_prediction_belongs_to_its_sequence() -> None:
    drafter = NgramDrafter(CPU)
    for prompt, prediction in (([1], [5, 6, 7]), ([2], None), ([3], [8, 9])):
        drafter.add(prompt, None)
        if prediction:
            drafter.expect(prompt, prediction)
    drafter.remove(0)  # The last sequence takes its index.
    tree = draft(drafter, [[3], [2]], "chain:2")
    assert [paths(tree, sequence) for sequence in range(2)] == [[(8,), (8, 9)], []]


def test_following_a_long_text_is_fast() -> None:
    """A token that occurs everywhere is compared at its latest occurrences only."""
    text = [7] * 50_000
    started = time.perf_counter()
    look_up(text, [8, 7, 7, 9, 7])
    assert time.perf_counter() - started < 2
