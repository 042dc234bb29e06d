"""A drafter with any history drafts what a fresh one drafts after the same texts, from the same q."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from mcsd import SamplingParams, TreeShape
from mcsd.drafters import Drafter, HeadDrafter, ModelDrafter, NgramDrafter
from mcsd.drafters.translated import TranslatedDrafter
from mcsd.models import TransformersModel
from mcsd.models.draft_vocabulary import cut_vocabulary
from mcsd.models.vocabulary_map import TranslatedModel
from mcsd.rng import DRAW, PhiloxStream, Randomness
from mcsd.sampling import BatchSamplingParams, SparseDistributions
from mcsd.schemes import SCHEMES, CandidateTree, Scheme, VerificationResult
from mcsd.schemes.registry import supports
from mcsd.schemes.types import TargetDistributions
from support.exact import CONTEXT, SEEDS, STATES, close, exact, exact_head, parents, plain, poisoned, random_tokens, run
from support.ngrams import eager_ngram
from support.small_tokenizers import characters, translated
from support.tiny import VOCABULARY

MAX_BATCH = 3
LARGEST = 6
# Sequences that read together are padded to the longest: seven tokens, or the pending tokens of a lag.
SLOTS = CONTEXT + 7 + LARGEST
CPU = torch.device("cpu")
# The first model of a kind is the target. In some rules one embedding is temporarily NaN.
DRAFT = 1

LENGTHS = st.one_of(st.integers(1, 4), st.integers(5, 20), st.integers(CONTEXT - 8, CONTEXT - 2))
PARAMS = [
    SamplingParams(),
    SamplingParams(temperature=0),
    SamplingParams(temperature=0.6, top_k=3),
    SamplingParams(temperature=1.5, top_p=0.8),
]
ENDS = st.lists(st.integers(0, 99), min_size=MAX_BATCH, max_size=MAX_BATCH)
# Random trees are seldom so wide that a second node has grandchildren.
WIDE = [[-1, -1, 0, 1, 2, 3], [-1, -1, 1, 0, 2, 3], [-1, -1, 0, 1, 3, 4]]
SHAPES = parents(LARGEST, smallest=1) | st.sampled_from(WIDE)


def model_drafter(kind: str, vocab_size: int = VOCABULARY) -> ModelDrafter:
    return ModelDrafter(TransformersModel(exact(kind, DRAFT)), vocab_size, MAX_BATCH, SLOTS)


@cache
def model_with_draft_vocabulary() -> TransformersModel:
    """A draft whose vocabulary is every third token."""
    network, vocabulary = deepcopy(exact("qwen2", DRAFT)), torch.arange(0, VOCABULARY, 3)
    cut_vocabulary(network, vocabulary)
    return TransformersModel(network, vocabulary=vocabulary)


@cache
def translated_model() -> TranslatedModel:
    """A draft with another tokenizer: it lacks six of the target's tokens, and has six of its own."""
    order = [0, *range(VOCABULARY - 1, 0, -1)]
    target, draft = (TransformersModel(exact("llama", seed)) for seed in (0, DRAFT))
    return translated(target, characters(range(VOCABULARY)), draft, characters(order, range(10, 16)))


DRAFTERS: dict[str, Callable[[], Drafter]] = {
    "llama": lambda: model_drafter("llama"),
    "gpt2": lambda: model_drafter("gpt2"),
    "mistral-window": lambda: model_drafter("mistral-window"),
    "gemma3-mixed": lambda: model_drafter("gemma3-mixed"),
    "padded": lambda: model_drafter("opt", VOCABULARY - 7),
    "draft-vocabulary": lambda: ModelDrafter(model_with_draft_vocabulary(), VOCABULARY, MAX_BATCH, SLOTS),
    "translated": lambda: TranslatedDrafter(translated_model(), MAX_BATCH, SLOTS),
    "head": lambda: HeadDrafter(exact_head("llama"), MAX_BATCH, SLOTS),
    "head-window": lambda: HeadDrafter(exact_head("gemma3-mixed"), MAX_BATCH, SLOTS),
    "ngram": eager_ngram,
}

SHORT_LAG = 4


class Replay(Scheme):
    """Draws the candidates of one path again."""

    name = "replay"

    def __init__(self, choices: list[int]) -> None:
        self.choices = iter(choices)

    def draw(self, q: Tensor, counts: Sequence[int], greedy: Tensor, random: Randomness) -> Tensor:
        return torch.tensor([[[next(self.choices)]]])

    def _verify(self, target: TargetDistributions, q: SparseDistributions, random: Randomness) -> VerificationResult:
        raise NotImplementedError


