"""How often the host waits in a step on a simulated GPU: at most two reads and two copies, and no mixed devices."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import mcsd
from mcsd import SCHEMES, SamplingParams
from mcsd.models.draft_head import BoundHead, DraftHead, HeadConfig
from mcsd.models.transformers import TransformersModel
from mcsd.schemes.registry import REGISTRY
from mcsd.testing import TabularModel
from support.simulated_cuda import Counts, SimulatedCuda, move, recording, simulated
from support.tiny import VOCABULARY, tiny

STEPS = 4
FIELDS: dict[str, Any] = {"max_new_tokens": 40, "ignore_eos": True}
SETTINGS = {
    "greedy": (SamplingParams(temperature=0),),
    "sampled": (SamplingParams(),),
    "mixed": (SamplingParams(), SamplingParams(temperature=0), SamplingParams(top_p=0.8, top_k=7)),
    "penalties": (SamplingParams(repetition_penalty=1.2, frequency_penalty=0.1, logit_bias={3: 1.0}),),
    "greedy with penalties": (SamplingParams(temperature=0, presence_penalty=0.5),),
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


def counted(engine: mcsd.Engine, batch: int, settings: tuple[SamplingParams, ...]) -> Counts:
    """What `STEPS` steps of a full batch do, after steps that fill all caches of constants."""

    def start() -> list[Any]:
        params = [replace(settings[index % len(settings)], **FIELDS, seed=index) for index in range(batch)]
        return [engine.request([5, 6, 7 + index], each) for index, each in enumerate(params)]

    engine.run(start())
    requests = start()
    for request in requests:
        engine.submit(request)
    engine.step()
    engine.step()
    with recording() as counts:
        for _ in range(STEPS):
            engine.step()
    for request in requests:
        engine.cancel(request)
    return counts


def check(counts: Counts) -> None:
    assert not counts.mixed
    assert counts.reads.total() <= 2 * STEPS, counts.reads
    assert counts.copies.total() <= 2 * STEPS, counts.copies


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes(scheme: str, settings: str) -> None:
    tree = "chain:3" if REGISTRY[scheme].max_width == 1 else "2x2x1"
    target, draft = TabularModel(table(0)), TabularModel(table(1))
    for batch in (1, 8):
        engine = mcsd.Engine(target, draft, tree=tree, scheme=scheme, max_batch=batch, max_length=100)
        check(counted(engine, batch, SETTINGS[settings]))


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("tree", ["none", "chain:4", "4x2x1", "parents:-1,-1,-1,0,0,1,3"])
@pytest.mark.parametrize("drafter", ["model", "head", "ngram"])
def test_networks(drafter: str, tree: str, batch: int) -> None:
    target = TransformersModel(move(tiny("llama")))
    draft: Any = "ngram"
    if drafter == "model":
        draft = TransformersModel(move(tiny("llama", seed=1)))
    elif drafter == "head":
        torch.manual_seed(0)
        head = DraftHead(HeadConfig("tiny", VOCABULARY, 32, (1, -1), 1, VOCABULARY))
        draft = BoundHead(move(head), target, "head")
    engine = mcsd.Engine(target, draft, tree=tree, max_batch=batch, max_length=100)
    for settings in ("sampled", "greedy"):
        check(counted(engine, batch, SETTINGS[settings]))
