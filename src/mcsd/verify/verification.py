"""`verify`: both checks of an engine, within a time limit."""

import time
from collections.abc import Callable, Sequence

import torch

from mcsd.engine import Engine
from mcsd.errors import EmptyPrompt
from mcsd.params import SamplingParams
from mcsd.prompts import mixed_prompts
from mcsd.tokenization import Prompt
from mcsd.verify.greedy import check_greedy
from mcsd.verify.options import VerifyOptions, check_params
from mcsd.verify.oracle import reference_logits
from mcsd.verify.report import VerificationReport
from mcsd.verify.sampled import check_sampled, choose_contexts

_GREEDY, _SAMPLING = 0.4, 0.95
"""Fractions of the time after which no further greedy texts, and no further samples, are started."""


def verify(
    engine: Engine,
    prompts: Sequence[Prompt] | None = None,
    params: SamplingParams | None = None,
    options: VerifyOptions | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> VerificationReport:
    """Check that an engine's output follows its target: greedy texts, and samples.

    Args:
        engine: the engine to check.
        prompts: texts or token ids; None takes the built-in ones.
        params: how to sample. ``max_new_tokens`` is the length of the greedy texts, and the seeds of the samples count
            up from ``seed`` (None is 0).
        options: the amount of work.
        progress: called with status lines.

    Raises:
        InvalidParameter: the temperature is 0.
        RequestError: a prompt is wrong.
    """
    start = time.monotonic()
    params, options = params or SamplingParams(max_new_tokens=64), options or VerifyOptions()
    check_params(params)
    if prompts is not None and not len(prompts):
        raise EmptyPrompt("the list of prompts is empty", "give at least one, or None for the built-in ones")
    if prompts is None and engine.tokenizer is None:
        raise EmptyPrompt("no prompts, and no tokenizer for the built-in ones", "give prompts as token ids")
    ids = mixed_prompts(engine.encoder) if prompts is None else [engine.request(prompt).prompt for prompt in prompts]
    dtype = reference_logits(engine.target, torch.tensor([ids[0]], device=engine.target.device), 1).dtype
    seconds = 60 * options.minutes
    greedy, texts = check_greedy(engine, ids, params, start + _GREEDY * seconds, progress)
    contexts = choose_contexts(ids, texts, options.contexts, engine.max_length - 2)
    sampled = check_sampled(engine, contexts, params, options, start + _SAMPLING * seconds, progress)
    return VerificationReport(
        engine.target_name,
        engine.draft_name,
        str(engine.tree),
        engine.scheme_name,
        str(dtype).removeprefix("torch."),
        greedy,
        sampled,
        time.monotonic() - start,
    )
