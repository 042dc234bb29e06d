"""Logits processors in the engine: every form in which they are given, and what fails in them."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

import mcsd
from mcsd.errors import InvalidParameter, ProcessorFailed, TokenOutOfVocabulary
from mcsd.testing import TabularModel
from support.chisquare import table

SIZE = 12
PROMPT = [5, 6, 7]


def engine(config: Any = None, **options: Any) -> mcsd.Engine:
    target = TabularModel(table(SIZE, 1))
    target.generation_config = config  # type: ignore[attr-defined]
    return mcsd.Engine(target, TabularModel(table(SIZE, 2)), tree="2x2", max_length=64, max_batch=4, **options)


def greedy(config: Any = None, **fields: Any) -> tuple[int, ...]:
    done: mcsd.Completion = engine(config).generate([PROMPT], mcsd.SamplingParams(temperature=0, **fields))[0]
    return done.token_ids


def greedy_by(config: GenerationConfig) -> tuple[int, ...]:
    done: mcsd.Completion = engine().generate([PROMPT], config)[0]
    return done.token_ids


@pytest.mark.parametrize(
    ("fields", "follows"),
    [
        ({"suppress_tokens": [0, 3, 4]}, lambda text: not {0, 3, 4} & {*text}),
        ({"begin_suppress_tokens": [*range(1, SIZE)]}, lambda text: text[0] == 0),
        ({"no_repeat_ngram_size": 1}, lambda text: len({*PROMPT, *text}) == 9),
        ({"forced_eos_token_id": 4}, lambda text: text[-1] == 4),
        ({"bad_words_ids": [[i] for i in range(1, SIZE)]}, lambda text: {*text} == {0}),
    ],
)
@pytest.mark.parametrize("given", ["model", "object"])
def test_constraints_hold_for_every_request(fields: dict[str, Any], follows: Any, given: str) -> None:
    """Whether they come from the model, under explicit parameters, or from a config of the request."""
    config = GenerationConfig(max_new_tokens=6, **fields)
    ways = {"model": lambda: greedy(config, max_new_tokens=6), "object": lambda: greedy_by(config)}
    text = ways[given]()
    assert len(text) == 6
    assert follows(text)
    assert not follows(greedy(max_new_tokens=6)), "the test has no power"


def test_the_models_constraints_are_not_used_where_its_defaults_are_not() -> None:
    config = GenerationConfig(suppress_tokens=[*range(1, SIZE)])
    assert {*engine(config).generate([PROMPT], temperature=0)[0].token_ids} == {0}
    assert {*engine(config, sampling_defaults="mcsd").generate([PROMPT], temperature=0)[0].token_ids} != {0}


def test_a_failing_processor_ends_its_request_only() -> None:
    def broken(input_ids: Tensor, logits: Tensor) -> Tensor:
        if input_ids.shape[1] > 6:
            raise RuntimeError("no more")
        return logits

    params = [mcsd.SamplingParams(temperature=0), mcsd.SamplingParams(temperature=0, logits_processors=[broken])]
    with pytest.raises(ProcessorFailed, match=r"RuntimeError.*no more") as caught:
        engine().generate([PROMPT] * 2, params)
    other, failed = caught.value.completions
    assert failed is None
    assert other.token_ids == greedy()


@pytest.mark.parametrize("shape", [(1, SIZE + 1), (2, SIZE)])
def test_logits_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    params = mcsd.SamplingParams(logits_processors=[lambda ids, logits: torch.zeros(shape)])
    with pytest.raises(ProcessorFailed, match="shape"):
        engine().generate([PROMPT], params)


def test_bad_words_need_a_tokenizer_and_a_vocabulary() -> None:
    with pytest.raises(InvalidParameter, match="bad words as texts need a tokenizer"):
        engine().generate([PROMPT], bad_words=["word"])
    with pytest.raises(TokenOutOfVocabulary, match="99"):
        engine().generate([PROMPT], bad_words=[[99]])
