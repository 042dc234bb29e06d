"""A drafter with any history drafts what a fresh one drafts after the same texts, from the same q."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from conftest import VOCABULARY
from exact import CONTEXT, SEEDS, STATES, close, exact, exact_head, parents, plain, poisoned, random_tokens, run
from mcsd import SamplingParams, TreeShape
from mcsd.drafters import Drafter, HeadDrafter, ModelDrafter, NgramDrafter
from mcsd.errors import InvalidTree
from mcsd.models import TransformersModel
from mcsd.models.trimming import trim
from mcsd.rng import DRAW, Randomness, Stream
from mcsd.sampling import Settings, SparseDistributions
from mcsd.schemes import SCHEMES, CandidateTree, Scheme, Verdict
from mcsd.schemes.candidates import Target

ROWS = 3
LARGEST = 6
# What rows read in one forward is filled up to what the longest has to read: seven tokens, or those left together.
SLOTS = CONTEXT + 7 + LARGEST
CPU = torch.device("cpu")
# One embedding is NaN for a while in some rules; the first model of a kind is the target.
DRAFT = 1

LENGTHS = st.one_of(st.integers(1, 4), st.integers(5, 20), st.integers(CONTEXT - 8, CONTEXT - 2))
PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.6, top_k=3),
    SamplingParams(temperature=1.5, top_p=0.8),
]
ENDS = st.lists(st.integers(0, 99), min_size=ROWS, max_size=ROWS)
# Random trees are seldom so broad that a second node has grandchildren.
BROAD = [[-1, -1, 0, 1, 2, 3], [-1, -1, 1, 0, 2, 3], [-1, -1, 0, 1, 3, 4]]
SHAPES = parents(LARGEST, smallest=1) | st.sampled_from(BROAD)


def model_drafter(kind: str, vocab_size: int = VOCABULARY) -> ModelDrafter:
    return ModelDrafter(TransformersModel(exact(kind, DRAFT)), vocab_size, ROWS, SLOTS)


@cache
def trimmed_model() -> TransformersModel:
    """A draft that proposes every third token."""
    network, vocabulary = deepcopy(exact("qwen2", DRAFT)), torch.arange(0, VOCABULARY, 3)
    trim(network, vocabulary)
    return TransformersModel(network, vocabulary=vocabulary)


DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "llama": lambda: model_drafter("llama"),
    "gpt2": lambda: model_drafter("gpt2"),
    "mistral-window": lambda: model_drafter("mistral-window"),
    "gemma3-mixed": lambda: model_drafter("gemma3-mixed"),
    "padded": lambda: model_drafter("opt", VOCABULARY - 7),
    "trimmed": lambda: ModelDrafter(trimmed_model(), VOCABULARY, ROWS, SLOTS),
    "head": lambda: HeadDrafter(exact_head("llama"), ROWS, SLOTS),
    "head-window": lambda: HeadDrafter(exact_head("gemma3-mixed"), ROWS, SLOTS),
    "ngram": lambda: NgramDrafter(CPU),
}


class Replay(Scheme):
    """Draws along one path what was drawn before."""

    name = "replay"

    def __init__(self, choices: list[int]) -> None:
        self.choices = iter(choices)

    def draw(self, q: Tensor, counts: Sequence[int], greedy: Tensor, random: Randomness) -> Tensor:
        return torch.tensor([[[next(self.choices)]]])

    def _judge(self, target: Target, q: SparseDistributions, random: Randomness) -> Verdict:
        raise NotImplementedError


def judges(scheme: type[Scheme], shape: TreeShape) -> bool:
    try:
        scheme.check(shape)
    except InvalidTree:
        return False
    return True


class Drafters(RuleBasedStateMachine):
    """One drafter, and the texts of its rows. The judgement is drawn: any valid path, and any token after it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.drafter = DRAFTERS[kind]()
        self.texts: list[list[int]] = []
        self.params: list[SamplingParams] = []
        self.seeds: list[int] = []

    @initialize(lengths=st.lists(LENGTHS, min_size=2, max_size=ROWS), seed=SEEDS)
    def take_several(self, lengths: list[int], seed: int) -> None:
        for row, length in enumerate(lengths):
            self.take(length, seed + row)

    @precondition(lambda self: len(self.texts) < ROWS)
    @rule(length=LENGTHS, seed=SEEDS)
    def take(self, length: int, seed: int) -> None:
        # Few different tokens, so that look-up finds something.
        few = 4 if self.kind == "ngram" else VOCABULARY
        text = [token % few for token in random_tokens(seed, length)]
        self.drafter.add(list(text), self.states([text])[0])
        self.texts.append(text)
        self.params.append(PARAMS[seed % len(PARAMS)])
        self.seeds.append(seed)

    @precondition(lambda self: len(self.texts) < ROWS - 1)
    @rule(length=LENGTHS, seed=SEEDS)
    def take_twins(self, length: int, seed: int) -> None:
        """Two rows with one prompt, which need be read only once."""
        self.take(length, seed)
        self.drafter.add(list(self.texts[-1]), self.states(self.texts[-1:])[0])
        self.texts.append(list(self.texts[-1]))
        self.params.append(self.params[-1])
        self.seeds.append(seed + 1)

    @precondition(lambda self: self.texts)
    @rule(above=SHAPES, scheme=st.integers(0, 99), ends=ENDS, seed=SEEDS)
    def step(self, above: list[int], scheme: int, ends: list[int], seed: int) -> None:
        self.draft_and_commit(TreeShape(above), scheme, ends, seed)

    @precondition(lambda self: self.texts)
    @rule(count=st.integers(1, 6), seed=SEEDS)
    def steps_without_candidates(self, count: int, seed: int) -> None:
        """Plain decoding; the tokens wait to be read."""
        for step in range(count):
            if self.texts:
                self.draft_and_commit(TreeShape([]), 0, [0] * ROWS, seed + step)

    @precondition(lambda self: len(self.texts) > 1)
    @rule(pick=st.integers(0, ROWS - 1))
    def remove(self, pick: int) -> None:
        self.free(pick % len(self.texts))

    @precondition(lambda self: len(self.texts) == ROWS)
    @rule(above=SHAPES, scheme=st.integers(0, 99))
    def break_off(self, above: list[int], scheme: int) -> None:
        """A step that ends between draft and commit."""
        shape = TreeShape(above)
        self.draft(self.drafter, shape, self.scheme(shape, scheme), list(range(len(self.texts))))
        self.drafter.clear()
        self.texts.clear()
        self.params.clear()
        self.seeds.clear()

    @precondition(lambda self: len(self.texts) > 1 and not isinstance(self.drafter, NgramDrafter))
    @rule(above=SHAPES, scheme=st.integers(0, 99), pick=st.integers(0, ROWS - 1))
    def fail(self, above: list[int], scheme: int, pick: int) -> None:
        """The draft reads NaN in one row, which is freed. The others must not notice."""
        shape = TreeShape(above)
        row = pick % len(self.texts)
        chosen = self.scheme(shape, scheme)
        expected = self.fresh(shape, chosen)
        used = {*expected.tokens.flatten().tolist(), *(token for text in self.texts for token in text)}
        # Nor is it 0, which shorter rows are filled up with.
        poison = next(token for token in range(1, VOCABULARY) if token not in used)
        self.texts[row][-1] = poison
        with poisoned(self.network(), poison):
            tree = self.draft(self.drafter, shape, chosen, list(range(len(self.texts))))
        assert tree.failed.tolist() == [other == row for other in range(len(self.texts))]
        self.compare(tree, expected, [other for other in range(len(self.texts)) if other != row])
        # As the engine goes on: nothing is accepted where nothing could be judged.
        states = self.states([[*text, 0] for text in self.texts])
        hidden = [None if known is None else known[0, -1:].expand(1 + shape.depth, -1) for known in states]
        nothing = torch.full((len(self.texts), shape.depth), -1)
        self.drafter.commit(nothing, torch.zeros(len(self.texts), dtype=torch.int64), stacked(hidden))
        for text in self.texts:
            text.append(1)
        self.free(row)
        self.end_full_texts()

    @invariant()
    def caches_hold_no_more_than_the_texts(self) -> None:
        if isinstance(self.drafter, ModelDrafter | HeadDrafter):
            cache = self.drafter._cache
            lengths = cache.lengths.tolist()
            used = len(self.texts)
            assert cache.used == used
            assert all(held < len(text) for held, text in zip(lengths, self.texts, strict=False))
            assert not any(lengths[used:])

    def draft_and_commit(self, shape: TreeShape, scheme: int, ends: list[int], seed: int) -> None:
        chosen = self.scheme(shape, scheme)
        every = list(range(len(self.texts)))
        tree = self.draft(self.drafter, shape, chosen, every)
        self.compare(tree, self.fresh(shape, chosen), every)
        self.compare_with_chain(tree, seed % len(every), ends[0])
        paths = [self.path(tree, row, ends[row]) for row in every]
        depth = tree.shape.depth
        before = [len(text) for text in self.texts]
        for row, path in enumerate(paths):
            self.texts[row] += [int(tree.tokens[row, node]) for node in path]
        hidden = []
        for known, start, path in zip(self.states([[*text, 0] for text in self.texts]), before, paths, strict=True):
            # Behind the path stand the root's states once more, as the engine hands them over.
            columns = [*range(start - 1, start + len(path)), *[start - 1] * (depth - len(path))]
            hidden.append(None if known is None else known[0, columns])
        padded = torch.tensor([path + [-1] * (depth - len(path)) for path in paths], dtype=torch.int64)
        counts = torch.tensor([len(path) for path in paths])
        self.drafter.commit(padded.view(len(paths), depth), counts, stacked(hidden))
        for text, token in zip(self.texts, random_tokens(seed, len(every)), strict=True):
            text.append(token % 4 if self.kind == "ngram" else token)
        self.end_full_texts()

    def path(self, tree: CandidateTree, row: int, pick: int) -> list[int]:
        """A valid path, so short that the text stays in the context."""
        ends = [-1, *tree.valid[row].nonzero()[:, 0].tolist()]
        node = ends[pick % len(ends)]
        path: list[int] = []
        while node >= 0:
            path.insert(0, node)
            node = tree.shape.parents[node]
        return path[: CONTEXT - 1 - len(self.texts[row])]

    def scheme(self, shape: TreeShape, pick: int) -> Scheme:
        """One that can judge the tree."""
        able = [SCHEMES[name] for name in sorted(SCHEMES) if judges(SCHEMES[name], shape)]
        return able[pick % len(able)]()

    def draft(
        self,
        drafter: Drafter,
        shape: TreeShape,
        scheme: Scheme,
        order: list[int],
        params: list[SamplingParams] | None = None,
    ) -> CandidateTree:
        seeds = torch.tensor([self.seeds[row] for row in order])
        positions = torch.tensor([len(self.texts[row]) for row in order])
        settings = Settings.of(params or [self.params[row] for row in order], CPU)
        texts = [list(self.texts[row]) for row in order]
        if len(shape):
            drafter.read(texts)
        return drafter.draft(texts, shape, scheme, settings, Stream(seeds, positions, DRAW))

    def fresh(self, shape: TreeShape, scheme: Scheme) -> CandidateTree:
        """What a drafter without a history says. Its rows stand the other way round."""
        drafter = DRAFTERS[self.kind]()
        order = list(range(len(self.texts)))[::-1]
        for row, states in zip(order, self.states([self.texts[row] for row in order]), strict=True):
            drafter.add(list(self.texts[row]), states)
        tree = self.draft(drafter, shape, scheme, order)
        turned = [part.flip(0) for part in (tree.tokens, tree.valid, tree.choice, tree.failed)]
        q = None if tree.q is None else type(tree.q)(tree.q.support.flip(0), tree.q.weights.flip(0))
        return CandidateTree(tree.shape, turned[0], turned[1], turned[2], q, turned[3])

    def compare(self, tree: CandidateTree, fresh: CandidateTree, rows: list[int]) -> None:
        assert tree.shape == fresh.shape
        assert torch.equal(tree.valid[rows], fresh.valid[rows])
        assert torch.equal(tree.tokens[rows], fresh.tokens[rows])
        assert torch.equal(tree.choice[rows], fresh.choice[rows])
        assert not tree.failed[rows].any()
        assert (tree.q is None) == (fresh.q is None)
        if tree.q is not None and fresh.q is not None:
            assert torch.equal(tree.q.support[rows], fresh.q.support[rows])
            torch.testing.assert_close(tree.q.weights[rows], fresh.q.weights[rows], **close(self.kind))

    def compare_with_chain(self, tree: CandidateTree, row: int, pick: int) -> None:
        """q after an inner node is that after its path, drafted alone as a chain."""
        inner = [node for node in sorted(set(tree.shape.parents)) if node >= 0 and tree.valid[row, node]]
        if tree.q is None or not inner:
            return
        node = inner[-1 - pick % len(inner)]
        path = tree.shape.paths[1 + node].tolist()
        path = [on for on in path if on >= 0]
        drafter = DRAFTERS[self.kind]()
        drafter.add(list(self.texts[row]), self.states([self.texts[row]])[0])
        scheme = Replay([*tree.choice[row, path].tolist(), 0])
        # Alone, a greedy row has no q. In company it has that of temperature 1.
        warm = self.params[row] if self.params[row].temperature else SamplingParams()
        chain = self.draft(drafter, TreeShape(range(-1, len(path))), scheme, [row], [warm])
        assert chain.q is not None
        assert torch.equal(chain.q.support[0, len(path)], tree.q.support[row, 1 + node])
        torch.testing.assert_close(chain.q.weights[0, len(path)], tree.q.weights[row, 1 + node], **close(self.kind))

    def states(self, texts: list[list[int]]) -> list[Tensor | None]:
        """The target's states ``[1, len(text) - 1, F]`` before each text's last token, if the drafter reads any."""
        if not self.drafter.hidden:
            return [None] * len(texts)
        assert self.drafter.hidden == STATES
        assert isinstance(self.drafter, HeadDrafter)
        known = plain(self.drafter.head.target.network, texts)
        return [states[None, :-1] if len(text) > 1 else None for text, (_, states) in zip(texts, known, strict=True)]

    def network(self) -> torch.nn.Module:
        """Whose embeddings the draft reads."""
        if isinstance(self.drafter, HeadDrafter):
            return self.drafter.head.target.network  # type: ignore[no-any-return]
        assert isinstance(self.drafter, ModelDrafter)
        assert isinstance(self.drafter.model, TransformersModel)
        return self.drafter.model.network  # type: ignore[no-any-return]

    def free(self, row: int) -> None:
        self.drafter.remove(row)
        for kept in (self.texts, self.params, self.seeds):
            kept[row] = kept[-1]  # type: ignore[index]
            kept.pop()

    def end_full_texts(self) -> None:
        """As the engine does, from the last row to the first."""
        for row in range(len(self.texts) - 1, -1, -1):
            if len(self.texts[row]) == CONTEXT:
                self.free(row)


def stacked(hidden: list[Tensor | None]) -> Tensor | None:
    known = [states for states in hidden if states is not None]
    return torch.stack(known) if known else None


@pytest.mark.parametrize("kind", DRAFTERS)
def test_a_drafter_with_any_history_is_as_a_fresh_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Short prompts in several pieces.
    monkeypatch.setattr("mcsd.models.prefill.CHUNK", 5)
    monkeypatch.setattr("mcsd.drafters.head.CHUNK", 5)
    # Rows that lag catch up alone.
    monkeypatch.setattr("mcsd.drafters.levels.TOGETHER", 4)
    run(Drafters, kind, runs=40 if kind == "ngram" else 6, steps=18)
