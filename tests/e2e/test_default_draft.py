"""The draft that comes with the package, on real weights: the target's text, with fewer calls of the target."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import mcsd
from mcsd.loading.catalog import DRAFTS
from mcsd.loading.load import LoadedModel, load_draft
from mcsd.models import BoundHead
from support.parity import compare, reference

NAME = "smollm2-135m-head"
QUESTIONS = [
    "Give three tips for staying healthy.",
    "What are the three primary colors?",
    "Describe the structure of an atom.",
    "How can we reduce air pollution?",
    "Write a short story about a lighthouse keeper.",
    "Explain why the sky is blue.",
    "Translate into German: The weather is fine today.",
    "List five animals that live in the sea.",
]


@pytest.fixture(scope="module")
def head(smollm2: LoadedModel) -> BoundHead:
    loaded = load_draft(NAME, smollm2)
    assert isinstance(loaded, BoundHead)
    return loaded


@pytest.fixture(scope="module")
def prompts(smollm2: LoadedModel) -> list[list[int]]:
    template = partial(smollm2.tokenizer.apply_chat_template, add_generation_prompt=True, return_dict=False)
    return [list(template([{"role": "user", "content": question}])) for question in QUESTIONS]


@pytest.fixture(scope="module")
def expected(smollm2_network: Any, prompts: list[list[int]]) -> list[list[int]]:
    return [reference(smollm2_network, prompt, 32) for prompt in prompts[:4]]


@pytest.fixture(scope="module")
def greedy(smollm2: LoadedModel, head: BoundHead, prompts: list[list[int]]) -> list[mcsd.Completion]:
    """All prompts at once, on a wide tree at temperature 0."""
    engine = mcsd.Engine(smollm2.model, head, smollm2.tokenizer, tree="4x2x2x1", max_batch=8)
    return engine.generate(prompts, mcsd.SamplingParams(temperature=0, max_new_tokens=32))


def test_same_text_as_generate(
    smollm2_network: Any, prompts: list[list[int]], expected: list[list[int]], greedy: list[mcsd.Completion]
) -> None:
    assert compare(smollm2_network, expected, prompts[:4], greedy[:4]) <= 1


def test_same_text_as_generate_on_a_chain(
    smollm2: LoadedModel,
    smollm2_network: Any,
    head: BoundHead,
    prompts: list[list[int]],
    expected: list[list[int]],
) -> None:
    engine = mcsd.Engine(smollm2.model, head, smollm2.tokenizer, tree="chain:3", max_batch=1)
    done = engine.generate(prompts[:3], mcsd.SamplingParams(temperature=0, max_new_tokens=32))
    assert compare(smollm2_network, expected[:3], prompts[:3], done) <= 1


def tokens_a_call(done: list[mcsd.Completion]) -> float:
    """Of the target.

    The floors are to catch a draft that came apart (states of a wrong token or layer), not one a little worse.
    """
    calls = sum(completion.stats.target_calls for completion in done)
    return sum(completion.stats.new_tokens for completion in done) / calls


def test_acceptance_length_at_temperature_0(greedy: list[mcsd.Completion]) -> None:
    """These questions gave 2.14."""
    assert tokens_a_call(greedy) > 1.7


def test_acceptance_length_at_temperature_1(smollm2: LoadedModel, head: BoundHead, prompts: list[list[int]]) -> None:
    engine = mcsd.Engine(smollm2.model, head, smollm2.tokenizer, tree="4x2x2x1")
    done = engine.generate(prompts, mcsd.SamplingParams(temperature=1, max_new_tokens=24, seed=1))
    assert tokens_a_call(done) > 1.5


def test_the_package_s_drafts_are_small_and_say_how_they_were_made() -> None:
    for folder in DRAFTS.values():
        assert sum(path.stat().st_size for path in folder.iterdir()) <= 12e6
        assert "mcsd distill --target" in (folder / "README.md").read_text()
        assert {path.suffix for path in folder.iterdir()} == {".md", ".json", ".safetensors"}


def test_a_head_for_another_target_is_refused_by_name(tmp_path: Path) -> None:
    import transformers

    config = transformers.LlamaConfig(vocab_size=49152, hidden_size=64, num_hidden_layers=30, num_attention_heads=4)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    with pytest.raises(mcsd.errors.UnsupportedModel, match="it belongs to smollm2-135m"):
        mcsd.Engine.load(tmp_path, NAME, tree="2")
