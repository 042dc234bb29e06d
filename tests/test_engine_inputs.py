"""What the engine takes from users: keywords, configs, conversations, objects; and what it tells them."""

import copy
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

import mcsd
from mcsd.cpu.weight_plan import has_bf16_gemm
from mcsd.errors import InvalidOption, InvalidParameter, McsdWarning, OutOfMemory, UnsupportedModel
from mcsd.loading.load import LoadedModel
from mcsd.models import TransformersModel
from mcsd.models.kv_cache import KVCache
from mcsd.testing import TabularModel
from support.memory import peak_growth
from support.tiny import tiny

needs_bf16 = pytest.mark.skipif(not has_bf16_gemm(torch.device("cpu")), reason="this CPU has no fast bfloat16")

PROMPT = [5, 9, 2]


def model(**config: Any) -> Any:
    made = tiny("llama")
    made.generation_config = GenerationConfig(**config)
    return made


def engine(**config: Any) -> mcsd.Engine:
    return mcsd.Engine(model(**config), tiny("llama", seed=1), tree="2x1")


def test_requests_without_parameters_use_the_models_defaults() -> None:
    subject = engine(do_sample=True, temperature=0.3, top_k=7)
    assert subject.request(PROMPT).params == mcsd.SamplingParams(temperature=0.3, top_k=7)
    assert subject.request(PROMPT, top_k=2).params == mcsd.SamplingParams(temperature=0.3, top_k=2)
    assert subject.request(PROMPT, mcsd.SamplingParams(seed=4)).params == mcsd.SamplingParams(seed=4)
    opted_out = mcsd.Engine(model(do_sample=True, temperature=0.3), "ngram", sampling_defaults="mcsd")
    assert opted_out.request(PROMPT).params == mcsd.SamplingParams()
    with pytest.raises(InvalidOption, match="sampling_defaults"):
        mcsd.Engine(model(), "ngram", sampling_defaults="vllm")


def test_all_forms_give_the_same_text() -> None:
    subject = engine()
    fields: dict[str, Any] = {"temperature": 0, "max_new_tokens": 9}
    expected = subject.generate([PROMPT], **fields)[0].token_ids
    assert subject.generate(PROMPT, **fields).token_ids == expected
    assert subject.generate(PROMPT, fields).token_ids == expected
    assert subject.generate(PROMPT, mcsd.SamplingParams(**fields)).token_ids == expected
    assert subject.generate(PROMPT, GenerationConfig(max_new_tokens=9)).token_ids == expected
    padded = {
        "input_ids": torch.tensor([[0, *PROMPT], [1, *PROMPT]]),
        "attention_mask": torch.tensor([[0, 1, 1, 1]] * 2),
    }
    assert [done.token_ids for done in subject.generate(padded, **fields)] == [expected] * 2
    assert [token for chunk in subject.stream(torch.tensor([PROMPT]), **fields) for token in chunk.token_ids] == [
        *expected
    ]
    with pytest.raises(InvalidParameter, match="one prompt, not 2"):
        subject.stream([PROMPT, PROMPT])


@pytest.mark.parametrize("kind", [int, np.int64, torch.tensor, lambda eos: [torch.tensor(eos)], lambda eos: {eos}])
def test_end_tokens_of_every_kind(kind: Any) -> None:
    whole = engine().generate(PROMPT, temperature=0, max_new_tokens=9).token_ids
    target = model()
    target.generation_config.eos_token_id = kind(whole[4])
    found = mcsd.Engine(target, "ngram", tree="chain:3").generate(PROMPT, temperature=0, max_new_tokens=9)
    assert (found.token_ids, found.finish_reason) == (whole[: whole.index(whole[4]) + 1], "stop")


def test_end_tokens_that_are_none_are_named() -> None:
    target = model()
    target.generation_config.eos_token_id = "</s>"
    with pytest.raises(UnsupportedModel, match="eos_token_id of the generation config='</s>'"):
        mcsd.Engine(target, "ngram")


@pytest.mark.parametrize("prompt", [np.array(PROMPT), torch.tensor(PROMPT), tuple(PROMPT)])
def test_a_request_takes_token_ids_of_every_kind(prompt: Any) -> None:
    assert engine().request(prompt).prompt == PROMPT


def test_an_object_that_leaves_defaults_unused_is_told_once() -> None:
    subject = engine(do_sample=True, temperature=0.3, repetition_penalty=1.2)
    with pytest.warns(McsdWarning, match=r"LlamaForCausalLM: temperature=0.3, repetition_penalty=1.2 not used"):
        subject.generate(PROMPT, mcsd.SamplingParams(max_new_tokens=2))
    subject.generate(PROMPT, mcsd.SamplingParams(max_new_tokens=2))
    with pytest.warns(McsdWarning, match=r"LlamaForCausalLM: repetition_penalty=1.2 not used"):
        engine(do_sample=True, temperature=0.3, repetition_penalty=1.2).generate(
            PROMPT, mcsd.SamplingParams(temperature=0, max_new_tokens=2)
        )
    quiet = engine(do_sample=True, temperature=0.3, top_p=0.9)
    quiet.generate(PROMPT, mcsd.SamplingParams(temperature=0, max_new_tokens=2))  # Truncation would change nothing.
    quiet.generate(PROMPT, mcsd.SamplingParams(temperature=1.0, top_p=1.0, max_new_tokens=2))


