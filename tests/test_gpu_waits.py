"""What a step does on a simulated GPU: at most two reads and two copies, no mixed devices, and few launches."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import mcsd
from mcsd import SCHEMES, SamplingParams, graphs
from mcsd.models.bound_head import BoundHead
from mcsd.models.draft_head import DraftHead, HeadConfig
from mcsd.models.transformers import TransformersModel
from mcsd.schemes.registry import REGISTRY
from mcsd.testing import TabularModel
from support.recorded_graph import record, waits_are_errors
from support.simulated_cuda import Counts, SimulatedCuda, move, recording, simulated
from support.small_tokenizers import characters, translated
from support.tiny import VOCABULARY, published_head_config, tiny

STEPS = 4
FIELDS: dict[str, Any] = {"max_new_tokens": 40, "ignore_eos": True}
SETTINGS = {
    "greedy": (SamplingParams(temperature=0),),
    "sampled": (SamplingParams(),),
    "mixed": (SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_p=0.8, top_k=7)),
    "typical": (SamplingParams(typical_p=0.6), SamplingParams()),
    "penalties": (SamplingParams(repetition_penalty=1.2, frequency_penalty=0.1, logit_bias={3: 1.0}),),
    "greedy with penalties": (SamplingParams(temperature=0, presence_penalty=0.5),),
    "plain": (SamplingParams(speculative=False), SamplingParams()),
    "logprobs": (SamplingParams(logprobs=3), SamplingParams()),
}


@pytest.fixture(autouse=True)
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A simulated GPU with memory."""
    monkeypatch.setattr("mcsd.models.kv_cache._free_bytes", lambda device: 1 << 34)
    with SimulatedCuda():
        yield


