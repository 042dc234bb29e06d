"""The plan of tree "auto": the fastest tree by measured costs and recent acceptance rates."""

from collections.abc import Sequence

from mcsd.params import SamplingParams
from mcsd.planning.acceptance import AcceptanceEstimate, Rates, geometric_rates
from mcsd.planning.costs import seconds_at
from mcsd.planning.plan import StepOutcome
from mcsd.planning.profile import Profile
from mcsd.planning.search import MAX_NODES, TreeChoice, best_tree, expected_speed
from mcsd.planning.stretch import best_stretch
from mcsd.schemes.registry import REGISTRY
from mcsd.tree import PLAIN, TreeShape

_WEIGHT, _MEMORY = 12.0, 120.0
"""Visits that the profile's acceptance rates count for, and visits that are remembered."""

_SEARCH_INTERVAL = 8
"""Steps between two searches for a better tree."""

_MIN_GAIN = 1.03
"""A tree replaces the current one if it is expected to be this many times as fast."""

_PAUSE, _MAX_PAUSE = 64, 1024
"""Plain steps before speculation is probed again; a failed probe doubles them, a successful one halves them."""

_PROBE_STEPS = 2

_PROBE_STRETCH, _PROBE_SHARE = (16, 64), 0.05
"""Tokens that the draft reads of each text before a probe, at least and at most: what takes so much of the time of the
plain steps before it."""

_BEST_RATES = geometric_rates(0.95, 0.03)
"""Acceptance rates of a draft that is hardly ever wrong. There is no probe where even these are too slow."""

_CHUNK = 64
"""Tokens of a forward by which the time of reading a token is estimated."""

_MAX_CONFIDENCE = 0.9
"""Of the probability that a draft must give a path to draft another level."""


