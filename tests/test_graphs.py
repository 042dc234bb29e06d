"""Captured functions: an engine that replays recorded operations gives the texts of one that runs them."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import mcsd
from mcsd import SCHEMES, SamplingParams, graphs
from mcsd.graphs import GraphCache, ReadTensors
from mcsd.models.bound_head import BoundHead
from mcsd.models.draft_head import DraftHead, HeadConfig
from mcsd.models.transformers import TransformersModel
from mcsd.schemes.registry import REGISTRY
from mcsd.testing import TabularModel
from support.recorded_graph import record, waits_are_errors
from support.simulated_cuda import DEVICE, SimulatedCuda, move, recording, simulated
from support.tiny import VOCABULARY, published_head_config, tiny

SETTINGS = {
    "sampled": (SamplingParams(),),
    "mixed": (SamplingParams(temperature=0.7), SamplingParams(temperature=0), SamplingParams(top_p=0.8, top_k=7)),
    "penalties": (SamplingParams(repetition_penalty=1.2, logit_bias={3: 1.0}), SamplingParams(logprobs=2)),
}
PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [3, 4]]


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A simulated GPU on which recorded operations stand for graphs."""
    monkeypatch.setattr("mcsd.models.kv_cache._free_bytes", lambda device: 1 << 34)
    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(graphs, "waits_are_errors", waits_are_errors)
    monkeypatch.setattr(graphs, "_reserved_bytes", lambda device: 0)
    with SimulatedCuda():
        yield


def texts(engine: mcsd.Engine, settings: str, new_tokens: int = 12) -> list[tuple[int, ...]]:
    """Four texts of different lengths, two at a time: sequences come and go, and move."""
    params = [
        replace(SETTINGS[settings][i % len(SETTINGS[settings])], seed=i, ignore_eos=True, max_new_tokens=new_tokens + i)
        for i in range(len(PROMPTS))
    ]
    return [done.token_ids for done in engine.generate(PROMPTS, params)]


def tabular(captures: bool) -> tuple[Any, Any]:
    models = []
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        rows = (torch.randn(VOCABULARY, VOCABULARY, generator=generator) * 2).softmax(-1)
        model = TabularModel(simulated(rows))
        model.captures = captures
        models.append(model)
    return models[0], models[1]


def networks(drafter: str, captures: bool, move: Callable[[Any], Any] = move) -> tuple[Any, Any]:
    target = TransformersModel(move(tiny("llama")), captures=captures)
    if drafter in ("model", "model+ngram"):
        draft = TransformersModel(move(tiny("llama", seed=1)), captures=captures)
        return target, draft if drafter == "model" else [draft, "ngram"]
    if drafter == "ngram":
        return target, "ngram"
    torch.manual_seed(0)
    own = HeadConfig("tiny", VOCABULARY, 32, (1, -1), 1, VOCABULARY)
    head = DraftHead(own if drafter == "head" else published_head_config())
    return target, BoundHead(move(head), target, "head")


