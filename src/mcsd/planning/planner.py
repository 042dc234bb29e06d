"""The plan of tree "auto": the tree that pays on the text at hand."""

from collections.abc import Sequence

from mcsd.params import SamplingParams
from mcsd.planning.acceptance import Acceptance, Rates
from mcsd.planning.plan import Outcome
from mcsd.planning.profile import Profile
from mcsd.planning.search import LARGEST, PLAIN, Choice, best, expected
from mcsd.schemes import Scheme
from mcsd.tree import TreeShape

_WEIGHT, _MEMORY = 12.0, 120.0
"""Visits that the profile's rates of acceptance count for, and visits that are remembered."""

_EVERY = 8
"""Steps between two looks for a better tree."""

_BETTER = 1.03
"""How many times as fast another tree must look before it takes the place of the one in use."""

_PAUSE, _LONGEST_PAUSE = 64, 1024
"""Plain steps after which speculation is tried again; each time in vain doubles them, each other one halves them."""

_TRIAL = 2
"""Steps of such a trial."""


class Planner:
    """The tree that is expected to emit the most tokens a second, by costs that were measured once and by what has
    been accepted lately. Where none pays it decodes plainly, and tries again from time to time.

    Sampled requests that name a seed are promised the same text in any batch and at any time. While one runs, every
    step has the tree that the profile alone makes best for one such request.

    Args:
        profile: what is known of target, draft and machine.
        scheme: that judges.
    """

    largest = LARGEST

    def __init__(self, profile: Profile, scheme: type[Scheme]) -> None:
        self._costs = profile.costs
        self._scheme = scheme
        self._acceptance = {
            True: Acceptance(profile.greedy, _WEIGHT, _MEMORY),
            False: Acceptance(profile.sampled, _WEIGHT, _MEMORY),
        }
        self._pinned = profile.tree or best(profile.sampled, profile.costs, 1, scheme.widest, scheme.deepest).shape
        self._shape = self._pinned
        self._mix = (0, 0)
        self._steps = 0
        self._pause = self._left = _PAUSE
        self._trial: Choice | None = None
        self._tried: list[tuple[float, float]] = []

    def choose(self, params: Sequence[SamplingParams]) -> TreeShape:
        """See `Plan.choose`."""
        self._trial = None
        if any(one.seed is not None and one.temperature > 0 for one in params):
            return self._pinned
        mix = len(params), sum(one.temperature == 0 for one in params)
        if mix != self._mix or self._steps % _EVERY == 0:
            if mix != self._mix:
                self._tried.clear()
            self._mix = mix
            self._look()
        self._steps += 1
        if len(self._shape):
            return self._shape
        if self._left > 0:
            self._left -= 1
            return self._shape
        self._trial = self._best(self._rates(), speculative=True)
        return self._trial.shape

    def observe(self, outcome: Outcome) -> None:
        """See `Plan.observe`."""
        paths = outcome.paths
        if not len(outcome.shape):
            # Look-up that finds nothing is plain decoding: it says nothing, and has cost nothing.
            return
        for one, path in zip(outcome.params, paths, strict=True):
            self._acceptance[one.temperature == 0].observe(outcome.shape, path)
        if self._trial is not None:
            self._tried.append((1 + sum(map(len, paths)) / len(paths), self._trial.seconds))
            self._trial = None
            if len(self._tried) == _TRIAL:
                self._weigh()

    def _weigh(self) -> None:
        """Whether a trial was worth its time: if so it goes on, until the rates say so too or it is no longer."""
        tokens, seconds = (sum(part) for part in zip(*self._tried, strict=True))
        pays = tokens * expected(PLAIN, self._rates(), self._costs, self._mix[0]).seconds > seconds
        self._pause = max(_PAUSE, self._pause // 2) if pays else min(2 * self._pause, _LONGEST_PAUSE)
        self._left = 0 if pays else self._pause
        self._steps = 0
        self._tried.clear()

    def _look(self) -> None:
        rates, rows = self._rates(), self._mix[0]
        choice = self._best(rates)
        if choice.rate > _BETTER * expected(self._shape, rates, self._costs, rows).rate:
            if not len(self._shape):
                self._pause = self._left = _PAUSE
            self._shape = choice.shape

    def _best(self, rates: Rates, speculative: bool = False) -> Choice:
        scheme = self._scheme
        return best(rates, self._costs, self._mix[0], scheme.widest, scheme.deepest, speculative)

    def _rates(self) -> Rates:
        """Of the rows at hand: an average over them."""
        rows, cold = self._mix
        if cold in (0, rows):
            return self._acceptance[cold > 0].rates()
        share = cold / rows
        both = zip(self._acceptance[True].rates(), self._acceptance[False].rates(), strict=True)
        return tuple(
            tuple(share * one + (1 - share) * other for one, other in zip(greedy, sampled, strict=True))
            for greedy, sampled in both
        )
