"""Requests that come, go and are streamed in any order: each has the text that it has alone in a fresh engine.

All runs in float64: a decision that differs between a batch and a row alone would have to hang on a difference of
1e-13 (1e-8 for a head), where a run takes some thousands of decisions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import mcsd
from mcsd import SamplingParams, TreeShape
from mcsd.drafters import HeadDrafter, ModelDrafter
from mcsd.engine import Request
from mcsd.errors import McsdError, RequestInterrupted
from mcsd.models import TransformersModel
from mcsd.rng import PhiloxStream, Randomness
from mcsd.sampling import BatchSamplingParams
from mcsd.schemes import SCHEMES, CandidateTree, Scheme
from mcsd.schemes.registry import supports
from support.exact import CONTEXT, POISON, close, exact, exact_head, plain, random_tokens, run

BATCH = 3
EOS = 3
TREES = ["parents:-1,-1,-1,0,0,1,3", "2x2x1", "chain:3"]
"""From wide to narrow: a scheme is run on the first that it can judge."""

PROMPTS = [random_tokens(seed, length) for seed, length in enumerate([1, 2, 5, 9, 14, 21, 30, CONTEXT - 2])]
# Beginnings that other prompts go on from.
PROMPTS += [PROMPTS[6][:12], [*PROMPTS[6][:18], *PROMPTS[3]]]
# A prompt that breaks: the embedding of one token is NaN.
PROMPTS.append([5, POISON, 7, 8])
PARAMS = [
    SamplingParams(seed=1, max_new_tokens=12),
    SamplingParams(seed=2, max_new_tokens=1),
    SamplingParams(temperature=0, max_new_tokens=7),
    SamplingParams(temperature=0.7, top_k=8, seed=4, max_new_tokens=9, ignore_eos=True),
    SamplingParams(temperature=1.2, top_p=0.9, seed=2**64 - 1, max_new_tokens=15),
    SamplingParams(repetition_penalty=1.3, frequency_penalty=0.5, logit_bias={9: 2.0}, seed=6, max_new_tokens=8),
]
PLACES = [("target", "forward"), ("drafter", "draft"), ("cache", "advance"), ("drafter", "commit")]
JOBS = st.sampled_from([(i % len(PROMPTS), i % len(PARAMS)) for i in range(22)])
PICKS = st.integers(0, 99)


@cache
def target() -> TransformersModel:
    """Says NaN after one token, and that a text ends with another."""
    # The seed is used in this file only.
    network = exact("llama", 10)
    network.get_input_embeddings().weight.data[POISON] = torch.nan
    model = TransformersModel(network)
    model.eos_token_ids = frozenset({EOS})
    return model


def tree_for(scheme: str) -> TreeShape:
    for tree in map(TreeShape.parse, TREES):
        if supports(scheme, tree):
            return tree
    raise AssertionError(f"no tree for {scheme}")


def witness(drafter: ModelDrafter | HeadDrafter, limits: dict[str, float]) -> Any:
    """The drafter, but whenever it is asked it compares its first q with that of a fresh one after the same texts.

    Where all rows are greedy there is no q: their most probable tokens then.
    """
    draft = drafter.draft

    def compared(
        texts: list[list[int]], shape: TreeShape, scheme: Scheme, settings: BatchSamplingParams, random: Randomness
    ) -> CandidateTree:
        tree = draft(texts, shape, scheme, settings, random)
        fresh = drafter_for("head" if isinstance(drafter, HeadDrafter) else "model")
        for text in texts:
            fresh.add(text, prompt_states(text) if fresh.hidden_layers else None)
        zeros = torch.zeros(len(texts), dtype=torch.int64)
        first = TreeShape([-1] * shape.parents.count(-1))
        other = fresh.draft(texts, first, SCHEMES["top-k"](), settings, PhiloxStream(zeros, zeros, 0))
        fine = ~other.failed
        if settings.all_greedy:
            assert torch.equal(tree.tokens[fine, : len(first)], other.tokens[fine])
            return tree
        assert tree.q is not None
        assert other.q is not None
        assert torch.equal(tree.q.support[fine, 0], other.q.support[fine, 0])
        torch.testing.assert_close(tree.q.weights[fine, 0], other.q.weights[fine, 0], **limits)
        return tree

    drafter.draft = compared  # type: ignore[method-assign]
    return drafter


def prompt_states(text: list[int]) -> torch.Tensor | None:
    return plain(target().network, [text[:-1]])[0][1][None] if len(text) > 1 else None


def drafter_for(kind: str) -> ModelDrafter | HeadDrafter:
    # As the engine makes them.
    slots = CONTEXT + 2 + 7
    if kind == "head":
        return HeadDrafter(exact_head("llama", 10), BATCH, slots)
    return ModelDrafter(TransformersModel(exact("mistral-window", 11)), target().vocab_size, BATCH, slots)


def make_engine(kind: str, batch: int, watched: bool) -> mcsd.Engine:
    """An engine of a kind, "draft scheme"."""
    draft, scheme = kind.split()
    drafter: Any = "ngram"
    if draft in ("model", "head"):
        drafter = drafter_for(draft)
        drafter = witness(drafter, close(draft)) if watched else drafter
    tree = "none" if draft == "none" else tree_for(scheme)
    return mcsd.Engine(target(), drafter, tree=tree, scheme=scheme, max_batch=batch, max_length=CONTEXT)


@dataclass(frozen=True)
class Alone:
    """How a request ends where nothing else runs."""

    tokens: tuple[int, ...]
    reason: str | None
    error: type[McsdError] | None
    steps: tuple[int, ...]


@cache
def alone(kind: str, job: tuple[int, int]) -> Alone:
    engine = make_engine(kind, 1, watched=False)
    request = engine.request(PROMPTS[job[0]], PARAMS[job[1]])
    engine.submit(request)
    while not request.done:
        engine.step()
    steps = tuple(len(chunk.token_ids) for chunk in request.chunks)
    reason = request.completion.finish_reason if request.completion else None
    return Alone(tuple(request.tokens), reason, type(request.error) if request.error else None, steps)


class Reader:
    """An iterator over chunks, and what it has given."""

    def __init__(self, job: tuple[int, int], chunks: Iterator[mcsd.Chunk]) -> None:
        self.job, self.chunks = job, chunks
        self.tokens: list[int] = []


class Engines(RuleBasedStateMachine):
    """One engine with few rows, and all requests that were ever given to it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.engine = make_engine(kind, BATCH, watched=kind in WATCHED)
        self.requests: list[tuple[tuple[int, int], Request]] = []
        self.cancelled: list[Request] = []
        self.streams: list[Reader] = []

    @initialize(jobs=st.lists(JOBS, min_size=BATCH + 2, max_size=BATCH + 3))
    def fill(self, jobs: list[tuple[int, int]]) -> None:
        self.submit(jobs)

    @rule(jobs=st.lists(JOBS, min_size=1, max_size=4))
    def submit(self, jobs: list[tuple[int, int]]) -> None:
        for job in jobs:
            request = self.engine.request(PROMPTS[job[0]], PARAMS[job[1]])
            self.engine.submit(request)
            self.requests.append((job, request))

    @precondition(lambda self: sum(not request.done for request in self.engine._running) > 1)
    @rule(place=st.sampled_from(PLACES), after=st.booleans())
    def fail(self, place: tuple[str, str], after: bool) -> None:
        """A step of several requests fails once. They repeat it alone, one after the other."""
        owner = getattr(self.engine, place[0])
        method = getattr(owner, place[1])

        def broken(*arguments: Any, **options: Any) -> None:
            if after:
                method(*arguments, **options)
            raise RuntimeError("broken")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, place[1], broken)
            self.engine.step()
        assert not self.engine._running

    @rule(times=st.integers(1, 4))
    def step(self, times: int) -> None:
        for _ in range(times):
            repeats = any(request.alone for request in self.engine._waiting)
            before = [len(request.tokens) for _, request in self.requests]
            live = [not request.done for _, request in self.requests]
            self.engine.step()
            grown = [
                len(request.tokens) > count or request.error is not None
                for (_, request), count, alive in zip(self.requests, before, live, strict=True)
                if alive
            ]
            # First come, first served: those that grow stand before those that wait, and no row is left empty.
            assert repeats or grown == sorted(grown, reverse=True)
            if not self.streams and not repeats:
                assert sum(grown) == min(BATCH, len(grown))

    @precondition(lambda self: self.requests)
    @rule(pick=PICKS)
    def cancel(self, pick: int) -> None:
        """Whether it runs, waits or has ended."""
        _, request = self.requests[pick % len(self.requests)]
        if not request.done:
            self.cancelled.append(request)
        self.engine.cancel(request)
        assert request.done

    @precondition(lambda self: len(self.streams) < 2)
    @rule(job=JOBS)
    def open_stream(self, job: tuple[int, int]) -> None:
        self.streams.append(Reader(job, self.engine.stream(PROMPTS[job[0]], PARAMS[job[1]])))

    @precondition(lambda self: self.streams)
    @rule(pick=PICKS, times=st.integers(1, 3))
    def read_stream(self, pick: int, times: int) -> None:
        stream = self.streams[pick % len(self.streams)]
        expected = alone(self.kind, stream.job)
        for _ in range(times):
            try:
                chunk = next(stream.chunks)
            except StopIteration:
                assert expected.error is None
                assert tuple(stream.tokens) == expected.tokens
                self.streams.remove(stream)
                return
            except McsdError as error:
                self.streams.remove(stream)
                self.expect(error, [expected])
                return
            stream.tokens += chunk.token_ids
            assert tuple(stream.tokens) == expected.tokens[: len(stream.tokens)]

    @precondition(lambda self: self.streams)
    @rule(pick=PICKS)
    def give_stream_up(self, pick: int) -> None:
        self.streams.pop(pick % len(self.streams)).chunks.close()  # type: ignore[attr-defined]

    @rule(jobs=st.lists(JOBS.filter(lambda job: job[0] < len(PROMPTS) - 1), max_size=2))
    def generate(self, jobs: list[tuple[int, int]]) -> None:
        """To the end, while the others run on or wait."""
        expected = [alone(self.kind, job) for job in jobs]
        prompts, params = [PROMPTS[job[0]] for job in jobs], [PARAMS[job[1]] for job in jobs]
        try:
            done = self.engine.generate(prompts, params)
        except McsdError as error:
            self.expect(error, expected)
        else:
            assert [completion.token_ids for completion in done] == [one.tokens for one in expected]

    def expect(self, error: McsdError, by: list[Alone]) -> None:
        assert type(error) in [one.error for one in by]

    @invariant()
    def texts_are_those_of_requests_alone(self) -> None:
        for job, request in self.requests:
            expected = alone(self.kind, job)
            assert tuple(request.tokens) == expected.tokens[: len(request.tokens)]
            steps = tuple(len(chunk.token_ids) for chunk in request.chunks)
            # How many tokens are looked up in a step depends on the batch; the text does not.
            assert steps == expected.steps[: len(steps)] or self.kind.startswith("ngram")
            if request in self.cancelled:
                assert isinstance(request.error, RequestInterrupted)
                assert request.completion is None
            elif request.completion is not None:
                assert request.completion.token_ids == expected.tokens
                assert request.completion.finish_reason == expected.reason
            elif request.error is not None:
                assert type(request.error) is expected.error

    @invariant()
    def cache_holds_texts_but_for_the_root(self) -> None:
        cache, running = self.engine.cache, self.engine._running
        used = len(running)
        assert cache.batch_size == used
        assert cache.lengths.tolist() == [len(request.all_tokens) - 1 for request in running] + [0] * (BATCH - used)

    def teardown(self) -> None:
        """Nothing is left behind."""
        for stream in self.streams:
            stream.chunks.close()  # type: ignore[attr-defined]
        for _ in range(200):
            if all(request.done for _, request in self.requests):
                break
            self.engine.step()
        assert all(request.done for _, request in self.requests)
        self.texts_are_those_of_requests_alone()
        self.cache_holds_texts_but_for_the_root()


# A second drafter beside the first takes time, and what is kept does not depend on the scheme.
WATCHED = ["model mcss-wor", "head mcss-wor"]
KINDS = [f"model {scheme}" for scheme in sorted(SCHEMES)] + ["head mcss-wor", "ngram top-k", "none mcss"]


@pytest.mark.thorough
@pytest.mark.parametrize("kind", KINDS)
def test_requests_in_any_order_have_the_texts_they_have_alone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nearly all prompts are found in the prefix cache the second time.
    monkeypatch.setattr("mcsd.models.prefix_cache.BLOCK", 4)
    run(Engines, kind, runs=3 if kind in WATCHED else 2, steps=10)
