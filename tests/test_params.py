"""Sampling parameters: refused and accepted values; the derived numbers of `Stats`."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from mcsd.errors import InvalidParameter, RequestError
from mcsd.params import SamplingParams
from mcsd.results import Stats

NOT_FINITE = [math.nan, math.inf, -math.inf]
NOT_A_NUMBER = [True, "1", None, [1.0], 1j, 10**400]
NOT_AN_INTEGER = [1.5, 1.0, math.nan, True, "1", [1]]

BAD: dict[str, list[Any]] = {
    "temperature": [-1, -1e-9, 10_001.0, *NOT_FINITE, *NOT_A_NUMBER],
    "top_k": [-1, 2**31 + 1, None, *NOT_AN_INTEGER],
    "top_p": [0, 0.0, -0.1, 1.1, 1.0000001, *NOT_FINITE, *NOT_A_NUMBER],
    "min_p": [-0.1, 1.1, *NOT_FINITE, *NOT_A_NUMBER],
    "max_new_tokens": [0, -1, 2**31 + 1, None, *NOT_AN_INTEGER],
    "seed": [-1, 2**64, *NOT_AN_INTEGER],
    "repetition_penalty": [0, -1.0, 101.0, *NOT_FINITE, *NOT_A_NUMBER],
    "presence_penalty": [-101.0, 101.0, *NOT_FINITE, *NOT_A_NUMBER],
    "frequency_penalty": [-101.0, 101.0, *NOT_FINITE, *NOT_A_NUMBER],
    "logprobs": [-1, 21, *NOT_AN_INTEGER],
    "stop": ["", [""], ["ok", ""], [b"x"], b"x", [1], [None], ["x"] * 17, "x" * 1025, ["\n" * 1025], 5, None],
    "logit_bias": [
        *[{1: bias} for bias in (-1.1e4, 1.1e4, *NOT_FINITE, *NOT_A_NUMBER)],
        *[{token: 1.0} for token in (-1, 2**31 + 1, None, "1", 1.5, True)],
        *[[(1, 1.0)], 5, None],
    ],
    "ignore_eos": ["false", 1, None],
    "typical_p": [0, 0.0, -0.1, 1.1, *NOT_FINITE, *NOT_A_NUMBER],
    "min_new_tokens": [-1, 2**31 + 1, None, *NOT_AN_INTEGER],
    "n": [0, -1, 257, None, *NOT_AN_INTEGER],
    "stop_token_ids": [[-1], [2**31 + 1], "1", b"1", 5, None, [1.5], [True], [None], [0] * 4097],
    "include_stop": ["false", 1, None],
    "skip_special_tokens": ["false", 1, None],
    "bad_words": ["word", b"word", 5, None, [""], [[]], [5], [None], [[-1]], [[1.5]], ["x"] * 4097],
    "prompt_logprobs": [-1, 21, *NOT_AN_INTEGER],
    "logits_processors": [5, None, [5], "x"],
    "stopping_criteria": [5, None, [5], "x"],
    "prediction": [5, [-1], [1.5], [None], b"x", "x" * (2**20 + 1)],
    "json_schema": [
        "",
        "x",
        "[1]",
        "true",
        5,
        [],
        '{"a": NaN}',
        "[" * 50_000,
        {"a": math.inf},
        {1: {1, 2}},
        "x" * 131_073,
    ],
    "json_object": ["false", 1, None],
    "speculative": ["false", 1, None],
    "regex": ["", b"x", 5, ["x"], "x" * 131_073],
    "grammar": ["", b"x", 5, ["x"], "x" * 131_073],
}

GOOD: dict[str, list[Any]] = {
    "temperature": [0, 0.0, 1e-300, 1, 1e4],
    "top_k": [0, 1, 2**31],
    "top_p": [1, 1.0, 1e-300],
    "min_p": [0, 1, 0.5],
    "max_new_tokens": [1, 2**31],
    "seed": [None, 0, 2**64 - 1],
    "repetition_penalty": [1e-3, 1, 100],
    "presence_penalty": [-100, 0, 100],
    "frequency_penalty": [-100, 0, 100],
    "logprobs": [None, 0, 20],
    "stop": [(), [], ["x"] * 16, ["y" * 1024], ("a", "b")],
    "logit_bias": [{}, {0: -1e4, 2**31: 1e4}, {5: 0}],
    "ignore_eos": [True, False],
    "typical_p": [1, 0.5, np.float32(0.5)],
    "min_new_tokens": [0, 2**31, np.int64(5)],
    "n": [1, 256],
    "stop_token_ids": [(), [0, 2**31], {5}, np.array([5, 6])],
    "include_stop": [True, False],
    "skip_special_tokens": [True, False],
    "bad_words": [(), ["a", [1, 2]], [np.array([5])]],
    "prompt_logprobs": [None, 0, 20],
    "logits_processors": [(), [max]],
    "stopping_criteria": [(), [max]],
    "prediction": [None, "text", [1, 2], ()],
    "speculative": [True, False],
    "json_schema": [None, "{}", '{"type": "object"}'],
    "json_object": [True, False],
    "regex": [None, "a+"],
    "grammar": [None, 'start: "a"'],
}


def _plain(value: Any) -> Any:
    """Sequences as tuples, numbers of numpy as those of Python."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    return tuple(map(_plain, value)) if isinstance(value, list | tuple | set) else value