class Planner:
    """Chooses the tree with the highest expected tokens per second.

    If no tree is faster than plain decoding, it decodes plainly and probes speculation from time to time.

    Sampled requests with a seed are promised the same text in any batch and at any time. While one runs, the engine
    verifies by matching (scheme "top-k"), so that no text depends on the trees. Acceptance is then estimated apart.

    Args:
        profile: of target, draft and machine.
        scheme: that verifies.
    """

    max_nodes = MAX_NODES
    adapts = True

    def __init__(self, profile: Profile, scheme: str) -> None:
        self._costs = profile.costs
        self._limits = REGISTRY[scheme]
        self._acceptance = {
            "greedy": AcceptanceEstimate(profile.greedy, _WEIGHT, _MEMORY),
            "sampled": AcceptanceEstimate(profile.sampled, _WEIGHT, _MEMORY),
            "matched": AcceptanceEstimate(profile.sampled, _WEIGHT, _MEMORY),
        }
        limits = self._limits.max_width, self._limits.max_depth
        self._shape = profile.tree or best_tree(profile.sampled, profile.costs, 1, *limits).shape
        self._batch = (0, 0, 0)
        """Sequences of the batch, those that take candidates, and greedy ones among these."""
        self._sampled = "sampled"
        """How sampled sequences of the batch are verified."""
        self._steps = 0
        self._pause = self._pause_left = _PAUSE
        self._probe: TreeChoice | None = None
        self._probed: list[tuple[float, float]] = []

    @property
    def plain_seconds(self) -> float:
        """Expected seconds of a step without candidates, for one sequence."""
        return expected_speed(PLAIN, self._acceptance["sampled"].rates(), self._costs, 1).seconds

    def choose(self, params: Sequence[SamplingParams]) -> TreeShape:
        """See `Plan.choose`."""
        self._probe = None
        speculative = [one for one in params if one.speculative]
        batch = len(params), len(speculative), sum(one.temperature == 0 for one in speculative)
        sampled = "matched" if any(one.is_seeded for one in speculative) else "sampled"
        changed = (batch, sampled) != (self._batch, self._sampled)
        if changed or self._steps % _SEARCH_INTERVAL == 0:
            if changed:
                self._probed.clear()
            self._batch, self._sampled = batch, sampled
            self._search()
        self._steps += 1
        if len(self._shape):
            return self._shape
        if self._pause_left > 0:
            self._pause_left -= 1
            return self._shape
        if not len(self._best(_BEST_RATES).shape):
            self._pause_left = self._pause
            return self._shape
        self._probe = self._best(self._rates(), speculative=True)
        return self._probe.shape

    @property
    def min_confidence(self) -> float:
        """The time of another level over that of a token: see `mcsd.drafters.Drafter.min_confidence`."""
        batch_size, nodes = self._batch[0], len(self._shape)
        if not nodes:
            return 0.0
        now = expected_speed(self._shape, self._rates(), self._costs, batch_size)
        target = self._costs.target
        more = seconds_at(target, batch_size * (1 + nodes)) - seconds_at(target, batch_size * nodes)
        level = seconds_at(self._costs.level, batch_size) if self._costs.level else 0.0
        return min((level + more) * now.rate, _MAX_CONFIDENCE)

    def stretches(self, unread: Sequence[int], remaining: Sequence[int]) -> list[int] | None:
        """How many last tokens of each text the draft reads before a step with a tree that `choose` has named.

        Args:
            unread: tokens of each that it has not read.
            remaining: tokens that may still be emitted, for each.

        Returns:
            Tokens of each; None if speculation saves less time than reading takes.
        """
        rates, batch_size = self._rates(), self._batch[0]
        plain, drafted = (
            1 / (batch_size * expected_speed(shape, rates, self._costs, batch_size).rate)
            for shape in (PLAIN, self._shape)
        )
        reading = seconds_at(self._costs.level, _CHUNK) / _CHUNK if self._costs.level else 0.0
        if self._probe is not None:
            least, most = _PROBE_STRETCH
            affordable = int(_PROBE_SHARE * self._pause * plain / reading) if reading else most
            return [min(tokens, most, max(least, affordable)) for tokens in unread]
        both = zip(unread, remaining, strict=True)
        best = [best_stretch(tokens, left, plain, drafted, reading) for tokens, left in both]
        return [tokens for tokens, _ in best] if sum(saved for _, saved in best) > 0 else None

    def observe(self, outcome: StepOutcome) -> None:
        """See `Plan.observe`."""
        paths = outcome.paths
        if not len(outcome.shape):
            # N-gram look-up without a match is plain decoding: it costs nothing and says nothing about acceptance.
            return
        for one, path in zip(outcome.params, paths, strict=True):
            self._acceptance["greedy" if one.temperature == 0 else self._sampled].observe(outcome.shape, path)
        if self._probe is not None:
            share = self._batch[1] / self._batch[0]
            self._probed.append((1 + share * sum(map(len, paths)) / len(paths), self._probe.seconds))
            self._probe = None
            if len(self._probed) == _PROBE_STEPS:
                self._finish_probe()

    def _finish_probe(self) -> None:
        """Decide whether the probe of speculation was faster than plain decoding; if not, back off exponentially."""
        tokens, seconds = (sum(part) for part in zip(*self._probed, strict=True))
        plain = expected_speed(PLAIN, self._rates(), self._costs, self._batch[0])
        faster = tokens * plain.seconds > seconds
        self._pause = max(_PAUSE, self._pause // 2) if faster else min(2 * self._pause, _MAX_PAUSE)
        self._pause_left = 0 if faster else self._pause
        self._steps = 0
        self._probed.clear()

    def _search(self) -> None:
        rates, batch_size = self._rates(), self._batch[0]
        choice = self._best(rates)
        if choice.rate > _MIN_GAIN * expected_speed(self._shape, rates, self._costs, batch_size).rate:
            if not len(self._shape):
                self._pause = self._pause_left = _PAUSE
            self._shape = choice.shape

    def _best(self, rates: Rates, speculative: bool = False) -> TreeChoice:
        limits = self._limits.max_width, self._limits.max_depth
        return best_tree(rates, self._costs, self._batch[0], *limits, speculative)

    def _rates(self) -> Rates:
        """Acceptance rates of the batch: the mean over its sequences."""
        batch_size, speculative, greedy = self._batch
        if greedy in (0, speculative):
            rates = self._acceptance["greedy" if greedy else self._sampled].rates()
        else:
            share = greedy / speculative
            both = zip(self._acceptance["greedy"].rates(), self._acceptance[self._sampled].rates(), strict=True)
            rates = tuple(
                tuple(share * one + (1 - share) * other for one, other in zip(greedy_rates, sampled_rates, strict=True))
                for greedy_rates, sampled_rates in both
            )
        if speculative == batch_size:
            return rates
        # Sequences that are decoded plainly accept no candidate at the root, and never come to the others.
        return tuple(speculative / batch_size * rate for rate in rates[0]), *rates[1:]
