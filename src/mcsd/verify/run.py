"""Both parts of a verification, within a budget of time."""

import time
from collections.abc import Callable, Sequence

import torch

from mcsd.encoding import Prompt
from mcsd.engine import Engine
from mcsd.errors import EmptyPrompt, InvalidParameter
from mcsd.params import SamplingParams
from mcsd.prompts import varied
from mcsd.schemes import SCHEMES
from mcsd.verify.greedy import check_greedy
from mcsd.verify.options import Options
from mcsd.verify.plain import plain_logits
from mcsd.verify.report import Report
from mcsd.verify.sampled import check_sampled, places

_GREEDY, _SAMPLING = 0.4, 0.95
"""Shares of the budget after which no further greedy texts, and no further samples, are begun."""


def tree_for(scheme: str) -> str:
    """The tree that is checked where none is named: "auto" might be plain decoding, which checks nothing."""
    known = SCHEMES.get(scheme)
    return "chain:3" if known and known.widest == 1 else "2x2x1"


def check_params(params: SamplingParams) -> None:
    """Whether there is a law to sample.

    Raises:
        InvalidParameter: the temperature is 0.
    """
    if params.temperature == 0:
        raise InvalidParameter(
            "temperature=0: texts at temperature 0 are checked in any case", "give a temperature to sample at"
        )


def verify(
    engine: Engine,
    prompts: Sequence[Prompt] | None = None,
    params: SamplingParams | None = None,
    options: Options | None = None,
    show: Callable[[str], None] = lambda line: None,
) -> Report:
    """Check that an engine says what its target says.

    Args:
        engine: to be checked.
        prompts: texts or token ids; by default some built-in ones.
        params: how to sample. ``max_new_tokens`` is the length of the greedy texts, and the samples' seeds count up
            from ``seed`` (None is 0).
        options: how much to do.
        show: takes a line about how far it has come.

    Raises:
        InvalidParameter: the temperature is 0, which has no law to sample.
        RequestError: a prompt is wrong.
    """
    begun = time.monotonic()
    params, options = params or SamplingParams(max_new_tokens=64), options or Options()
    check_params(params)
    if prompts is not None and not len(prompts):
        raise EmptyPrompt("the list of prompts is empty", "give one, or None for the built-in ones")
    if prompts is None and engine.tokenizer is None:
        raise EmptyPrompt("no prompts, and no tokenizer for the built-in ones", "give prompts as token ids")
    ids = varied(engine.encoder) if prompts is None else [engine.request(prompt).prompt for prompt in prompts]
    dtype = plain_logits(engine.target, torch.tensor([ids[0]], device=engine.target.device), 1).dtype
    budget = 60 * options.minutes
    greedy, texts = check_greedy(engine, ids, params, begun + _GREEDY * budget, show)
    contexts = places(ids, texts, options.contexts, engine.max_length - 2)
    sampled = check_sampled(engine, contexts, params, options, begun + _SAMPLING * budget, show)
    return Report(
        engine.target_name,
        engine.draft_name,
        str(engine.tree),
        engine.scheme_name,
        str(dtype).removeprefix("torch."),
        greedy,
        sampled,
        time.monotonic() - begun,
    )
