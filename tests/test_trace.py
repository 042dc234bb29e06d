"""Traces of steps: p and q are those of the tables, and the path is what the chunk emits."""

import asyncio
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import mcsd
from mcsd import SamplingParams, StepTrace
from mcsd.sampling import apply_penalties
from mcsd.schemes.registry import REGISTRY, supports
from mcsd.testing import TabularModel
from mcsd.tracing import TOP
from support.chisquare import warped
from support.simulated_cuda import SimulatedCuda, simulated

SIZE = 9


def table(seed: int) -> Tensor:
    rows = torch.rand(SIZE, SIZE, generator=torch.Generator().manual_seed(seed)) ** 2 + 0.01
    return rows / rows.sum(-1, keepdim=True)


TARGET, DRAFT = table(0), table(1)


def engine(scheme: str = "mcss-wor", tree: str = "2x2x1", **options: Any) -> mcsd.Engine:
    return mcsd.Engine(TabularModel(TARGET), options.pop("draft", TabularModel(DRAFT)), None, tree, scheme, **options)


def steps(
    subject: mcsd.Engine, params: SamplingParams, prompt: tuple[int, ...] = (3,)
) -> list[tuple[list[int], mcsd.Chunk, StepTrace]]:
    """The tokens before each step, its chunk and its trace."""
    text, found = list(prompt), []
    for chunk in subject.stream(list(prompt), params, trace=True):
        assert chunk.trace is not None
        found.append((list(text), chunk, chunk.trace))
        text += chunk.token_ids
    return found


def before(text: list[int], trace: StepTrace, node: int) -> list[int]:
    """The tokens up to the parent of a candidate."""
    parent = trace.parents[node]
    token = None if parent < 0 else trace.token_ids[parent]
    return text if token is None else [*before(text, trace, parent), token]


@pytest.mark.parametrize("scheme", sorted(REGISTRY))
def test_p_and_q_are_those_of_the_tables(scheme: str) -> None:
    tree = next(tree for tree in ("2x2x1", "3", "chain:3") if supports(scheme, mcsd.TreeShape.parse(tree)))
    params = SamplingParams(temperature=0.7, top_k=6, seed=4, max_new_tokens=40)
    p, q = warped(TARGET.double(), params), warped(DRAFT.double(), params)
    for text, chunk, trace in steps(engine(scheme, tree), params):
        assert trace.parents == mcsd.TreeShape.parse(tree).parents
        for node, token in enumerate(trace.token_ids):
            last = before(text, trace, node)[-1]
            if token is None:
                assert trace.p[node] is trace.q[node] is None
                continue
            assert trace.p[node] == pytest.approx(float(p[last, token]), abs=1e-5)
            if scheme == "top-k":
                continue
            assert trace.q[node] == pytest.approx(float(q[last, token]), abs=1e-5)
        on_path = [trace.token_ids[node] for node in trace.path]
        assert list(chunk.token_ids) == [*on_path, trace.token_id][: len(chunk.token_ids)]
        assert len(chunk.token_ids) == len(trace.path) + 1 or chunk.completion
        assert [trace.parents[node] for node in trace.path] == [-1, *trace.path][: len(trace.path)]
        for node, top in enumerate(trace.top):
            last = text[-1] if node == 0 else trace.token_ids[node - 1]
            if last is None:
                continue
            best = [(int(index), float(value)) for value, index in zip(*p[last].topk(TOP), strict=True) if value > 0]
            assert [token for token, _ in top] == [token for token, _ in best]
            assert [value for _, value in top] == pytest.approx([value for _, value in best], abs=1e-5)
            if scheme != "top-k" and node - 1 in trace.parents and None not in trace.token_ids:
                drawn = [float(q[last, token]) for token, _ in best]
                assert trace.top_q[node] == pytest.approx(drawn, abs=1e-5)
        assert trace.scheme == scheme


