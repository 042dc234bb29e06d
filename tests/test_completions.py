"""Several completions of a prompt, log-probabilities of prompts, and stopping criteria, in the whole engine."""

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import MaxLengthCriteria, StoppingCriteriaList

import mcsd
from mcsd.errors import InvalidParameter, StoppingCriterionFailed, TokenOutOfVocabulary
from mcsd.models import prefill
from mcsd.results import TokenLogprobs
from mcsd.testing import TabularModel
from support.tiny import tiny

PROMPT = [5, 9, 2, 7, 7, 1]


def engine(max_batch: int = 8) -> mcsd.Engine:
    return mcsd.Engine(tiny("llama"), tiny("llama", seed=1), tree="2x1", max_batch=max_batch)


def ids(completions: Any) -> Any:
    return [ids(each) if isinstance(each, list) else each.token_ids for each in completions]


def test_several_completions_of_a_prompt() -> None:
    subject, fields = engine(), {"seed": 3, "max_new_tokens": 9}
    alone = subject.generate(PROMPT, **fields).token_ids
    several = ids(subject.generate(PROMPT, n=4, **fields))
    assert several[0] == alone
    assert len(set(several)) == 4
    # The same in smaller batches, and for a smaller number.
    assert ids(engine(max_batch=2).generate(PROMPT, n=4, **fields)) == several
    assert ids(subject.generate(PROMPT, n=2, **fields)) == several[:2]


def test_lists_of_prompts_give_lists_of_lists() -> None:
    subject, fields = engine(), {"seed": 3, "max_new_tokens": 5}
    both = subject.generate([PROMPT, [4, 4]], n=2, **fields)
    assert ids(both) == [ids(subject.generate(one, n=2, **fields)) for one in (PROMPT, [4, 4])]
    mixed = [mcsd.SamplingParams(n=count, **fields) for count in (1, 3)]
    first, others = subject.generate([PROMPT, [4, 4]], mixed)
    assert first.token_ids == both[0][0].token_ids
    assert ids(others)[:2] == ids(both[1])
    assert ids(subject.generate([PROMPT], n=2, **fields)) == [ids(both[0])]


def test_a_stream_has_one_completion() -> None:
    subject = engine()
    for call in (subject.stream, subject.request):
        with pytest.raises(InvalidParameter, match=r"^n=2: a request or stream has one completion"):
            call(PROMPT, n=2)


def test_completions_of_a_prompt_are_independent() -> None:
    """Pairs of completions over 4,096 seeds. A chi-square with 15 degrees of freedom exceeds 45 once in 10,000 times;
    seeds that follow each other by one, or are equal, exceed it by far."""
    table = torch.tensor([[0.4, 0.3, 0.2, 0.1]] * 4)
    model = TabularModel(table)
    subject = mcsd.Engine(model, model, tree="2x1", max_batch=1024)
    seeds = range(4096)
    pairs = subject.generate([[0]] * 4096, [mcsd.SamplingParams(n=2, seed=seed, max_new_tokens=1) for seed in seeds])
    counts = Counter((first.token_ids[0], second.token_ids[0]) for first, second in pairs)
    expected = torch.outer(table[0], table[0]) * len(seeds)
    found = torch.tensor([[counts[i, j] for j in range(4)] for i in range(4)])
    assert ((found - expected) ** 2 / expected).sum() < 45


@pytest.mark.parametrize("most", [1 << 24, 2 * 96])
def test_log_probabilities_of_a_prompt(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one forward of transformers, whatever the chunks; the text is that without them."""
    monkeypatch.setattr(prefill, "_MOST_LOGITS", most)
    subject, fields = engine(), {"temperature": 0, "max_new_tokens": 7}
    done = subject.generate(PROMPT, prompt_logprobs=3, **fields)
    assert done.token_ids == subject.generate(PROMPT, **fields).token_ids
    with torch.no_grad():
        expected = tiny("llama")(torch.tensor([PROMPT])).logits[0].double().log_softmax(-1)
    first, *others = done.prompt_logprobs
    assert first is None
    assert [each.token_id for each in others] == PROMPT[1:]
    for each, row in zip(others, expected, strict=False):
        assert each.logprob == pytest.approx(row[each.token_id].item(), abs=1e-4)
        assert [value for _, value in each.top] == pytest.approx(row.topk(3).values.tolist(), abs=1e-4)


def test_equal_prompts_are_read_once_with_all_that_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def counted(model: Any, cache: Any, sequence: int, tokens: list[int], *rest: Any) -> Any:
        read.append(tokens)
        return prefill.prefill(model, cache, sequence, tokens, *rest)

    monkeypatch.setattr("mcsd.core.prefill", counted)
    subject, fields = engine(), {"seed": 1, "max_new_tokens": 6}
    counts = [None, 2, None, 1, 2, 4]
    done = subject.generate([PROMPT] * 6, [mcsd.SamplingParams(prompt_logprobs=count, **fields) for count in counts])
    assert len({each.token_ids for each in done}) == 1
    assert len([tokens for tokens in read if tokens]) == 3  # Without, with two, with four alternatives.
    for each, count in zip(done, counts, strict=True):
        assert (each.prompt_logprobs is None) == (count is None)
        if count is not None:
            assert each.prompt_logprobs == trimmed(done[-1].prompt_logprobs, count)
    read.clear()
    subject.generate(PROMPT, n=4, prompt_logprobs=0, **fields)
    assert len([tokens for tokens in read if tokens]) == 1


def trimmed(entries: Any, count: int) -> Any:
    return tuple(each and TokenLogprobs(each.token_id, each.logprob, each.top[:count]) for each in entries)


def test_a_prompt_of_one_token_has_no_log_probability() -> None:
    assert engine().generate([4], prompt_logprobs=2, max_new_tokens=2).prompt_logprobs == (None,)
    assert engine().generate([4], max_new_tokens=2).prompt_logprobs is None


def test_stopping_criteria_of_transformers() -> None:
    """A text ends where it would without them, and nothing else changes."""
    subject, fields = engine(), {"seed": 5, "max_new_tokens": 20}
    whole = subject.generate(PROMPT, **fields).token_ids
    done = subject.generate(PROMPT, stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(11)]), **fields)
    assert (done.token_ids, done.finish_reason) == (whole[:5], "stop")


def test_a_criterion_that_fails_fails_its_request_alone() -> None:
    subject, fields = engine(), {"seed": 5, "max_new_tokens": 12}

    def broken(input_ids: torch.Tensor, scores: None) -> bool:
        if input_ids.shape[1] == len(PROMPT) + 4:
            raise KeyError("x")
        return False

    params = [mcsd.SamplingParams(**fields), mcsd.SamplingParams(stopping_criteria=[broken], **fields)]
    with pytest.raises(StoppingCriterionFailed, match="KeyError") as info:
        subject.generate([PROMPT, PROMPT], params)
    expected = subject.generate(PROMPT, params[0]).token_ids
    assert [each and each.token_ids for each in info.value.completions] == [expected, None]


def test_stop_tokens_are_tokens_of_the_model() -> None:
    subject, fields = engine(), {"temperature": 0, "max_new_tokens": 12}
    whole = subject.generate(PROMPT, **fields).token_ids
    done = subject.generate(PROMPT, stop_token_ids=[whole[3]], **fields)
    assert (done.token_ids, done.finish_reason) == (whole[: whole.index(whole[3]) + 1], "stop")
    with pytest.raises(TokenOutOfVocabulary, match="token id 96"):
        subject.generate(PROMPT, stop_token_ids=[96])
