"""A step that is broken off leaves a working engine, and nobody with a wrong text."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch

import mcsd
from mcsd import errors
from support.tiny import tiny

PARAMS = [mcsd.SamplingParams(seed=seed, max_new_tokens=20) for seed in range(3)]


class Interrupting:
    """Breaks one call of a method off, before or after it has done its work."""

    def __init__(
        self, owner: Any, method: str, after: bool, calls: int, error: type[BaseException] = KeyboardInterrupt
    ) -> None:
        self.real: Callable[..., Any] = getattr(owner, method)
        self.after, self.left, self.error = after, calls, error
        setattr(owner, method, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise self.error
        result = self.real(*args, **kwargs)
        if self.left == 0:
            raise self.error
        return result


@pytest.mark.parametrize("tree", ["2x2x1", "none"])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    "place", ["target forward", "draft forward", "cache commit", "drafter commit", "verify", "add"]
)
def test_an_interrupt_anywhere(place: str, after: bool, tree: str) -> None:
    if tree == "none" and place == "draft forward":
        pytest.skip("plain decoding has no draft")
    engine = mcsd.Engine(tiny("llama"), tiny("llama", seed=1), tree=tree, max_batch=3, max_length=100)
    prompts = [[5, 9, 2], [7, 8], [1, 2, 3, 4]]
    expected = [done.token_ids for done in engine.generate(prompts, PARAMS)]
    owner, method = {
        "target forward": (engine.target, "forward"),
        "draft forward": (getattr(engine.drafter, "model", None), "forward"),
        "cache commit": (engine.cache, "commit"),
        "drafter commit": (engine.drafter, "commit"),
        "verify": (engine._scheme, "verify"),
        "add": (engine.drafter, "add"),
    }[place]
    bystander = engine.stream(prompts[0], PARAMS[0])
    seen = list(next(bystander).token_ids)
    Interrupting(owner, method, after, calls=2)
    with pytest.raises(KeyboardInterrupt):
        engine.generate(prompts[1:], PARAMS[1:])
    with pytest.raises(errors.RequestInterrupted):
        seen.extend(token for chunk in bystander for token in chunk.token_ids)
    assert tuple(seen) == expected[0][: len(seen)]
    assert [done.token_ids for done in engine.generate(prompts, PARAMS)] == expected


@pytest.mark.parametrize("when", ["first step", "later"])
@pytest.mark.parametrize("place", ["target", "draft", "verify", "cache", "commit", "text"])
def test_an_error_of_one_request_fails_it_alone(place: str, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = mcsd.Engine(tiny("llama"), tiny("llama", seed=1), tree="2x2x1", max_batch=3, max_length=100)
    prompts = [[5, 9, 2], [7, 8], [1, 2, 3, 4], [6]]
    params = [*PARAMS, mcsd.SamplingParams(temperature=0, max_new_tokens=20)]
    expected = [done.token_ids for done in engine.generate(prompts, params)]
    requests = [engine.request(prompt, one) for prompt, one in zip(prompts, params, strict=True)]
    culprit = requests[1]
    owner, method = {
        "target": (engine.target, "forward"),
        "draft": (engine.drafter, "draft"),
        "verify": (engine._scheme, "verify"),
        "cache": (engine.cache, "advance"),
        "commit": (engine.drafter, "commit"),
        "text": (culprit._stream, "push"),
    }[place]
    real, broken = getattr(owner, method), RuntimeError("broken")

    def fail(*arguments: Any, **options: Any) -> Any:
        if culprit in engine._running and (when == "first step" or len(culprit.tokens) > 7):
            raise broken
        return real(*arguments, **options)

    monkeypatch.setattr(owner, method, fail)
    for request in requests:
        engine.submit(request)
    while not all(request.done for request in requests):
        with suppress(RuntimeError):
            engine.step()
    assert isinstance(culprit.error, errors.StepFailed)
    assert culprit.error.__cause__ is broken
    assert tuple(culprit.tokens) == expected[1][: len(culprit.tokens)]
    others = [request.completion for request in requests if request is not culprit]
    assert [done.token_ids for done in others if done] == [expected[0], *expected[2:]]
    assert not any(engine.cache.host_lengths)


def test_log_probabilities_of_a_prompt_that_is_read_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = mcsd.Engine(tiny("llama"), "ngram", max_batch=2, max_length=100)
    params = mcsd.SamplingParams(seed=1, max_new_tokens=9, prompt_logprobs=2)
    prompts = [[5, 9, 2], [7, 8]]
    expected = [done.prompt_logprobs for done in engine.generate(prompts, params)]
    requests = [engine.request(prompt, params) for prompt in prompts]
    Interrupting(engine._scheme, "verify", after=False, calls=1, error=RuntimeError)
    done = engine.run(requests)
    assert [[each and each.token_id for each in one.prompt_logprobs or ()] for one in done] == [
        [each and each.token_id for each in one] for one in expected
    ]
    assert all(one.stats.cached_tokens == 0 for one in done)


def test_a_cancelled_request_is_done() -> None:
    engine = mcsd.Engine(tiny("llama"), "ngram", max_length=100)
    stream = engine.stream([1, 2], mcsd.SamplingParams(max_new_tokens=50))
    next(stream)
    engine.cancel(engine._running[0])
    with pytest.raises(errors.RequestInterrupted):
        list(stream)


def test_the_others_completions_are_on_the_error() -> None:
    network = tiny("llama")
    network.model.embed_tokens.weight.data[13] = torch.nan
    engine = mcsd.Engine(network, "ngram", tree="none", max_length=100)
    params = mcsd.SamplingParams(temperature=0, max_new_tokens=5, logit_bias={13: -100.0})
    with pytest.raises(errors.NonFiniteLogits) as info:
        engine.generate([[1, 2], [3, 13], [4]], params)
    first, broken, last = info.value.completions
    assert broken is None
    assert [len(done.token_ids) for done in (first, last)] == [5, 5]
