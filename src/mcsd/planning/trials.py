"""Measuring a pair: the cost of forwards and of drafting, and acceptance rates on text that the target generates."""

import itertools
import math
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from mcsd.graphs import GraphCache, Outputs
from mcsd.models import Cache, LanguageModel, TokenLayout
from mcsd.models.prefill import prefill
from mcsd.params import SamplingParams
from mcsd.planning.acceptance import AcceptanceEstimate, Rates, geometric_rates
from mcsd.planning.costs import Curve, StepCosts, monotone_curve
from mcsd.planning.plan import StepOutcome
from mcsd.planning.profile import Profile
from mcsd.schemes.registry import supports
from mcsd.tree import TreeShape

TEMPERATURES = (1.0, 0.0)
"""At which acceptance rates are measured."""

_TREES = {True: ("none", "1", "chain:3", "2x1", "4x1", "8x1"), False: ("none", "4x2x1x1")}
"""Trees to try, by whether candidates are sampled; two levels of different width show the cost of a level."""

_MIN_ROUNDS, _MAX_ROUNDS, _SECONDS = 4, 24, 3.0
"""Steps with each tree at each temperature, and the time after which no more than the minimum is started."""

_CHUNK = 16
"""Tokens by which a text grows before the next one continues, so slow pairs too are measured on several texts."""

_WIDTHS = (1, 4, 6, 8, 12, 16, 32, 64)
"""Tokens of the forwards that are timed."""

_MAX_SLOWDOWN = 3.0
"""Forwards are timed up to the first that takes this many times as long as one token."""

_CONTEXT, _REPEATS = 64, 3
"""Tokens before the timed forwards, and rounds of timing them: a disturbance lasts for a while."""

_CAPTURES = 3
"""Rounds before these in which a CUDA graph is made of every forward."""

_PRIOR, _PRIOR_WEIGHT = geometric_rates(0.2, 0.08), 4.0
"""Rates of a poor draft, and the visits they count for. Few steps of a slow pair are measured; with an optimistic
prior, seeds would pin a tree that is slower than plain decoding."""


class TrialStep(NamedTuple):
    """The outcome of one step of one sequence.

    Attributes:
        greedy: whether at temperature 0.
        parents: of the tree that was verified.
        path: the accepted nodes.
        draft: seconds of drafting; rest: of verification and commit.
    """

    greedy: bool
    parents: tuple[int, ...]
    path: tuple[int, ...]
    draft: float
    rest: float

    @classmethod
    def from_json(cls, value: Sequence[Any]) -> "TrialStep":
        """A step from its JSON list."""
        greedy, parents, path, draft, rest = value
        return cls(bool(greedy), tuple(parents), tuple(path), draft, rest)


class TrialPlan:
    """A `Plan` that tries several trees, one after the other, on one sequence, and records the outcomes.

    Args:
        scheme: that verifies; trees that it does not support are left out.
        is_sampled: whether the drafter samples its candidates; if not, drafting costs nothing.
    """

    adapts = False

    def __init__(self, scheme: str, is_sampled: bool) -> None:
        self.shapes = [shape for tree in _TREES[is_sampled] if supports(scheme, shape := TreeShape.parse(tree))]
        self.steps: list[TrialStep] = []
        self.max_nodes = max(map(len, self.shapes))
        self._is_sampled = is_sampled

    def choose(self, params: Sequence[SamplingParams]) -> TreeShape:
        """See `Plan.choose`."""
        return self.shapes[len(self.steps) % len(self.shapes)]

    def observe(self, outcome: StepOutcome) -> None:
        """See `Plan.observe`."""
        greedy, seconds = outcome.params[0].temperature == 0, outcome.seconds
        rest = seconds["judge"] + seconds["commit"]
        step = TrialStep(greedy, outcome.shape.parents, tuple(outcome.paths[0]), seconds["draft"], rest)
        self.steps.append(step)

    def profile(self, target: Curve) -> Profile:
        """The profile by all steps so far.

        Args:
            target: durations of the target's forwards.
        """
        speculative = [step for step in self.steps if step.parents]
        plain = _typical([step.rest for step in self.steps if not step.parents])
        points = [(len(step.path), step.rest) for step in speculative]
        verified, accepted = _fit_line(points) if points else (plain, 0.0)
        first, level = self._level_costs() if self._is_sampled else (0.0, ())
        costs = StepCosts(target, level, first, plain, verified, accepted)
        return Profile(costs, self._rates(True), self._rates(False))

    def _rates(self, greedy: bool) -> Rates:
        """Acceptance rates. The prior of a level is the estimate of the level above."""
        estimate = AcceptanceEstimate(_PRIOR, _PRIOR_WEIGHT, math.inf)
        for step in self.steps:
            if step.parents and step.greedy == greedy:
                estimate.observe(_shape(step.parents), step.path)
        levels = [_PRIOR[0]]
        for depth in range(len(_PRIOR)):
            levels.append(estimate.level(depth, levels[-1]))
        return tuple(levels[1:])

    def _level_costs(self) -> tuple[float, Curve]:
        """The extra time of the first level of a tree, and the time of a level by its nodes."""
        seconds: defaultdict[TreeShape, list[float]] = defaultdict(list)
        for step in self.steps:
            if step.parents:
                seconds[_shape(step.parents)].append(step.draft)
        one_level = _typical([each for shape, some in seconds.items() if shape.depth == 1 for each in some])
        points: defaultdict[int, list[float]] = defaultdict(list)
        for shape, some in seconds.items():
            further = [len(level) for level in shape.levels[1:]]
            if further and len({*further}) == 1:
                points[further[0]].append((_typical(some) - one_level) / len(further))
        means = [(count, max(0.0, statistics.mean(some))) for count, some in points.items()]
        # With too few steps to tell them apart, every level costs as much as the first.
        curve = monotone_curve(means) or ((1, one_level),)
        return max(0.0, one_level - curve[0][1]), curve