@pytest.mark.thorough
@pytest.mark.parametrize("settings", ["mixed", "penalties"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_gives_the_same_texts(scheme: str, settings: str) -> None:
    tree = "chain:3" if REGISTRY[scheme].max_width == 1 else "2x2x1"
    expected = texts(mcsd.Engine(*tabular(False), tree=tree, scheme=scheme, max_batch=2, max_length=100), settings)
    engine = mcsd.Engine(*tabular(True), tree=tree, scheme=scheme, max_batch=2, max_length=100)
    assert texts(engine, settings) == expected
    assert engine.graphs.stats.graphs >= 2


@pytest.mark.parametrize("tree", ["none", "chain:4", "4x2x1", "parents:-1,-1,-1,0,0,1,3"])
@pytest.mark.parametrize("drafter", ["model", "head", "published head", "ngram", "model+ngram"])
def test_every_drafter_gives_the_same_texts(drafter: str, tree: str) -> None:
    expected = texts(mcsd.Engine(*networks(drafter, False), tree=tree, max_batch=2, max_length=100), "sampled")
    engine = mcsd.Engine(*networks(drafter, True), tree=tree, max_batch=2, max_length=100)
    assert texts(engine, "sampled") == expected
    assert engine.graphs.stats.graphs >= 2


@pytest.mark.parametrize("drafter", ["model", "head", "published head"])
def test_a_gpu_gives_the_texts_of_a_cpu(drafter: str) -> None:
    """Forwards are padded there, and read more slots."""
    done = [
        mcsd.Engine(*networks(drafter, False, place), tree="4x2x1", max_batch=1).generate([5, 6, 7], seed=1)
        for place in (move, lambda module: module)
    ]
    assert done[0].token_ids == done[1].token_ids
    assert done[0].stats.target_calls == done[1].stats.target_calls


SCENARIO = (
    # Tokens of the prompt, new tokens, and sampling: what an engine generates one after the other.
    (3, 8, SamplingParams()),
    (5, 8, SamplingParams(top_k=3)),
    (16, 40, SamplingParams()),
    (3, 8, SamplingParams(temperature=0)),
    (40, 30, SamplingParams()),  # The caches grow.
    (7, 8, SamplingParams(temperature=0.6)),
    (4, 8, SamplingParams(repetition_penalty=1.3)),
    (3, 8, SamplingParams()),
    (90, 8, SamplingParams()),
    (20, 8, SamplingParams()),
)


def used_slots(cache: Any) -> Tensor:
    """Keys and values of the committed tokens of the first sequence."""
    return cache._store[:, :, 0, :, : cache.host_lengths[0]].as_subclass(Tensor)


@pytest.mark.parametrize("tree", ["none", "4x2x1"])
def test_every_step_leaves_the_caches_as_without_graphs(tree: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Short texts fill several multiples of these, in a cache and in the larger one after it.
    monkeypatch.setattr("mcsd.models.kv_cache._FIRST_SLOTS_ON_A_GPU", 64)
    monkeypatch.setattr("mcsd.models.kv_cache._COLUMNS_ON_A_GPU", 16)
    engines = [
        mcsd.Engine(*networks("model", captures), tree=tree, max_batch=1, max_length=120) for captures in (False, True)
    ]
    for turn, (length, new, params) in enumerate(SCENARIO):
        fields = {"seed": turn, "ignore_eos": True, "max_new_tokens": new}
        requests = [
            engine.request([5 + i % 50 for i in range(length)], replace(params, **fields)) for engine in engines
        ]
        for engine, request in zip(engines, requests, strict=True):
            engine.submit(request)
        while not requests[0].done:
            for engine in engines:
                engine.step()
            assert requests[0].tokens == requests[1].tokens, turn
            caches = [[engine.cache, getattr(engine.drafter, "cache", engine.cache)] for engine in engines]
            for expected, ours in zip(*caches, strict=True):
                assert ours.host_lengths == expected.host_lengths == ours.lengths.tolist()
                if expected.host_lengths[0]:
                    torch.testing.assert_close(used_slots(ours), used_slots(expected))
    assert engines[1].cache.generation == 2


class Doubled:
    """A function of two tensors with a constant, and how often Python ran it."""

    def __init__(self) -> None:
        self.calls = 0
        self.total = simulated(torch.zeros(2))

    def __call__(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        self.total += first
        return first * 2, first + second


def test_a_function_is_captured_when_it_is_used_again_and_then_replayed() -> None:
    cache, function = GraphCache(DEVICE, True), Doubled()
    for turn in range(5):
        first, second = simulated(torch.full((2,), float(turn))), simulated(torch.ones(2))
        outputs = cache.run("key", function, first, second)
        assert [each.tolist() for each in outputs] == [[2.0 * turn] * 2, [turn + 1.0] * 2]
    assert function.calls == 3
    assert function.total.tolist() == [10.0, 10.0]
    assert cache.stats.graphs == 1


def test_inputs_are_copied_when_they_have_changed() -> None:
    cache, function = GraphCache(DEVICE, True), Doubled()
    first, second = simulated(torch.ones(2)), simulated(torch.ones(2))
    for _ in range(4):
        cache.run("key", function, first, second)
    first += 4
    assert cache.run("key", function, first, second)[0].tolist() == [10.0, 10.0]
    assert cache.run("key", function, first, simulated(torch.zeros(2)))[1].tolist() == [5.0, 5.0]
    with recording() as counts:
        cache.run("key", function, first, second)
        cache.run("key", function, first, second)
    assert counts.launches == {"graph": 2, "_foreach_copy_": 1}


def test_a_new_generation_ends_all_graphs() -> None:
    cache, function = GraphCache(DEVICE, True), Doubled()
    one = simulated(torch.ones(2))
    for generation in (1, 2):
        for _ in range(4):
            cache.run("key", function, one, one, generation=generation)
        assert function.calls == 3 * generation
        assert cache.stats.graphs == 1


def test_memory_that_a_function_reads_is_kept() -> None:
    constants = [torch.ones(2), torch.ones(3)]
    argument = torch.ones(2)
    with ReadTensors() as read:
        made = argument[:1] + constants[0]
        (made * 2).add_(torch.cat([constants[1][:1], made[:1]]))
    assert read.addresses == {each.data_ptr() for each in (argument, *constants)}


def test_a_first_run_that_fails_does_not_count() -> None:
    cache, function, one = GraphCache(DEVICE, True), Doubled(), simulated(torch.ones(2))

    def fail(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        raise torch.OutOfMemoryError("no memory")

    for _ in range(3):
        with pytest.raises(torch.OutOfMemoryError):
            cache.run("key", fail, one, one)
    for _ in range(2):
        cache.run("key", function, one, one)
    assert cache.stats.graphs == 0


def test_the_number_of_graphs_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    cache, function = GraphCache(DEVICE, True), Doubled()
    one = simulated(torch.ones(2))
    for key in "aaabbbacccac":
        cache.run(key, function, one, one)
    assert cache.stats.graphs == 2
    before = function.calls
    cache.run("a", function, one, one)
    cache.run("c", function, one, one)
    assert function.calls == before
    cache.run("b", function, one, one)
    assert function.calls == before + 1


def test_the_memory_of_graphs_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    size = graphs.MAX_BYTES // 2 + 1
    reserved = iter([0, size, size, 2 * size])
    monkeypatch.setattr(graphs, "_reserved_bytes", lambda device: next(reserved))
    cache, function = GraphCache(DEVICE, True), Doubled()
    one = simulated(torch.ones(2))
    for key in "aaabbb":
        assert cache.run(key, function, one, one)[0].tolist() == [2.0, 2.0]
    assert cache.stats == (1, size)


def test_a_function_that_waits_runs_without_a_graph() -> None:
    cache = GraphCache(DEVICE, True)

    def waits(x: Tensor) -> tuple[Tensor]:
        return (x * float(x.sum()),)

    one = simulated(torch.ones(2))
    cache.run("key", waits, one)
    with pytest.warns(mcsd.errors.McsdWarning, match="no CUDA graphs"):
        assert cache.run("key", waits, one)[0].tolist() == [2.0, 2.0]
    assert cache.run("key", waits, one + 1)[0].tolist() == [8.0, 8.0]
    assert cache.stats.graphs == 0


def test_on_a_cpu_nothing_is_captured() -> None:
    cache = GraphCache(torch.device("cpu"), True)
    for _ in range(3):
        cache.run("key", lambda x: (x,), torch.ones(2))
    assert cache.stats == (0, 0)