def test_every_parameter_is_tested() -> None:
    assert set(BAD) == set(GOOD) == {field.name for field in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, values in BAD.items() for v in values], ids=lambda v: f"{v!r:.30}"
)
def test_a_bad_value_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(InvalidParameter) as error:
        SamplingParams(**{name: value})
    assert name in error.value.message
    assert error.value.hint
    assert "\n" not in str(error.value)
    assert isinstance(error.value, RequestError)
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    ("name", "value"), [(n, v) for n, values in GOOD.items() for v in values], ids=lambda v: f"{v!r:.30}"
)
def test_a_good_value_is_accepted(name: str, value: Any) -> None:
    kept = getattr(SamplingParams(**{name: value}), name)
    assert kept == _plain(value)


def test_stop_becomes_a_tuple() -> None:
    assert SamplingParams(stop="END").stop == ("END",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")


def test_parameters_stay_as_they_were_validated() -> None:
    bias, stop = {1: 0.5}, ["a"]
    params = SamplingParams(logit_bias=bias, stop=stop)
    bias[1], stop[0] = math.nan, ""
    assert (params.logit_bias, params.stop) == ({1: 0.5}, ("a",))
    schema: dict[str, Any] = {"enum": [1]}
    params = SamplingParams(logit_bias=params.logit_bias, stop=params.stop, json_schema=schema)
    schema["enum"].append(2)
    assert params.json_schema == '{"enum": [1]}'
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.temperature = -1  # type: ignore[misc]
    with pytest.raises(InvalidParameter):
        dataclasses.replace(params, temperature=-1)


@pytest.mark.parametrize(
    ("given", "changes"),
    [
        ({}, False),
        ({"temperature": 0, "top_k": 5, "top_p": 0.5, "min_p": 0.1, "stop": "x", "logprobs": 3}, False),
        ({"repetition_penalty": 1.1}, True),
        ({"repetition_penalty": 1}, False),
        ({"presence_penalty": -0.1}, True),
        ({"frequency_penalty": 0.1}, True),
        ({"logit_bias": {3: 1.0}}, True),
    ],
)
def test_changes_logits(given: dict[str, Any], changes: bool) -> None:
    assert SamplingParams(**given).changes_logits is changes


def test_stats() -> None:
    seconds = {"prefill": 0.5, "draft": 1.0, "target": 2.0, "judge": 0.25, "other": 0.25}
    stats = Stats(9, 20, 8, 48, 12, (2, 2, 2, 2), seconds)
    assert stats.mean_acceptance_length == 20 / 8
    assert stats.draft_acceptance_rate == 12 / 48
    assert stats.tokens_per_second == 20 / 4


def test_stats_of_nothing() -> None:
    stats = Stats(9, 0, 0, 0, 0, (), {})
    assert (stats.mean_acceptance_length, stats.draft_acceptance_rate, stats.tokens_per_second) == (0, 0, 0)