def run_trials(
    trial: TrialPlan,
    prompts: Sequence[list[int]],
    max_length: int,
    generate: Callable[[list[int], SamplingParams], Sequence[int]],
) -> None:
    """Run enough steps of a calibration, and more if there is time.

    Args:
        trial: the plan of the engine behind ``generate``.
        prompts: token ids, at least one; the end of a long one is used.
        max_length: the most tokens of a text; a text that ends or becomes longer starts again.
        generate: continues a text by one step or more and returns the new tokens.
    """
    starts = [prompt[-max(1, max_length // 2) :] for prompt in prompts]
    for temperature in TEMPERATURES:
        texts = list(starts)
        before, end = len(trial.steps), time.monotonic() + _SECONDS
        for turn in itertools.count():
            place = turn % len(texts)
            # With one seed for all, every text would use the same random numbers.
            new = generate(texts[place], SamplingParams(temperature=temperature, max_new_tokens=_CHUNK, seed=turn))
            text = [*texts[place], *new]
            continues = len(new) == _CHUNK and len(text) + _CHUNK <= max_length
            texts[place] = text if continues else starts[place]
            rounds = (len(trial.steps) - before) / len(trial.shapes)
            if rounds >= _MAX_ROUNDS or (rounds >= _MIN_ROUNDS and time.monotonic() > end):
                break


def measure_forwards(
    model: LanguageModel, hidden_layers: Sequence[int] = (), batch_sizes: Sequence[int] = (1,)
) -> Curve:
    """The duration of forwards by their tokens.

    Args:
        model: to time, in a cache of its own.
        hidden_layers: layers whose hidden states are requested.
        batch_sizes: of the forwards.
    """
    length = min(model.max_length or _CONTEXT + _WIDTHS[-1], _CONTEXT + _WIDTHS[-1])
    context = min(_CONTEXT, length // 2)
    widths = [width for width in _WIDTHS if context + width <= length]
    points: dict[int, float] = {}
    captures = getattr(model, "captures", False)
    for count in batch_sizes:
        cache = model.new_cache(count, length)
        for sequence in range(count):
            prefill(model, cache, cache.add(), [(sequence + token) % model.vocab_size for token in range(context)])
        graphs = GraphCache(model.device, captures)
        for turn in range(-_CAPTURES if captures else 0, _REPEATS):
            for width in widths:
                tokens = (torch.arange(width, device=model.device) % model.vocab_size).expand(count, -1)
                seconds = _forward_seconds(model, tokens, cache, hidden_layers, graphs)
                if turn < 0:
                    continue
                points[count * width] = min(seconds, points.get(count * width, seconds))
                if points[count * width] > _MAX_SLOWDOWN * points[min(points)]:
                    break
    return monotone_curve(list(points.items()))


def _forward_seconds(
    model: LanguageModel, tokens: torch.Tensor, cache: Cache, hidden_layers: Sequence[int], graphs: GraphCache
) -> float:
    width = tokens.shape[1]

    def forward(tokens: torch.Tensor) -> Outputs:
        output = model.forward(tokens, TokenLayout.chain(width, model.device), cache, hidden_layers=hidden_layers)
        return output.logits, output.hidden

    started = time.perf_counter()
    columns = cache.reserve(width)
    logits, _ = graphs.run((width, columns), forward, tokens, generation=cache.generation)
    float(logits[0, -1, 0])  # Reading a number waits for the device.
    seconds = time.perf_counter() - started
    nothing = torch.zeros(len(tokens), dtype=torch.int64, device=model.device)
    cache.commit(nothing[:, None], nothing)
    return seconds


def _typical(seconds: Sequence[float]) -> float:
    """The first quartile: most slower measurements were disturbed."""
    if len(seconds) < 2:
        return seconds[0] if seconds else 0.0
    return statistics.quantiles(seconds, n=4, method="inclusive")[0]


def _fit_line(points: Sequence[tuple[int, float]]) -> tuple[float, float]:
    """Intercept and slope of seconds by accepted candidates; the slope is at least 0."""
    mean = statistics.mean(seconds for _, seconds in points)
    if len({accepted for accepted, _ in points}) < 2:
        return mean, 0.0
    slope, intercept = statistics.linear_regression(*zip(*points, strict=True))
    return (intercept, slope) if slope > 0 < intercept else (mean, 0.0)


@lru_cache(maxsize=64)
def _shape(parents: tuple[int, ...]) -> TreeShape:
    return TreeShape(parents)
