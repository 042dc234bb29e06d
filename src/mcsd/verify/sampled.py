"""Samples: the engine's next two tokens after several contexts, tested against the target's exact distribution."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mcsd.engine import Engine
from mcsd.errors import PromptTooLong
from mcsd.params import SamplingParams
from mcsd.verify.options import MIN_SAMPLES, VerifyOptions
from mcsd.verify.pair_distribution import SampleTest, compare, pair_distribution
from mcsd.verify.report import LEVEL, ContextReport, SampledReport
from mcsd.verify.statistics import binomial_sf, chi_square_sf, detectable_total_variation, holm

_STRIDE = 5
"""Tokens of the greedy text that are added to a prompt each time it is used again."""

_PAIR = 2

Counts = list[Counter[tuple[int, ...]]]


@dataclass(frozen=True)
class ContextPosition:
    """A context: a prompt, by index, followed by some tokens of its greedy text."""

    prompt: int
    continued: int
    tokens: list[int]


def choose_contexts(
    prompts: Sequence[list[int]], texts: Sequence[list[int]], count: int, max_length: int
) -> list[ContextPosition]:
    """Up to ``count`` contexts of at most ``max_length`` tokens: first the prompts, then the prompts with some text.

    Raises:
        PromptTooLong: every prompt is too long.
    """
    found = []
    longest = max(map(len, texts))
    for continued in range(0, longest + 1, _STRIDE):
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=False)):
            tokens = prompt + text[:continued]
            if continued <= len(text) and len(tokens) <= max_length:
                found.append(ContextPosition(number, continued, tokens))
    if not found:
        raise PromptTooLong(f"no prompt leaves space for {_PAIR} tokens", "shorten one, or raise max_length")
    return found[:count]


def check_sampled(
    engine: Engine,
    contexts: list[ContextPosition],
    params: SamplingParams,
    options: VerifyOptions,
    until: float,
    progress: Callable[[str], None],
) -> SampledReport:
    """Sample pairs of tokens after each context, as many as the time allows, and test them.

    Args:
        engine: the engine to check.
        contexts: where to sample.
        params: how to sample; the seed is the first of many.
        options: number of samples per context and of contexts requested.
        until: time limit, by `time.monotonic`. One context is sampled `MIN_SAMPLES` times in any case.
        progress: called with status lines.
    """
    params = replace(params, max_new_tokens=_PAIR, ignore_eos=True, stop=())
    counts = _sample(engine, contexts, params, options.samples, until, progress)
    tests = []
    for i, (context, pairs) in enumerate(zip(contexts, counts, strict=False)):
        progress(f"comparing: {i} of {len(counts)} contexts")
        tests.append((context, compare(pairs, pair_distribution(engine.target, context.tokens, params), i)))
    return _evaluate(tests, options)


def _sample(
    engine: Engine,
    contexts: list[ContextPosition],
    params: SamplingParams,
    samples: int,
    until: float,
    progress: Callable[[str], None],
) -> Counts:
    """The pairs sampled at each context; at fewer contexts if there is no time for all. Batches mix all contexts."""
    counts: Counts = [Counter() for _ in contexts]
    each = max(1, engine.max_batch // len(contexts))
    used, start = 0, time.monotonic()
    while (done := counts[0].total()) < samples and (done < MIN_SAMPLES or time.monotonic() < until):
        progress(f"sampling: {done} of {samples} pairs for each of {len(counts)} contexts")
        portion = min(each, samples - done) * len(counts)
        prompts = [contexts[i % len(counts)].tokens for i in range(portion)]
        seed = params.seed or 0
        seeded = [replace(params, seed=(seed + used + i) % 2**64) for i in range(portion)]
        for i, completion in enumerate(engine.generate(prompts, seeded)):
            counts[i % len(counts)][completion.token_ids] += 1
        if not used:
            # The time left decides, never the samples: choosing by those would bias the test.
            rate = portion / (time.monotonic() - start)
            affordable = int(rate * (until - start) / MIN_SAMPLES)
            counts = counts[: max(1, affordable)]
            each = max(1, engine.max_batch // len(counts))
        used += portion
    return counts


def _evaluate(tests: list[tuple[ContextPosition, SampleTest]], options: VerifyOptions) -> SampledReport:
    """p-values and rejections. Every context is allowed the largest rounding of any, as it does not show at each."""
    level = LEVEL / (len(tests) + 1)
    rounding, distance = max(one.rounding for _, one in tests), max(one.distance for _, one in tests)
    contexts = []
    for context, one in tests:
        degrees, noncentrality = one.cells - 1, one.samples * distance
        p_value = min(
            chi_square_sf(one.chi_square, degrees, noncentrality), binomial_sf(one.forbidden, one.samples, rounding)
        )
        # Half of a context's share of the level is for tokens of probability 0.
        sees = detectable_total_variation(degrees, noncentrality, one.samples, level / 2)
        where = (context.prompt, context.continued, len(context.tokens))
        contexts.append(ContextReport(*where, **vars(one), p_value=min(2 * p_value, 1.0), sees=sees))
    degrees, samples = sum(one.cells - 1 for _, one in tests), sum(one.samples for _, one in tests)
    together = chi_square_sf(sum(one.chi_square for _, one in tests), degrees, samples * distance)
    sees = detectable_total_variation(degrees, samples * distance, samples, level)
    rejected = holm([*(one.p_value for one in contexts), together], LEVEL)
    return SampledReport(tuple(contexts), options.contexts, options.samples, together, sees, tuple(rejected))