@pytest.mark.thorough
def test_a_list_of_conversations(smollm2: LoadedModel) -> None:
    subject = mcsd.Engine(smollm2.model, "ngram", smollm2.tokenizer, tree="2x1")
    talks = [[{"role": "user", "content": text}] for text in ("Hello!", "What is the capital of France?")]
    both = subject.chat(talks, temperature=0, max_new_tokens=12)
    assert [done.text for done in both] == [subject.chat(one, temperature=0, max_new_tokens=12).text for one in talks]
    assert "Paris" in str(both[1])
    assert repr(both[1]).startswith("Completion('The capital of France is Paris")


def test_the_context_is_the_default_length() -> None:
    target = tiny("llama")
    assert mcsd.Engine(target, "ngram").max_length == target.config.max_position_embeddings
    assert mcsd.Engine(target, "ngram", max_length=40).max_length == 40


@pytest.mark.parametrize("optimize", [False, pytest.param(True, marks=needs_bf16)])
def test_without_a_draft_a_warning_says_what_to_do(optimize: bool) -> None:
    with pytest.warns(McsdWarning, match=r"mcsd distill"):
        mcsd.Engine(tiny("llama").bfloat16(), optimize=optimize)


@pytest.mark.thorough
def test_a_draft_by_name_for_a_target_given_as_an_object(smollm2: LoadedModel) -> None:
    network: Any = smollm2.model.reference()  # type: ignore[attr-defined]
    subject = mcsd.Engine(network, "smollm2-135m-head", smollm2.tokenizer, tree="2x1")
    assert subject.draft_name == "smollm2-135m-head"
    assert subject.generate("The capital of France is", temperature=0, max_new_tokens=12).stats.accepted_tokens > 2
    with pytest.raises(UnsupportedModel, match="no draft by name"):
        mcsd.Engine(TabularModel(torch.full((4, 4), 0.25)), "smollm2-135m-head")


def test_a_tokenizer_that_is_none_is_named() -> None:
    with pytest.raises(InvalidOption, match="tokenizer 'some/path' is a name"):
        mcsd.Engine(tiny("llama"), "ngram", "some/path")
    with pytest.raises(InvalidParameter, match="needs a tokenizer"):
        mcsd.Engine(tiny("llama"), "ngram").chat("hello")


def test_names_and_objects_point_to_each_other() -> None:
    with pytest.raises(UnsupportedModel, match=r"Engine\.load"):
        mcsd.Engine("smollm2-135m")
    with pytest.raises(InvalidOption, match=r"mcsd\.Engine\(target=model"):
        mcsd.Engine.load(tiny("llama"))  # type: ignore[arg-type]
    with pytest.raises(InvalidOption, match="draft is a LlamaForCausalLM"):
        mcsd.Engine.load("smollm2-135m", tiny("llama"))  # type: ignore[arg-type]


def test_an_engine_shows_what_it_is_made_of() -> None:
    shown = repr(mcsd.Engine(tiny("llama"), "ngram", tree="2x1", max_batch=2))
    assert shown.startswith("Engine(target='LlamaForCausalLM', draft='ngram', tree='2x1', scheme='top-k', max_batch=2")


@needs_bf16
def test_optimized_copies_leave_the_models_as_they_are() -> None:
    target, draft = tiny("llama").bfloat16(), tiny("llama", seed=1).bfloat16()
    before = copy.deepcopy(target.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        subject = mcsd.Engine(target, draft, tree="2x1", optimize=True)
    assert not isinstance(subject.target, TransformersModel) or subject.target.network is not target
    assert subject.generate(PROMPT, temperature=0, max_new_tokens=5).stats.accepted_tokens >= 0
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    assert type(target.model.layers[0].mlp).__name__ == "LlamaMLP"


def test_optimize_says_why_it_has_no_effect() -> None:
    with pytest.warns(McsdWarning, match="no effect on LlamaForCausalLM.*float32"):
        mcsd.Engine(tiny("llama"), "ngram", tree="none", optimize=True)


@pytest.mark.parametrize("first", [1, 4, 9])
def test_a_cache_that_grows_changes_nothing(first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sequences of a batch, their trees and the draft's cache, in sampled and greedy texts."""
    prompts = [[5, 9, 2], [7], list(range(1, 30))]
    params = [mcsd.SamplingParams(temperature=t, seed=3, max_new_tokens=25) for t in (0, 1.0, 0.7)]
    expected = engine().generate(prompts, params)
    monkeypatch.setattr("mcsd.models.kv_cache._FIRST_SLOTS", first)
    subject = engine()
    assert [done.token_ids for done in subject.generate(prompts, params)] == [done.token_ids for done in expected]
    cache: Any = subject.cache
    assert cache.bytes_per_token > 0
    assert 54 <= cache._store.shape[4] < cache.slots


def test_a_cache_that_cannot_grow_is_named_and_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    long, fields = [[5] * 20], {"temperature": 0, "max_new_tokens": 30}
    expected = engine().generate(long, **fields)[0].token_ids
    monkeypatch.setattr("mcsd.models.kv_cache._FIRST_SLOTS", 32)
    subject = engine()
    subject.generate([[5, 6]], temperature=0, max_new_tokens=3)
    with monkeypatch.context() as patch:
        patch.setattr("mcsd.models.kv_cache.np.zeros", no_memory)
        with pytest.raises(OutOfMemory, match="key-value cache needs"):
            subject.generate(long, **fields)
    assert subject.generate(long, **fields)[0].token_ids == expected


def no_memory(*_: Any, **__: Any) -> None:
    raise MemoryError


def test_unused_slots_take_no_memory() -> None:
    cache = KVCache(4, 8, 2048, torch.device("cpu"))
    keys = torch.ones(1, 8, 1, 64)
    growth = peak_growth(lambda: cache.store(keys, keys))
    assert cache.bytes_per_token * 8 * 2048 > 200e6
    assert growth < 20e6
