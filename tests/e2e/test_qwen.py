"""The Qwen2.5-Coder pair on real weights. Run by `make large`: 1.6 GB to fetch, 12 GB of memory, some ten minutes."""

import os

import pytest
import torch

import mcsd
from mcsd.cpu.weight_plan import WeightPlan
from mcsd.errors import McsdWarning
from mcsd.loading.load import LoadedModel, load
from mcsd.verify import VerifyOptions, verify
from support.memory import peak_growth
from support.parity import compare, reference

pytestmark = pytest.mark.large

TASKS = [
    "Write a Python function that tells whether a string is a palindrome.",
    "Explain in two sentences what a hash table is.",
    "Translate into German: The weather is fine today.",
    "What is 17 times 23?",
]


@pytest.fixture(scope="module")
def pair() -> tuple[LoadedModel, LoadedModel]:
    torch.set_num_threads(os.cpu_count() or 1)
    return tuple(
        load(f"qwen2.5-coder-{size}", torch.device("cpu"), WeightPlan(torch.float32)) for size in ("1.5b", "0.5b")
    )


@pytest.mark.parametrize("tree", ["2x2x1", "chain:4"])
def test_same_text_as_generate(pair: tuple[LoadedModel, LoadedModel], tree: str) -> None:
    target, draft = pair
    engine = mcsd.Engine(target.model, draft.model, target.tokenizer, tree=tree)
    ids = [engine.chat_tokens([{"role": "user", "content": task}]) for task in TASKS]
    done = engine.generate(ids, mcsd.SamplingParams(temperature=0, max_new_tokens=32))
    network = target.model.reference()  # type: ignore[attr-defined]
    expected = [reference(network, prompt, 32) for prompt in ids]
    assert compare(network, expected, ids, done) <= 1
    calls = sum(completion.stats.target_calls for completion in done)
    assert sum(completion.stats.new_tokens for completion in done) / calls > 2.5


def test_loaded_by_name_in_bfloat16() -> None:
    """The default draft is found, acceptance is high at temperature 1, and memory stays within weights and cache."""
    engine = mcsd.Engine.load("qwen2.5-coder-1.5b", tree="2x2x1", dtype="bfloat16", max_batch=4, max_length=512)
    assert engine.draft_name == "qwen2.5-coder-0.5b"
    ids = [engine.chat_tokens([{"role": "user", "content": task}]) for task in TASKS]
    results: list[mcsd.Completion] = []
    growth = peak_growth(lambda: results.extend(engine.generate(ids, mcsd.SamplingParams(seed=3, max_new_tokens=48))))
    calls = sum(completion.stats.target_calls for completion in results)
    assert sum(completion.stats.new_tokens for completion in results) / calls > 2.3
    caches = engine.cache._store.nbytes + engine.drafter.cache._store.nbytes  # type: ignore[attr-defined]
    weights = 2 * (1.54e9 + 0.49e9)
    assert growth < caches + 0.15 * (weights + caches)


def test_a_draft_with_another_tokenizer_passes_verify() -> None:
    with pytest.warns(McsdWarning, match="39237 tokens that both have"):
        engine = mcsd.Engine.load("qwen2.5-coder-1.5b", "smollm2-135m", tree="2x2x1", dtype="bfloat16")
    params = mcsd.SamplingParams(max_new_tokens=24)
    report = verify(engine, params=params, options=VerifyOptions(contexts=2, samples=1000))
    assert report.passed, str(report)
    ids = [engine.chat_tokens([{"role": "user", "content": task}]) for task in TASKS]
    done = engine.generate(ids, mcsd.SamplingParams(seed=1, max_new_tokens=48))
    calls = sum(completion.stats.target_calls for completion in done)
    assert sum(completion.stats.new_tokens for completion in done) / calls > 1.8