class Drafters(RuleBasedStateMachine):
    """One drafter, and the texts of its sequences. Verification is random: any valid path, and any token after it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.drafter = DRAFTERS[kind]()
        self.texts: list[list[int]] = []
        self.params: list[SamplingParams] = []
        self.seeds: list[int] = []
        self.starts: list[int] = []
        """The first token of each text that the drafter has not skipped."""

    @initialize(lengths=st.lists(LENGTHS, min_size=2, max_size=MAX_BATCH), seed=SEEDS)
    def take_several(self, lengths: list[int], seed: int) -> None:
        for sequence, length in enumerate(lengths):
            self.take(length, seed + sequence)

    @precondition(lambda self: len(self.texts) < MAX_BATCH)
    @rule(length=LENGTHS, seed=SEEDS)
    def take(self, length: int, seed: int) -> None:
        # Few different tokens, so that n-grams repeat.
        few = 4 if self.kind == "ngram" else VOCABULARY
        text = [token % few for token in random_tokens(seed, length)]
        self.drafter.add(list(text), self.states([text])[0])
        self.texts.append(text)
        self.params.append(PARAMS[seed % len(PARAMS)])
        self.seeds.append(seed)
        self.starts.append(0)

    @precondition(lambda self: len(self.texts) < MAX_BATCH - 1)
    @rule(length=LENGTHS, seed=SEEDS)
    def take_twins(self, length: int, seed: int) -> None:
        """Two sequences with one prompt, which is read only once."""
        self.take(length, seed)
        self.drafter.add(list(self.texts[-1]), self.states(self.texts[-1:])[0])
        self.texts.append(list(self.texts[-1]))
        self.params.append(self.params[-1])
        self.seeds.append(seed + 1)
        self.starts.append(0)

    @precondition(lambda self: self.texts)
    @rule(above=SHAPES, scheme=st.integers(0, 99), ends=ENDS, seed=SEEDS)
    def step(self, above: list[int], scheme: int, ends: list[int], seed: int) -> None:
        self.draft_and_commit(TreeShape(above), scheme, ends, seed)

    @precondition(lambda self: self.texts)
    @rule(count=st.integers(1, 6), seed=SEEDS)
    def steps_without_candidates(self, count: int, seed: int) -> None:
        """Plain decoding: tokens become pending."""
        for step in range(count):
            if self.texts:
                self.draft_and_commit(TreeShape([]), 0, [0] * MAX_BATCH, seed + step)

    @precondition(lambda self: self.texts and type(self.drafter) is ModelDrafter)
    @rule(most=st.lists(st.integers(1, 8), min_size=MAX_BATCH, max_size=MAX_BATCH))
    def skip(self, most: list[int]) -> None:
        """The drafter reads the last tokens of texts that it lags behind, as texts of their own."""
        texts = [list(text) for text in self.texts]
        held = [length if length else None for length in self.drafter.cache.host_lengths]  # type: ignore[attr-defined]
        unread = self.drafter.unread(texts)
        for sequence, (text, length, lag) in enumerate(zip(texts, held, unread, strict=False)):
            behind = len(text) - 1 - self.starts[sequence] - (length or 0)
            assert lag == (behind if length is None or behind >= SHORT_LAG else 0)
        self.drafter.skip(texts, most[: len(texts)])
        self.drafter.catch_up(texts)
        for sequence, (text, lag, count) in enumerate(zip(texts, unread, most, strict=False)):
            if lag > count:
                self.starts[sequence] = len(text) - 1 - count

    @precondition(lambda self: len(self.texts) > 1)
    @rule(pick=st.integers(0, MAX_BATCH - 1))
    def remove(self, pick: int) -> None:
        self.free(pick % len(self.texts))

    @precondition(lambda self: len(self.texts) == MAX_BATCH)
    @rule(above=SHAPES, scheme=st.integers(0, 99))
    def interrupt(self, above: list[int], scheme: int) -> None:
        """A step that is interrupted between draft and commit."""
        shape = TreeShape(above)
        self.draft(self.drafter, shape, self.scheme(shape, scheme), list(range(len(self.texts))))
        self.drafter.clear()
        self.texts.clear()
        self.params.clear()
        self.seeds.clear()
        self.starts.clear()

    @precondition(lambda self: len(self.texts) > 1 and not isinstance(self.drafter, NgramDrafter))
    @rule(above=SHAPES, scheme=st.integers(0, 99), pick=st.integers(0, MAX_BATCH - 1))
    def fail(self, above: list[int], scheme: int, pick: int) -> None:
        """The draft computes NaN in one sequence, which is removed. The others must not change."""
        shape = TreeShape(above)
        sequence = pick % len(self.texts)
        chosen = self.scheme(shape, scheme)
        expected = self.fresh(shape, chosen)
        used = {*expected.tokens.flatten().tolist(), *(token for text in self.texts for token in text)}
        # Nor 0, which shorter sequences are padded with.
        poison = next(token for token in range(1, VOCABULARY) if token not in used and self.is_read(token))
        self.texts[sequence][-1] = poison
        with poisoned(self.network(), self.own_token(poison)):
            tree = self.draft(self.drafter, shape, chosen, list(range(len(self.texts))))
        assert tree.failed.tolist() == [other == sequence for other in range(len(self.texts))]
        self.compare(tree, expected, [other for other in range(len(self.texts)) if other != sequence])
        # As the engine does: nothing is accepted in a failed sequence.
        states = self.states([[*text, 0] for text in self.texts])
        hidden = [None if known is None else known[0, -1:].expand(1 + shape.depth, -1) for known in states]
        nothing = torch.full((len(self.texts), shape.depth), -1)
        self.drafter.commit(nothing, [[] for _ in self.texts], stacked(hidden))
        for text in self.texts:
            text.append(1)
        self.free(sequence)
        self.end_full_texts()

    @invariant()
    def caches_hold_no_more_than_the_texts(self) -> None:
        if isinstance(self.drafter, ModelDrafter | HeadDrafter):
            cache = self.drafter.cache
            lengths = cache.lengths.tolist()
            assert cache.host_lengths == lengths
            used = len(self.texts)
            assert cache.batch_size == used
            assert all(held < len(text) for held, text in zip(lengths, self.texts, strict=False))
            assert not any(lengths[used:])

    def draft_and_commit(self, shape: TreeShape, scheme: int, ends: list[int], seed: int) -> None:
        chosen = self.scheme(shape, scheme)
        every = list(range(len(self.texts)))
        tree = self.draft(self.drafter, shape, chosen, every)
        self.compare(tree, self.fresh(shape, chosen), every)
        self.compare_with_chain(tree, seed % len(every), ends[0])
        paths = [self.path(tree, sequence, ends[sequence]) for sequence in every]
        depth = tree.shape.depth
        before = [len(text) for text in self.texts]
        for sequence, path in enumerate(paths):
            self.texts[sequence] += [int(tree.tokens[sequence, node]) for node in path]
        hidden = []
        for known, start, path in zip(self.states([[*text, 0] for text in self.texts]), before, paths, strict=True):
            # The path is padded with the root's hidden states, as in the engine.
            columns = [*range(start - 1, start + len(path)), *[start - 1] * (depth - len(path))]
            hidden.append(None if known is None else known[0, columns])
        padded = torch.tensor([path + [-1] * (depth - len(path)) for path in paths], dtype=torch.int64)
        self.drafter.commit(padded.view(len(paths), depth), paths, stacked(hidden))
        for text, token in zip(self.texts, random_tokens(seed, len(every)), strict=True):
            text.append(token % 4 if self.kind == "ngram" else token)
        self.end_full_texts()

    def path(self, tree: CandidateTree, sequence: int, pick: int) -> list[int]:
        """A valid path, short enough for the text to stay within the context."""
        ends = [-1, *tree.valid[sequence].nonzero()[:, 0].tolist()]
        node = ends[pick % len(ends)]
        path: list[int] = []
        while node >= 0:
            path.insert(0, node)
            node = tree.shape.parents[node]
        return path[: CONTEXT - 1 - len(self.texts[sequence])]

    def scheme(self, shape: TreeShape, pick: int) -> Scheme:
        """A scheme that supports the tree."""
        supported = [SCHEMES[name] for name in sorted(SCHEMES) if supports(name, shape)]
        return supported[pick % len(supported)]()

    def draft(
        self,
        drafter: Drafter,
        shape: TreeShape,
        scheme: Scheme,
        order: list[int],
        params: list[SamplingParams] | None = None,
    ) -> CandidateTree:
        seeds = torch.tensor([self.seeds[sequence] for sequence in order])
        positions = torch.tensor([len(self.texts[sequence]) for sequence in order])
        sampling = BatchSamplingParams.of(params or [self.params[sequence] for sequence in order], CPU)
        texts = [self.text(drafter, sequence) for sequence in order]
        if len(shape):
            drafter.catch_up(texts)
        return drafter.draft(texts, shape, scheme, sampling, PhiloxStream(seeds, positions, DRAW))

    def text(self, drafter: Drafter, sequence: int) -> list[int]:
        """What a drafter is given of a text: a fresh one reads what the other has not skipped."""
        return self.texts[sequence][0 if drafter is self.drafter else self.starts[sequence] :]

    def fresh(self, shape: TreeShape, scheme: Scheme) -> CandidateTree:
        """The draft of a fresh drafter, with the sequences in reverse order."""
        drafter = DRAFTERS[self.kind]()
        order = list(range(len(self.texts)))[::-1]
        for sequence, states in zip(order, self.states([self.texts[sequence] for sequence in order]), strict=True):
            drafter.add(self.text(drafter, sequence), states)
        tree = self.draft(drafter, shape, scheme, order)
        reversed_ = [part.flip(0) for part in (tree.tokens, tree.valid, tree.choice, tree.failed)]
        q = None if tree.q is None else type(tree.q)(tree.q.support.flip(0), tree.q.weights.flip(0))
        return CandidateTree(tree.shape, reversed_[0], reversed_[1], reversed_[2], q, reversed_[3])

    def compare(self, tree: CandidateTree, fresh: CandidateTree, sequences: list[int]) -> None:
        assert tree.shape == fresh.shape
        assert torch.equal(tree.valid[sequences], fresh.valid[sequences])
        assert torch.equal(tree.tokens[sequences], fresh.tokens[sequences])
        assert torch.equal(tree.choice[sequences], fresh.choice[sequences])
        assert not tree.failed[sequences].any()
        assert (tree.q is None) == (fresh.q is None)
        if tree.q is not None and fresh.q is not None:
            assert torch.equal(tree.q.support[sequences], fresh.q.support[sequences])
            torch.testing.assert_close(tree.q.weights[sequences], fresh.q.weights[sequences], **close(self.kind))

    def compare_with_chain(self, tree: CandidateTree, sequence: int, pick: int) -> None:
        """q after an inner node equals q after its path, drafted alone as a chain."""
        inner = [node for node in sorted(set(tree.shape.parents)) if node >= 0 and tree.valid[sequence, node]]
        if tree.q is None or not inner:
            return
        node = inner[-1 - pick % len(inner)]
        path = tree.shape.paths[1 + node].tolist()
        path = [on for on in path if on >= 0]
        drafter = DRAFTERS[self.kind]()
        drafter.add(self.text(drafter, sequence), self.states([self.texts[sequence]])[0])
        scheme = Replay([*tree.choice[sequence, path].tolist(), 0])
        # Alone, a greedy sequence has no q. In a batch it has that of temperature 1.
        params = self.params[sequence] if self.params[sequence].temperature else SamplingParams()
        chain = self.draft(drafter, TreeShape(range(-1, len(path))), scheme, [sequence], [params])
        assert chain.q is not None
        assert torch.equal(chain.q.support[0, len(path)], tree.q.support[sequence, 1 + node])
        torch.testing.assert_close(
            chain.q.weights[0, len(path)], tree.q.weights[sequence, 1 + node], **close(self.kind)
        )

    def states(self, texts: list[list[int]]) -> list[Tensor | None]:
        """The target's hidden states ``[1, len(text) - 1, F]`` before each text's last token, if the drafter asks."""
        if not self.drafter.hidden_layers:
            return [None] * len(texts)
        assert self.drafter.hidden_layers == STATES
        assert isinstance(self.drafter, HeadDrafter)
        known = plain(self.drafter.model.target.network, texts)
        return [states[None, :-1] if len(text) > 1 else None for text, (_, states) in zip(texts, known, strict=True)]

    def own_token(self, token: int) -> int:
        """What the draft reads for a token of the text."""
        if isinstance(self.drafter, TranslatedDrafter):
            (own,) = translated_model().vocabulary_map.translate(token)
            return own
        return token

    def is_read(self, token: int) -> bool:
        """Whether no other token reads as this one."""
        return self.kind != "translated" or token in translated_model().vocabulary_map.target_ids

    def network(self) -> torch.nn.Module:
        """The network whose embeddings the draft reads."""
        if isinstance(self.drafter, HeadDrafter):
            return self.drafter.model.target.network  # type: ignore[no-any-return]
        assert isinstance(self.drafter, ModelDrafter)
        assert isinstance(self.drafter.model, TransformersModel)
        return self.drafter.model.network  # type: ignore[no-any-return]

    def free(self, sequence: int) -> None:
        self.drafter.remove(sequence)
        for kept in (self.texts, self.params, self.seeds, self.starts):
            kept[sequence] = kept[-1]  # type: ignore[index]
            kept.pop()

    def end_full_texts(self) -> None:
        """As in the engine, from the last sequence to the first."""
        for sequence in range(len(self.texts) - 1, -1, -1):
            if len(self.texts[sequence]) == CONTEXT:
                self.free(sequence)


def stacked(hidden: list[Tensor | None]) -> Tensor | None:
    known = [states for states in hidden if states is not None]
    return torch.stack(known) if known else None


@pytest.mark.thorough
@pytest.mark.parametrize("kind", DRAFTERS)
def test_a_drafter_with_any_history_drafts_as_a_fresh_one(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Short prompts are read in several chunks.
    monkeypatch.setattr("mcsd.models.prefill._CHUNK", 5)
    # Sequences that lag catch up alone.
    monkeypatch.setattr("mcsd.drafters.level.MAX_LAG", SHORT_LAG)
    run(Drafters, kind, runs=40 if kind == "ngram" else 6, steps=18)