def test_the_accepted_share_of_first_candidates_is_what_p_and_q_say() -> None:
    """With one candidate it is accepted with probability min(1, p/q): chi-square of 1 degree, 1 false alarm in 10^4."""
    expected = variance = seen = 0.0
    for seed in range(20):
        for _, _, trace in steps(engine(tree="1"), SamplingParams(seed=seed, max_new_tokens=40)):
            assert trace.p[0] is not None
            assert trace.q[0] is not None
            accept = min(1.0, trace.p[0] / trace.q[0])
            expected, variance = expected + accept, variance + accept * (1 - accept)
            seen += bool(trace.path)
    assert variance > 30
    assert abs(seen - expected) < 3.9 * math.sqrt(variance)


def test_penalties_count_the_path() -> None:
    params = SamplingParams(
        seed=2, presence_penalty=1.0, repetition_penalty=1.3, logit_bias={2: 1.5}, max_new_tokens=30
    )
    for text, _, trace in steps(engine(), params, (3, 5)):
        for node, token in enumerate(trace.token_ids):
            assert token is not None
            path = before(text, trace, node)
            logits = apply_penalties(TARGET[path[-1]].log(), params, [3, 5], path[2:])
            assert trace.p[node] == pytest.approx(float(logits.softmax(-1)[token]), abs=1e-5)


@pytest.mark.parametrize(("draft", "temperature"), [("ngram", 1.0), (None, 0.0)])
def test_candidates_that_are_not_drawn_have_no_q(draft: str | None, temperature: float) -> None:
    options = {"draft": draft} if draft else {}
    params = SamplingParams(temperature=temperature, seed=1, max_new_tokens=30)
    traces = [trace for _, _, trace in steps(engine(**options), params, (3, 5, 3, 5, 3))]
    assert all(each is None for trace in traces for each in [*trace.q, *(q for top in trace.top_q for q in top)])
    assert {trace.scheme for trace in traces} == {"top-k"}
    tokens = [token for trace in traces for token in trace.token_ids]
    assert any(token is not None for token in tokens)
    assert draft is None or None in tokens


def test_plain_decoding_has_traces_without_candidates() -> None:
    for _, chunk, trace in steps(engine(tree="none"), SamplingParams(seed=1, max_new_tokens=5)):
        assert trace.parents == trace.token_ids == trace.path == ()
        assert (trace.token_id,) == chunk.token_ids
        assert len(trace.top) == 1


def test_traces_are_off_by_default_and_change_no_text() -> None:
    subject, params = engine(max_batch=2), SamplingParams(seed=7, max_new_tokens=20)
    plain = subject.stream([3], params)
    first = next(plain)
    traced = [chunk for _, chunk, _ in steps(subject, params)]
    chunks = [first, *plain]
    assert all(chunk.trace is None for chunk in chunks)
    assert [chunk.token_ids for chunk in chunks] == [chunk.token_ids for chunk in traced]


def test_pieces_are_the_texts_of_the_candidates() -> None:
    class Letters:
        def decode(self, ids: list[int], **options: Any) -> str:
            return "".join("abcdefghi"[id] for id in ids)

    subject = mcsd.Engine(TabularModel(TARGET), TabularModel(DRAFT), Letters(), "2x2")
    for _, _, trace in steps(subject, SamplingParams(seed=1, max_new_tokens=5)):
        assert trace.pieces == tuple("" if id is None else "abcdefghi"[id] for id in trace.token_ids)


def test_traces_of_the_async_engine() -> None:
    params = SamplingParams(seed=7, max_new_tokens=20)

    async def main() -> list[StepTrace | None]:
        async with mcsd.AsyncEngine(engine()) as served:
            return [chunk.trace async for chunk in served.stream([3], params, trace=True)]

    assert asyncio.run(main()) == [trace for _, _, trace in steps(engine(), params)]


def test_traces_on_a_gpu() -> None:
    """A simulated one, which verifies whole batches."""
    params = SamplingParams(seed=7, temperature=0.8, presence_penalty=0.5, max_new_tokens=12)
    expected = steps(engine(), params)
    with SimulatedCuda():
        models = [TabularModel(simulated(each)) for each in (TARGET, DRAFT)]
        found = steps(mcsd.Engine(*models, tree="2x2x1", max_batch=2), params)
    for (_, _, one), (_, _, other) in zip(found, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert one.path == other.path
        assert one.p == pytest.approx(other.p, abs=1e-5)
        assert one.q == pytest.approx(other.q, abs=1e-5)
