"""Measuring a pair: what forwards and drafting cost, and what is accepted on texts that the target writes."""

import itertools
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from mcsd.models import Block, Cache, LanguageModel
from mcsd.models.prefill import prefill
from mcsd.params import SamplingParams
from mcsd.planning.acceptance import Acceptance, Rates, falling
from mcsd.planning.costs import Costs, Curve, rising
from mcsd.planning.plan import Outcome
from mcsd.planning.profile import Profile
from mcsd.schemes import Scheme
from mcsd.tree import TreeShape

TEMPERATURES = (1.0, 0.0)
"""At which acceptance is measured."""

_TREES = {True: ("none", "1", "chain:3", "2x1", "4x1", "8x1"), False: ("none", "4x2x1x1")}
"""That are tried, by whether candidates are drawn: two levels of different width show what a level costs."""

_ROUNDS, _MOST_ROUNDS, _SECONDS = 4, 24, 3.0
"""Steps with each tree, at each temperature: at least and at most, and the time after which no more are begun."""

_WRITTEN = 16
"""Tokens by which a text grows before the next one has its turn: slow pairs too see several texts."""

_WIDTHS = (1, 4, 6, 8, 12, 16, 32, 64)
_TOO_LONG = 3.0
"""Tokens of the forwards that are timed, up to one that takes so many times as long as that of one token."""

_CONTEXT, _REPEATS = 64, 3
"""Tokens before them, and how often each is timed, in turns: whatever slows the machine down lasts for a while."""

_BELIEVED, _WEIGHT = falling(0.2, 0.08), 4.0
"""Rates of a poor draft, and visits that they count for: of a slow pair few steps are seen, and with a draft that is
taken for better than it is, seeds would pin a tree that is slower than plain decoding."""


class Step(NamedTuple):
    """What became of one step of one row.

    Attributes:
        greedy: whether at temperature 0.
        parents: of the tree that was judged.
        path: the accepted nodes.
        draft: seconds of drafting; rest: of all but forwards.
    """

    greedy: bool
    parents: tuple[int, ...]
    path: tuple[int, ...]
    draft: float
    rest: float

    @classmethod
    def of_list(cls, value: Sequence[Any]) -> "Step":
        """A step as JSON gives it back."""
        greedy, parents, path, draft, rest = value
        return cls(bool(greedy), tuple(parents), tuple(path), draft, rest)


class Calibration:
    """A `Plan` that tries trees in turn, on one row, and takes down what becomes of them.

    Args:
        scheme: that judges; trees that it cannot judge are left out.
        draws: whether the drafter draws its candidates; drafting costs nothing with one that does not.
    """

    def __init__(self, scheme: type[Scheme], draws: bool) -> None:
        self.shapes = [shape for tree in _TREES[draws] if scheme.judges(shape := TreeShape.parse(tree))]
        self.steps: list[Step] = []
        self.largest = max(map(len, self.shapes))
        self._draws = draws

    def choose(self, params: Sequence[SamplingParams]) -> TreeShape:
        """See `Plan.choose`."""
        return self.shapes[len(self.steps) % len(self.shapes)]

    def observe(self, outcome: Outcome) -> None:
        """See `Plan.observe`."""
        greedy, seconds = outcome.params[0].temperature == 0, outcome.seconds
        rest = seconds["judge"] + seconds["commit"]
        self.steps.append(Step(greedy, outcome.shape.parents, tuple(outcome.paths[0]), seconds["draft"], rest))

    def profile(self, target: Curve) -> Profile:
        """What has been found.

        Args:
            target: what the target's forwards cost.
        """
        candidates = [step for step in self.steps if step.parents]
        usual = _usual([step.rest for step in self.steps if not step.parents])
        judged, accepted = _line([(len(step.path), step.rest) for step in candidates]) if candidates else (usual, 0.0)
        first, level = self._levels() if self._draws else (0.0, ())
        costs = Costs(target, level, first, usual, judged, accepted)
        return Profile(costs, self._rates(True), self._rates(False))

    def _rates(self, greedy: bool) -> Rates:
        """Of what a level has not shown, the one above it tells more than what is believed of drafts."""
        acceptance = Acceptance(_BELIEVED, _WEIGHT, math.inf)
        for step in self.steps:
            if step.parents and step.greedy == greedy:
                acceptance.observe(_shape(step.parents), step.path)
        levels = [_BELIEVED[0]]
        for depth in range(len(_BELIEVED)):
            levels.append(acceptance.level(depth, levels[-1]))
        return tuple(levels[1:])

    def _levels(self) -> tuple[float, Curve]:
        """What the first level of a tree costs more than another, and what levels cost."""
        seconds: defaultdict[TreeShape, list[float]] = defaultdict(list)
        for step in self.steps:
            if step.parents:
                seconds[_shape(step.parents)].append(step.draft)
        whole = _usual([each for shape, some in seconds.items() if shape.depth == 1 for each in some])
        points: defaultdict[int, list[float]] = defaultdict(list)
        for shape, some in seconds.items():
            further = [len(level) for level in shape.levels[1:]]
            if further and len({*further}) == 1:
                points[further[0]].append((_usual(some) - whole) / len(further))
        # Of too few steps to tell, a level costs what the first one does.
        curve = rising([(count, max(0.0, statistics.mean(some))) for count, some in points.items()]) or ((1, whole),)
        return max(0.0, whole - curve[0][1]), curve


