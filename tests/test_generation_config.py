"""Sampling parameters in the forms that users have them."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GenerationConfig

from mcsd.defaults import combine, model_defaults
from mcsd.errors import InvalidParameter, McsdWarning
from mcsd.generation_config import constraint_fields
from mcsd.params import SamplingParams

DEFAULTS = SamplingParams(temperature=0.2, top_p=0.9)


def test_an_object_counts_whole() -> None:
    given = SamplingParams(seed=3)
    assert combine(DEFAULTS, given, {}) is given


@pytest.mark.parametrize(("params", "fields"), [(None, {"top_k": 5}), ({"top_k": 5}, {})])
def test_keywords_and_dicts_replace_single_fields(params: Any, fields: dict[str, Any]) -> None:
    assert combine(DEFAULTS, params, fields) == replace(DEFAULTS, top_k=5)
    assert combine(DEFAULTS, None, {}) == DEFAULTS


@pytest.mark.parametrize(
    ("params", "fields", "said"),
    [
        ({1: 2}, {}, "1 is not a sampling parameter"),
        (SamplingParams(), {"seed": 1}, "seed="),
        ({"seed": 1}, {"top_k": 1}, "top_k="),
        (3, {}, "3 is not a set"),
        (None, {"max_tokens": 5}, "use max_new_tokens"),
        ({"n_predict": 5}, {}, "use max_new_tokens"),
        (None, {"do_sample": False}, "use temperature"),
        (None, {"temprature": 1.0}, "use temperature"),
        (None, {"xyz": 1}, "one of temperature, top_k"),
        (None, {"top_p": 2}, "top_p=2"),
    ],
)
def test_what_is_wrong_is_named(params: Any, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidParameter, match=said):
        combine(DEFAULTS, params, fields)


def test_an_alias_in_the_constructor_is_named() -> None:
    with pytest.raises(InvalidParameter, match="use max_new_tokens"):
        SamplingParams(max_tokens=5)  # type: ignore[call-arg]
    assert replace(SamplingParams(), top_k=3).top_k == 3


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, {"temperature": 0.0, "top_k": 50}),
        ({"do_sample": True}, {"top_k": 50}),
        ({"do_sample": True, "temperature": 0.7, "top_k": 0, "top_p": 0.8}, {"temperature": 0.7, "top_p": 0.8}),
        (
            {"do_sample": False, "repetition_penalty": 1.2, "max_new_tokens": 7, "stop_strings": ["a"]},
            {"temperature": 0.0, "top_k": 50, "repetition_penalty": 1.2, "max_new_tokens": 7, "stop": ("a",)},
        ),
    ],
)
def test_a_generation_config_counts_as_in_transformers(config: dict[str, Any], expected: dict[str, Any]) -> None:
    assert SamplingParams.from_generation_config(GenerationConfig(**config)) == SamplingParams(**expected)
    assert combine(DEFAULTS, GenerationConfig(**config), {}) == SamplingParams(**expected)


@pytest.mark.parametrize("fields", [{"num_beams": 4}, {"guidance_scale": 2.0}, {"eta_cutoff": 0.1}])
def test_a_field_that_would_be_ignored_is_refused(fields: dict[str, Any]) -> None:
    (name,) = fields
    with pytest.raises(InvalidParameter, match=f"does not apply {name}="):
        SamplingParams.from_generation_config(GenerationConfig(**fields))
    with pytest.warns(McsdWarning, match=f"does not apply {name} "):
        assert model_defaults(GenerationConfig(**fields)) == {}


def test_fields_with_a_counterpart_are_applied() -> None:
    fields = {"typical_p": 0.5, "min_new_tokens": 3, "bad_words_ids": [[1]], "num_return_sequences": 2}
    params = SamplingParams.from_generation_config(GenerationConfig(do_sample=True, top_k=0, **fields))
    assert params == SamplingParams(typical_p=0.5, min_new_tokens=3, bad_words=[[1]], n=2)
    assert model_defaults(GenerationConfig(min_new_tokens=3)) == {"min_new_tokens": 3}


def test_end_tokens_of_a_config_and_its_constraints() -> None:
    assert SamplingParams.from_generation_config(GenerationConfig(eos_token_id=[7, -1])).stop_token_ids == (7,)
    config = GenerationConfig(suppress_tokens=[3])
    with pytest.raises(InvalidParameter, match=r"suppress_tokens.*give the config itself"):
        SamplingParams.from_generation_config(config)
    # Those of a model hold for all requests of its engine.
    assert SamplingParams.from_generation_config(SimpleNamespace(generation_config=config)).top_k == 50


def test_what_a_model_never_generates_holds_for_explicit_objects() -> None:
    defaults = SamplingParams(bad_words=[[1]], min_new_tokens=3)
    given = SamplingParams(bad_words=[[2]], temperature=0)
    assert combine(defaults, given, {}) == replace(given, bad_words=[[2], [1]], min_new_tokens=3)
    assert combine(defaults, None, {"min_new_tokens": 0, "bad_words": ()}) == SamplingParams()


def test_constraints_of_the_first_config_that_names_them_count() -> None:
    own = GenerationConfig(suppress_tokens=[5], no_repeat_ngram_size=2)
    assert constraint_fields(None) == {}
    # Token 0 is a token.
    assert constraint_fields(GenerationConfig(forced_eos_token_id=0)) == {"forced_eos_token_id": 0}
    assert constraint_fields(GenerationConfig(no_repeat_ngram_size=0, min_length=4), own) == {
        "min_length": 4,
        "suppress_tokens": [5],
    }


def test_the_models_own_config_sets_what_it_names() -> None:
    assert model_defaults(None) == model_defaults(GenerationConfig(eos_token_id=2)) == {}
    config = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9)
    assert model_defaults(config) == {"temperature": 0.6, "top_p": 0.9}
    assert model_defaults(GenerationConfig(do_sample=False)) == {"temperature": 0.0}
    odd = SimpleNamespace(do_sample=True, top_p=7.0, top_k=-1, temperature=0.5, stop_strings=["a"])
    with pytest.warns(McsdWarning, match="does not apply stop_strings, top_p=7"):
        assert model_defaults(odd) == {"temperature": 0.5, "top_k": 0}