def table(seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return simulated((torch.randn(VOCABULARY, VOCABULARY, generator=generator) * 2).softmax(-1))


def counted(engine: mcsd.Engine, batch: int, settings: tuple[SamplingParams, ...], warm: int = 2) -> Counts:
    """What `STEPS` steps of a full batch do, after ``warm`` steps that fill all caches, of constants and of graphs."""

    def start() -> list[Any]:
        params = [replace(settings[index % len(settings)], **FIELDS, seed=index) for index in range(batch)]
        requests = [engine.request([5, 6, 7 + index], each) for index, each in enumerate(params)]
        for request in requests:
            engine.submit(request)
        return requests

    def cancel(requests: list[Any]) -> None:
        for request in requests:
            engine.cancel(request)

    requests = start()
    for _ in range(warm):
        engine.step()
    cancel(requests)
    requests = start()
    engine.step()
    engine.step()
    with recording() as counts:
        for _ in range(STEPS):
            engine.step()
    cancel(requests)
    return counts


def check(counts: Counts) -> None:
    assert not counts.mixed
    assert counts.reads.total() <= 2 * STEPS, counts.reads
    assert counts.copies.total() <= 2 * STEPS, counts.copies


@pytest.mark.thorough
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes(scheme: str, settings: str) -> None:
    tree = "chain:3" if REGISTRY[scheme].max_width == 1 else "2x2x1"
    target, draft = TabularModel(table(0)), TabularModel(table(1))
    for batch in (1, 8):
        engine = mcsd.Engine(target, draft, tree=tree, scheme=scheme, max_batch=batch, max_length=100)
        check(counted(engine, batch, SETTINGS[settings]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("scheme", ["mcss-wor", "traversal"])
def test_processors_on_a_gpu(scheme: str, temperature: float) -> None:
    """The host verifies such a batch; the texts are those of a CPU. The processors compute on the device."""
    seen = set()

    def favour(input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        seen.add((input_ids.device, logits.device))
        index = torch.arange(logits.shape[1], device=logits.device)
        return logits + 3.0 * ((index + input_ids.sum(-1, keepdim=True)) % 3 == 0)

    fields: dict[str, Any] = {"temperature": temperature, "max_new_tokens": 12, "bad_words": [[5], [6, 7]]}
    texts = []
    for device in (torch.device("cpu"), table(0).device):
        target, draft = (TabularModel(table(index).to(device)) for index in (0, 1))
        engine = mcsd.Engine(target, draft, tree="2x2x1", scheme=scheme, max_batch=3, max_length=100)
        params = [SamplingParams(seed=index, logits_processors=[favour], **fields) for index in range(2)]
        params.append(SamplingParams(seed=2, temperature=temperature, max_new_tokens=12))
        texts.append([done.token_ids for done in engine.generate([[5, 6, 7]] * 3, params)])
        assert seen == {(device, device)}
        seen.clear()
    assert texts[0] == texts[1]


def networks(drafter: str) -> tuple[Any, Any]:
    target = TransformersModel(move(tiny("llama")))
    if drafter in ("model", "translated", "model+ngram"):
        draft = TransformersModel(move(tiny("llama", seed=1)))
        if drafter == "model+ngram":
            return target, [draft, "ngram"]
        order = [*range(8), *range(VOCABULARY - 1, 7, -1)]
        tokenizers = characters(range(VOCABULARY)), characters(order, range(20, 26))
        return target, draft if drafter == "model" else translated(target, tokenizers[0], draft, tokenizers[1])
    if drafter == "ngram":
        return target, drafter
    torch.manual_seed(0)
    own = HeadConfig("tiny", VOCABULARY, 32, (1, -1), 1, VOCABULARY)
    head = DraftHead(own if drafter == "head" else published_head_config())
    return target, BoundHead(move(head), target, "head")


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("tree", ["none", "chain:4", "4x2x1", "parents:-1,-1,-1,0,0,1,3"])
@pytest.mark.parametrize("drafter", ["model", "translated", "head", "published head", "ngram", "model+ngram"])
def test_networks(drafter: str, tree: str, batch: int) -> None:
    target, draft = networks(drafter)
    engine = mcsd.Engine(target, draft, tree=tree, max_batch=batch, max_length=100)
    # What is looked up is proposed, however rarely it is right.
    engine.drafter.cost = lambda batch_size, nodes: 1 / (1 + nodes)  # type: ignore[attr-defined]
    for settings in ("sampled", "greedy"):
        # The same texts again: constants of all lengths of chains are there.
        check(counted(engine, batch, SETTINGS[settings], warm=2 + STEPS))


LAUNCHES = {
    # tree and batch: launches of a step, and graphs among them.
    "model": {("none", 1): (13, 2), ("4x2x1", 1): (20, 4), ("4x2x1", 8): (24, 4)},
    "translated": {("4x2x1", 1): (20, 4), ("4x2x1", 8): (24, 4)},
    "head": {("4x2x1", 1): (24, 3), ("4x2x1", 8): (44, 3)},
}
"""Of a captured step. The others copy inputs of graphs, index random numbers, and collect hidden states."""

EAGER_LAUNCHES = {"model": 905, "head": 819}
"""Of a step with tree 4x2x1 that is not captured: target and draft have two layers, the head one."""


def captured(drafter: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    monkeypatch.setattr(graphs, "record", record)
    monkeypatch.setattr(graphs, "waits_are_errors", waits_are_errors)
    monkeypatch.setattr(graphs, "_reserved_bytes", lambda device: 0)
    target, draft = networks(drafter)
    target.captures = True
    (draft.model if drafter == "translated" else draft).captures = True
    return target, draft


@pytest.mark.parametrize("drafter", LAUNCHES)
def test_a_captured_step_is_a_few_launches(drafter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for (tree, batch), (most, replays) in LAUNCHES[drafter].items():
        target, draft = captured(drafter, monkeypatch)
        engine = mcsd.Engine(target, draft, tree=tree, max_batch=batch, max_length=100)
        counts = counted(engine, batch, SETTINGS["sampled"], warm=12)
        check(counts)
        assert counts.launches["graph"] == replays * STEPS, counts.launches
        assert counts.launches.total() <= 1.2 * most * STEPS, counts.launches


@pytest.mark.parametrize("drafter", EAGER_LAUNCHES)
def test_launches_of_a_step_that_is_not_captured(drafter: str) -> None:
    target, draft = networks(drafter)
    engine = mcsd.Engine(target, draft, tree="4x2x1", max_batch=1, max_length=100)
    counts = counted(engine, 1, SETTINGS["sampled"])
    assert counts.launches.total() <= 1.2 * EAGER_LAUNCHES[drafter] * STEPS, counts.launches
