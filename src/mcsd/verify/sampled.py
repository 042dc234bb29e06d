"""Samples: the engine's next two tokens after several contexts, against the exact law of the target."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mcsd.engine import Engine
from mcsd.errors import PromptTooLong
from mcsd.params import SamplingParams
from mcsd.verify.options import FEWEST, Options
from mcsd.verify.pairs import Comparison, compare, pair_law
from mcsd.verify.report import LEVEL, Context, Sampled
from mcsd.verify.statistics import at_least, holm, tail, visible

_STRIDE = 5
"""Tokens of the greedy text by which a prompt that is used again is continued further."""

_PAIR = 2

Counts = list[Counter[tuple[int, ...]]]


@dataclass(frozen=True)
class Place:
    """A context: a prompt, by number, continued by some tokens of its greedy text."""

    prompt: int
    continued: int
    tokens: list[int]


def places(prompts: Sequence[list[int]], texts: Sequence[list[int]], count: int, longest: int) -> list[Place]:
    """Up to ``count`` contexts of at most ``longest`` tokens: each prompt as it is, then each continued, then further.

    Raises:
        PromptTooLong: there is none.
    """
    found = []
    furthest = max(map(len, texts))
    for continued in range(0, furthest + 1, _STRIDE):
        for number, (prompt, text) in enumerate(zip(prompts, texts, strict=False)):
            tokens = prompt + text[:continued]
            if continued <= len(text) and len(tokens) <= longest:
                found.append(Place(number, continued, tokens))
    if not found:
        raise PromptTooLong(f"no prompt leaves room for {_PAIR} tokens", "shorten one, or raise max_length")
    return found[:count]


def check_sampled(
    engine: Engine,
    contexts: list[Place],
    params: SamplingParams,
    options: Options,
    until: float,
    show: Callable[[str], None],
) -> Sampled:
    """Draw pairs of tokens after each context, as many as fit into the time, and hold them against the law.

    Args:
        engine: to be checked.
        contexts: where.
        params: how to sample; the seed is the first of many.
        options: how many samples of each context, and how many contexts were wanted.
        until: when to stop, by `time.monotonic`. One context is sampled `FEWEST` times in any case.
        show: takes a line about how far it has come.
    """
    params = replace(params, max_new_tokens=_PAIR, ignore_eos=True, stop=())
    counts = _sample(engine, contexts, params, options.samples, until, show)
    found = []
    for i, (place, seen) in enumerate(zip(contexts, counts, strict=False)):
        show(f"comparing: {i} of {len(counts)} contexts")
        found.append((place, compare(seen, pair_law(engine.target, place.tokens, params), i)))
    return _judge(found, options)


def _sample(
    engine: Engine,
    contexts: list[Place],
    params: SamplingParams,
    samples: int,
    until: float,
    show: Callable[[str], None],
) -> Counts:
    """The pairs of each context, of fewer contexts where there is no time for all; all in the same batches."""
    counts: Counts = [Counter() for _ in contexts]
    each = max(1, engine.max_batch // len(contexts))
    used, begun = 0, time.monotonic()
    while (done := counts[0].total()) < samples and (done < FEWEST or time.monotonic() < until):
        show(f"sampling: {done} of {samples} pairs for each of {len(counts)} contexts")
        portion = min(each, samples - done) * len(counts)
        prompts = [contexts[i % len(counts)].tokens for i in range(portion)]
        seed = params.seed or 0
        seeded = [replace(params, seed=(seed + used + i) % 2**64) for i in range(portion)]
        for i, completion in enumerate(engine.generate(prompts, seeded)):
            counts[i % len(counts)][completion.token_ids] += 1
        if not used:
            # The time that is left decides, never what was seen: choosing by that would bias the test.
            pace = portion / (time.monotonic() - begun)
            fit = int(pace * (until - begun) / FEWEST)
            counts = counts[: max(1, fit)]
            each = max(1, engine.max_batch // len(counts))
        used += portion
    return counts


def _judge(found: list[tuple[Place, Comparison]], options: Options) -> Sampled:
    """p-values, where rounding may do at each context what it was seen to do at any: at some it happens not to show."""
    level = LEVEL / (len(found) + 1)
    rounding, distance = max(one.rounding for _, one in found), max(one.distance for _, one in found)
    contexts = []
    for place, one in found:
        degrees, shift = one.cells - 1, one.samples * distance
        p_value = min(tail(one.chi_square, degrees, shift), at_least(one.forbidden, one.samples, rounding))
        # Half of a context's share of the level is for tokens that the law forbids.
        sees = visible(degrees, shift, one.samples, level / 2)
        where = (place.prompt, place.continued, len(place.tokens))
        contexts.append(Context(*where, **vars(one), p_value=min(2 * p_value, 1.0), sees=sees))
    degrees, drawn = sum(one.cells - 1 for _, one in found), sum(one.samples for _, one in found)
    together = tail(sum(one.chi_square for _, one in found), degrees, drawn * distance)
    sees = visible(degrees, drawn * distance, drawn, level)
    rejected = holm([*(one.p_value for one in contexts), together], LEVEL)
    return Sampled(tuple(contexts), options.contexts, options.samples, together, sees, tuple(rejected))
