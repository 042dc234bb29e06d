"""A step that is broken off leaves a working engine, and nobody with a wrong text."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

import mcsd
from mcsd import errors
from support.tiny import tiny

PARAMS = [mcsd.SamplingParams(seed=seed, max_new_tokens=20) for seed in range(3)]


class Interrupting:
    """Breaks one call of a method off, before or after it has done its work."""

    def __init__(self, owner: Any, method: str, after: bool, calls: int) -> None:
        self.real: Callable[..., Any] = getattr(owner, method)
        self.after, self.left = after, calls
        setattr(owner, method, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == 0 and not self.after:
            raise KeyboardInterrupt
        result = self.real(*args, **kwargs)
        if self.left == 0:
            raise KeyboardInterrupt
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
