"""Any history of prompts, trees, commits, frees and reuse leaves a cache that says what a fresh forward says."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from mcsd import TreeShape
from mcsd.models import TokenLayout, TransformersModel
from mcsd.models.prefill import prefill
from support.exact import (
    CONTEXT,
    KINDS,
    POISON,
    SEEDS,
    STATES,
    close,
    exact,
    parents,
    plain,
    poisoned,
    random_tokens,
    run,
)

ROWS = 4
SLOTS = CONTEXT + 12
LARGEST = 9
"""Nodes of a forward."""

# Short, longer than the windows, and so long that a tree hangs over the end of the context.
LENGTHS = st.one_of(st.integers(0, 6), st.integers(8, 20), st.integers(CONTEXT - 8, CONTEXT - 1))
# For each row one number, from which the end of its path is taken.
ENDS = st.lists(st.integers(0, 99), min_size=ROWS, max_size=ROWS)
# First and last row of a forward; none for all in use.
SPANS = st.none() | st.tuples(st.integers(0, ROWS - 1), st.integers(0, ROWS - 1))


class Flight:
    """What has been read and not committed: columns as a forest, and the tokens of some rows.

    Args:
        start, stop: rows that were read.
        given: the same, as the model is told.
    """

    def __init__(self, start: int, stop: int, given: slice) -> None:
        self.start, self.stop, self.given = start, stop, given
        self.parents: list[int] = []
        self.tokens: list[list[int]] = [[] for _ in range(start, stop)]

    def add(self, above: Sequence[int], tokens: Sequence[Sequence[int]]) -> None:
        """More columns: the parent of each, -1 for the committed text, and each row's tokens."""
        self.parents += above
        for row, more in zip(self.tokens, tokens, strict=True):
            row += more

    def path(self, column: int) -> list[int]:
        """Columns from the committed text to this one, its own included."""
        path: list[int] = []
        while column >= 0:
            path.insert(0, column)
            column = self.parents[column]
        return path

    def block(self, new: int) -> TokenLayout:
        """How the last ``new`` columns stand to all, by this class's own account."""
        paths = [self.path(column) for column in range(len(self.parents))]
        offsets = torch.tensor([len(path) - 1 for path in paths])
        mask = [[other in path for other in range(len(paths))] for path in paths[len(paths) - new :]]
        return TokenLayout(offsets, torch.tensor(mask, dtype=torch.bool))