def try_trees(
    trial: Calibration,
    prompts: Sequence[list[int]],
    longest: int,
    answer: Callable[[list[int], SamplingParams], Sequence[int]],
) -> None:
    """Let a calibration see enough steps, and as many more as a few seconds allow.

    Args:
        trial: the plan that ``answer`` goes by.
        prompts: token ids, at least one; of a long one its end.
        longest: tokens that a text may have. It begins anew where it would have more, and where it is over.
        answer: goes on with a text, one step or more, and returns what is new.
    """
    beginnings = [prompt[-max(1, longest // 2) :] for prompt in prompts]
    for temperature in TEMPERATURES:
        texts = list(beginnings)
        before, end = len(trial.steps), time.monotonic() + _SECONDS
        for turn in itertools.count():
            place = turn % len(texts)
            # The same seed would draw and judge all of them with the same numbers.
            new = answer(texts[place], SamplingParams(temperature=temperature, max_new_tokens=_WRITTEN, seed=turn))
            text = [*texts[place], *new]
            goes_on = len(new) == _WRITTEN and len(text) + _WRITTEN <= longest
            texts[place] = text if goes_on else beginnings[place]
            rounds = (len(trial.steps) - before) / len(trial.shapes)
            if rounds >= _MOST_ROUNDS or (rounds >= _ROUNDS and time.monotonic() > end):
                break


def forward_curve(model: LanguageModel, hidden: Sequence[int] = (), rows: Sequence[int] = (1,)) -> Curve:
    """What forwards cost, by their tokens.

    Args:
        model: that is timed, in a cache of its own.
        hidden: layers whose states are asked for.
        rows: of the forwards that are timed.
    """
    room = min(model.max_length or _CONTEXT + _WIDTHS[-1], _CONTEXT + _WIDTHS[-1])
    context = min(_CONTEXT, room // 2)
    widths = [width for width in _WIDTHS if context + width <= room]
    points: dict[int, float] = {}
    for count in rows:
        cache = model.new_cache(count, room)
        for row in range(count):
            prefill(model, cache, cache.add(), [(row + token) % model.vocab_size for token in range(context)])
        for _ in range(_REPEATS):
            for width in widths:
                tokens = (torch.arange(width, device=model.device) % model.vocab_size).expand(count, -1)
                seconds = _forward_seconds(model, tokens, cache, hidden)
                points[count * width] = min(seconds, points.get(count * width, seconds))
                if points[count * width] > _TOO_LONG * points[min(points)]:
                    break
    return rising(list(points.items()))


def _forward_seconds(model: LanguageModel, tokens: torch.Tensor, cache: Cache, hidden: Sequence[int]) -> float:
    begun = time.perf_counter()
    logits = model.forward(tokens, Block.chain(tokens.shape[1]), cache, hidden=hidden).logits
    float(logits[0, -1, 0])  # Reading a number waits for the device.
    seconds = time.perf_counter() - begun
    dropped = torch.zeros(len(tokens), dtype=torch.int64, device=model.device)
    cache.commit(dropped[:, None], dropped)
    return seconds


def _usual(seconds: Sequence[float]) -> float:
    """A quarter of the measurements are below it: most of those above have been slowed down by something else."""
    if len(seconds) < 2:
        return seconds[0] if seconds else 0.0
    return statistics.quantiles(seconds, n=4, method="inclusive")[0]


def _line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """What judging costs, and each accepted candidate more: a line through points, rising or level."""
    mean = statistics.mean(seconds for _, seconds in points)
    if len({accepted for accepted, _ in points}) < 2:
        return mean, 0.0
    slope, start = statistics.linear_regression(*zip(*points, strict=True))
    return (start, slope) if slope > 0 < start else (mean, 0.0)


@lru_cache(maxsize=64)
def _shape(parents: tuple[int, ...]) -> TreeShape:
    return TreeShape(parents)
