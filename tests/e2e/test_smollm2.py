"""Real weights end to end: bfloat16 as users load it, stop strings, chat, memory."""

import pytest
import torch

import mcsd
from mcsd.cpu.weight_plan import has_int8_gemm
from mcsd.loading.load import LoadedModel
from support.memory import peak_growth

PROMPT = "The three most important rules for writing a test are"


@pytest.fixture(scope="module")
def engine(smollm2: LoadedModel) -> mcsd.Engine:
    return mcsd.Engine(smollm2.model, "ngram", smollm2.tokenizer)


def test_loading_by_name_generates() -> None:
    loaded = mcsd.Engine.load("smollm2-135m", tree="2x1", max_batch=2)
    done = loaded.generate([PROMPT, "1, 2, 3, 4, 5, 6, 7, 8,"], mcsd.SamplingParams(temperature=0, max_new_tokens=24))
    assert done[1].text.startswith(" 9, 10, 11")
    assert done[1].stats.accepted_tokens > 0
    assert (loaded.draft_name, loaded.scheme_name) == ("smollm2-135m-head", "mcss-wor")


@pytest.mark.skipif(not has_int8_gemm(torch.device("cpu")), reason="this CPU does not multiply bytes")
def test_int8_weights_say_with_a_tree_what_they_say_without() -> None:
    prompts, params = [PROMPT, "1, 2, 3, 4, 5, 6, 7, 8,"], mcsd.SamplingParams(temperature=0, max_new_tokens=32)
    plain, drafted = (
        mcsd.Engine.load("smollm2-135m", tree=tree, dtype="float32", quantize="int8", max_batch=2).generate(
            prompts, params
        )
        for tree in ("none", "2x1")
    )
    assert [done.token_ids for done in plain] == [done.token_ids for done in drafted]
    assert sum(done.stats.accepted_tokens for done in drafted) > 10
    assert drafted[1].text.startswith(" 9, 10, 11")


def test_text_is_what_the_tokenizer_says(engine: mcsd.Engine) -> None:
    done = engine.generate(PROMPT, mcsd.SamplingParams(temperature=1.0, seed=1, max_new_tokens=40))
    assert done.text == engine.tokenizer.decode(done.token_ids, skip_special_tokens=True)
    assert "".join(
        chunk.text for chunk in engine.stream(PROMPT, mcsd.SamplingParams(temperature=1.0, seed=1, max_new_tokens=40))
    ) == (done.text)


def test_a_stop_string_ends_the_text_before_it(engine: mcsd.Engine) -> None:
    free = engine.generate(PROMPT, mcsd.SamplingParams(temperature=0, max_new_tokens=40))
    stop = free.text[30:36]
    done = engine.generate(PROMPT, mcsd.SamplingParams(temperature=0, max_new_tokens=40, stop=stop))
    assert done.text == free.text[: free.text.index(stop)]
    assert done.finish_reason == "stop"
    assert len(done.token_ids) < len(free.token_ids)


def test_chat_ends_with_the_template_s_own_token(engine: mcsd.Engine) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    done = engine.chat(messages, mcsd.SamplingParams(temperature=0, max_new_tokens=60))
    assert "Paris" in done.text
    assert done.finish_reason == "stop"
    assert done.token_ids[-1] == engine.tokenizer.eos_token_id


def test_peak_memory_is_weights_and_cache_and_little_more(engine: mcsd.Engine) -> None:
    """Eight sequences, a prompt of 500 tokens among them: growth at most the cache + 15 % of cache and weights."""
    network = engine.target.network  # type: ignore[attr-defined]
    weights = sum(parameter.nbytes for parameter in network.parameters())
    prompts = [[i + j for j in range(60)] for i in range(100, 800, 100)] + [list(range(1000, 1500))]
    growth = peak_growth(
        lambda: engine.generate(prompts, mcsd.SamplingParams(temperature=1.0, seed=1, max_new_tokens=16))
    )
    store = engine.cache._store  # type: ignore[attr-defined]
    assert isinstance(store, torch.Tensor)
    assert growth < store.nbytes + 0.15 * (weights + store.nbytes)