class Caches(RuleBasedStateMachine):
    """One cache of a model of transformers; what it should hold is kept as lists of tokens."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.network = exact(kind)
        self.model = TransformersModel(self.network)
        self.close = close(kind)
        self.cache = self.model.new_cache(ROWS, SLOTS)
        self.texts: list[list[int]] = []
        self.kept: list[tuple[list[int], int, list[tuple[torch.Tensor, ...] | None]]] = []
        self.flight: Flight | None = None

    @initialize(lengths=st.lists(LENGTHS, min_size=2, max_size=ROWS), seed=SEEDS)
    def take_several(self, lengths: list[int], seed: int) -> None:
        for row, length in enumerate(lengths):
            self.take(length, seed + row)

    @precondition(lambda self: len(self.texts) < ROWS)
    @rule(length=LENGTHS, seed=SEEDS)
    def take(self, length: int, seed: int) -> None:
        text = random_tokens(seed, length)
        row = self.cache.add()
        assert row == len(self.texts)
        states = prefill(self.model, self.cache, row, text, STATES)
        assert (states is None) == (not text)
        if states is not None:
            torch.testing.assert_close(states[0], plain(self.network, [text])[0][1], **self.close)
        self.texts.append(text)
        self.flight = None

    @precondition(lambda self: 0 < len(self.texts) < ROWS)
    @rule(pick=st.integers(0, ROWS - 1), length=LENGTHS)
    def take_a_copy(self, pick: int, length: int) -> None:
        """Of the first tokens that a row has committed, at any time."""
        like = pick % len(self.texts)
        length = min(length, len(self.texts[like]))
        row = self.cache.add()
        assert row == len(self.texts)
        self.cache.copy(like, row, length)
        self.texts.append(self.texts[like][:length])
        self.flight = None

    @precondition(lambda self: self.texts and not self.cache.is_empty)
    @rule(pick=st.integers(0, ROWS - 1), start=LENGTHS)
    def keep_a_copy(self, pick: int, start: int) -> None:
        """Outside of the cache, in two parts."""
        like = pick % len(self.texts)
        text = self.texts[like]
        start = min(start, len(text))
        parts = [self.cache.read(like, 0, start), self.cache.read(like, start, len(text))]
        self.kept.append((list(text), start, parts))

    @precondition(lambda self: self.kept and len(self.texts) < ROWS)
    @rule(pick=st.integers(0, 99), length=LENGTHS)
    def take_what_was_kept(self, pick: int, length: int) -> None:
        """Its first part, and the beginning of the second one."""
        text, start, parts = self.kept[pick % len(self.kept)]
        length = min(length, len(text) - start)
        row = self.cache.add()
        for part, count in zip(parts, (start, length), strict=True):
            assert part is not None
            self.cache.write(row, part, count)
        self.texts.append(text[: start + length])
        self.flight = None

    @precondition(lambda self: self.texts)
    @rule(above=parents(LARGEST), seed=SEEDS, span=SPANS)
    def read_tree(self, above: list[int], seed: int, span: tuple[int, int] | None) -> None:
        """As the engine does: a root, and candidates after it."""
        flight = self.begin(span)
        shape = TreeShape(above[: self.room(flight) - 1])
        columns = [-1, *(parent + 1 for parent in shape.parents)]
        self.read(flight, columns, self.some_tokens(flight, len(columns), seed), TokenLayout.tree(shape))

    @precondition(lambda self: self.texts)
    @rule(length=st.integers(1, LARGEST), seed=SEEDS, span=SPANS)
    def read_chain(self, length: int, seed: int, span: tuple[int, int] | None) -> None:
        """As a drafter catches up: rows keep different counts of it, and what follows those is filling."""
        flight = self.begin(span)
        length = min(length, self.room(flight))
        columns = list(range(-1, length - 1))
        self.read(flight, columns, self.some_tokens(flight, length, seed), TokenLayout.chain(length))

    @precondition(lambda self: self.flight is not None and self.room(self.flight) > 0)
    @rule(picks=st.lists(st.integers(0, 99), min_size=1, max_size=4), seed=SEEDS)
    def read_more(self, picks: list[int], seed: int) -> None:
        """As a drafter goes down level by level, but with any parents."""
        assert self.flight is not None
        known = len(self.flight.parents)
        picks = picks[: self.room(self.flight)]
        columns = [pick % (known + i + 1) - 1 for i, pick in enumerate(picks)]
        self.read(self.flight, columns, self.some_tokens(self.flight, len(columns), seed), None)

    @precondition(lambda self: self.flight is not None)
    @rule(ends=ENDS, none=st.booleans(), filling=st.integers(0, LARGEST))
    def commit(self, ends: list[int], none: bool, filling: int) -> None:
        """Paths of different lengths; ``filling`` stands behind the shorter ones and must not be looked at."""
        flight = self.flight
        assert flight is not None
        columns = len(flight.parents)
        paths: list[list[int]] = []
        for row, tokens, end in zip(range(flight.start, flight.stop), flight.tokens, ends, strict=False):
            path = [] if none else flight.path(end % (columns + 1) - 1)
            # The engine ends a text before the context does.
            path = path[: CONTEXT - len(self.texts[row])]
            paths.append(path)
            self.texts[row] += [tokens[column] for column in path]
        longest = max(map(len, paths))
        filled = [path + [filling % columns] * (longest - len(path)) for path in paths]
        counts = torch.tensor([len(path) for path in paths])
        self.cache.commit(torch.tensor(filled, dtype=torch.int64), counts, flight.given)
        self.flight = None

    @precondition(lambda self: self.texts)
    @rule(above=parents(LARGEST, smallest=LARGEST - 2), seed=SEEDS, span=SPANS, ends=ENDS)
    def read_tree_and_commit(self, above: list[int], seed: int, span: tuple[int, int] | None, ends: list[int]) -> None:
        self.read_tree(above, seed, span)
        self.commit(ends, False, 0)

    @precondition(lambda self: len(self.texts) > 1)
    @rule(pick=st.integers(0, ROWS - 1))
    def remove(self, pick: int) -> None:
        self.free(pick % len(self.texts))

    @precondition(lambda self: len(self.texts) == ROWS)
    @rule()
    def clear(self) -> None:
        self.cache.clear()
        self.texts.clear()
        self.flight = None

    @precondition(lambda self: len(self.texts) > 1)
    @rule(above=parents(LARGEST), seed=SEEDS, pick=st.integers(0, ROWS - 1), place=st.integers(0, LARGEST))
    def fail(self, above: list[int], seed: int, pick: int, place: int) -> None:
        """A row meets NaN and is freed. The others go on, and so does whoever gets its place."""
        flight = self.begin(None)
        above = above[: self.room(flight) - 1]
        row = pick % len(self.texts)
        tokens = self.some_tokens(flight, 1 + len(above), seed)
        tokens[row][place % len(tokens[row])] = POISON
        shape = TreeShape(above)
        with poisoned(self.network, POISON):
            logits = self.model.forward(torch.tensor(tokens), TokenLayout.tree(shape), self.cache).logits
        flight.add([-1, *(parent + 1 for parent in shape.parents)], tokens)
        assert logits[row].isnan().any()
        for other in range(len(self.texts)):
            if other != row:
                self.compare(flight, other, range(len(flight.parents)), logits[other], None)
        everyone = torch.arange(len(flight.parents)).expand(len(self.texts), -1)
        # The engine commits before it frees, and a row that fails after a path keeps the path.
        counts = torch.zeros(len(self.texts), dtype=torch.int64)
        counts[row] = min(1, CONTEXT - len(self.texts[row]))
        self.cache.commit(everyone, counts)
        self.free(row)

    @invariant()
    def lengths_are_those_of_the_texts(self) -> None:
        lengths = [len(text) for text in self.texts]
        assert self.cache.batch_size == len(self.texts)
        assert self.cache.lengths.tolist() == self.cache.host_lengths == lengths + [0] * (ROWS - len(lengths))

    def teardown(self) -> None:
        if self.texts:
            flight = self.begin(None)
            self.read(flight, [-1], self.some_tokens(flight, 1, 0), TokenLayout.chain(1))

    def begin(self, span: tuple[int, int] | None) -> Flight:
        """A forward behind what is committed. What was in flight is forgotten."""
        used = len(self.texts)
        first, last = sorted(pick % used for pick in span or (0, used - 1))
        given = slice(None) if span is None else slice(first, last + 1)
        return Flight(first, last + 1, given)

    def room(self, flight: Flight | None) -> int:
        """How many more columns the slots allow, and how many these tests want."""
        known = 0 if flight is None else len(flight.parents)
        longest = max(map(len, self.texts[flight.start : flight.stop] if flight else self.texts))
        return min(SLOTS - longest, LARGEST + 1 if known == 0 else LARGEST + 4) - known

    def some_tokens(self, flight: Flight, count: int, seed: int) -> list[list[int]]:
        return [random_tokens(seed + 7 * row, count) for row in range(flight.stop - flight.start)]

    def read(self, flight: Flight, above: list[int], tokens: list[list[int]], block: TokenLayout | None) -> None:
        """Forward, and compare every new node of every row."""
        first = len(flight.parents)
        flight.add(above, tokens)
        block = flight.block(len(above)) if block is None else block
        output = self.model.forward(torch.tensor(tokens), block, self.cache, flight.given, hidden_layers=STATES)
        assert output.hidden is not None
        new = range(first, len(flight.parents))
        for i, row in enumerate(range(flight.start, flight.stop)):
            self.compare(flight, row, new, output.logits[i], output.hidden[i])
        self.flight = flight

    def compare(self, flight: Flight, row: int, columns: range, logits: Tensor, states: Tensor | None) -> None:
        own, text = flight.tokens[row - flight.start], self.texts[row]
        paths = [text + [own[column] for column in flight.path(column)] for column in columns]
        # A tree may hang over the end of the context; what stands there means nothing.
        inside = [i for i, path in enumerate(paths) if len(path) <= CONTEXT]
        if not inside:
            return
        expected = plain(self.network, [paths[i] for i in inside])
        torch.testing.assert_close(logits[inside], torch.stack([said[-1] for said, _ in expected]), **self.close)
        if states is not None:
            torch.testing.assert_close(states[inside], torch.stack([known[-1] for _, known in expected]), **self.close)

    def free(self, row: int) -> None:
        self.cache.remove(row)
        self.texts[row] = self.texts[-1]
        self.texts.pop()
        self.flight = None


@pytest.mark.thorough
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_cache_with_any_history_is_as_a_fresh_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Short prompts in several pieces.
    monkeypatch.setattr("mcsd.models.prefill._CHUNK", 5)
    run(Caches, kind, runs=9, steps=22)
