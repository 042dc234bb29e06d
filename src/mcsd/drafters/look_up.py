"""Look-up: candidates copied from where the last tokens occurred before, and how likely such copies are accepted.

A source follows the text. It points at a continuation of the last tokens and knows how many tokens before it match.
At every token of the text it counts whether the token that it points at was the right one, whether or not that token
was drafted. So it knows its acceptance rates without trying, by the length of the match, and they depend on the past of
the text alone.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain, islice
from operator import mul
from typing import ClassVar

MAX_MATCH = 32
"""Tokens of the longest match that is compared."""

MAX_OCCURRENCES = 16
"""Earlier occurrences that are compared, the latest first."""

_CLASSES = (0, 1, 2, 3, 4, 6, 9, 16)
"""Match lengths with an acceptance rate of their own; others count as the next lower one."""

_CLASS_OF = tuple(max(i for i, length in enumerate(_CLASSES) if length <= n) for n in range(MAX_MATCH + 1))

_WEIGHT, _MEMORY = 3.0, 24.0
"""Tokens that a prior counts for, and tokens that are remembered."""

_WINDOW = 512
"""Tokens around the last position of a prediction in which it is resumed."""

_SKIPPED = 8
"""The most tokens of a prediction that the text leaves out before a single equal token resumes it."""


class AcceptanceByMatch:
    """Running estimates of the probability that a copied token is right, by the length of the match before it.

    Args:
        priors: one for each of the classes of match lengths.
    """

    def __init__(self, priors: Sequence[float]) -> None:
        self._rates = list(priors)
        self._seen = [_WEIGHT] * len(priors)

    def observe(self, length: int, hit: bool) -> None:
        """Count one copied token."""
        index = _CLASS_OF[min(length, MAX_MATCH)]
        self._seen[index] = min(self._seen[index] + 1, _MEMORY)
        self._rates[index] += (hit - self._rates[index]) / self._seen[index]

    def along(self, length: int) -> Iterator[float]:
        """The probabilities that the first, the first two, … tokens after a match of some length are right."""
        return accumulate((self._rates[_CLASS_OF[min(n, MAX_MATCH)]] for n in _lengths(length)), mul)


def _lengths(start: int) -> Iterator[int]:
    return chain(range(start, MAX_MATCH), iter(lambda: MAX_MATCH, None))


class Source(ABC):
    """Tokens that may continue a text, with a pointer into them.

    Attributes:
        tokens: of the source.
        position: of the token that is expected next; -1 if none is.
        length: how many tokens before it equal the last ones of the text.
    """

    priors: ClassVar[tuple[float, ...]]

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens = tokens
        self.position, self.length = -1, 0
        self._acceptance = AcceptanceByMatch(self.priors)

    def follow(self, text: list[int], end: int) -> None:
        """Take the token ``text[end]``, which the text has now."""
        if self.points:
            hit = self.tokens[self.position] == text[end]
            self._acceptance.observe(self.length, hit)
            if hit:
                self.position, self.length = self.position + 1, self.length + 1
                return
        self.resume(text, end)

    def start(self, text: list[int], end: int) -> None:
        """Point for the first time, after a prompt that ends with ``text[end]``."""
        self.resume(text, end)

    @abstractmethod
    def resume(self, text: list[int], end: int) -> None:
        """Point anew, after a token that was not expected."""

    @property
    def points(self) -> bool:
        """Whether a token is expected."""
        return 0 <= self.position < len(self.tokens)

    def continuation(self, text: list[int], most: int) -> list[int]:
        """At most ``most`` expected tokens."""
        return list(self.tokens[self.position : self.position + most])

    def acceptance(self, most: int) -> list[float]:
        """For each token of `continuation`, the probability that it and those before it are right."""
        count = min(most, len(self.tokens) - self.position)
        return list(islice(self._acceptance.along(self.length), count))


class TextSource(Source):
    """The text itself (prompt look-up, Saxena 2023): the longest match of the last tokens, the latest one first."""

    priors = (0.0, 0.1, 0.25, 0.4, 0.55, 0.7, 0.8, 0.9)

    def __init__(self) -> None:
        super().__init__(())
        self._pairs: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        self._single: defaultdict[int, list[int]] = defaultdict(list)

    def add(self, text: list[int], end: int) -> None:
        """Index the tokens that end at ``end``."""
        self._single[text[end]].append(end)
        if end:
            self._pairs[text[end - 1], text[end]].append(end)

    def follow(self, text: list[int], end: int) -> None:
        """See `Source.follow`."""
        self.tokens = text
        super().follow(text, end)
        self.add(text, end)

    def resume(self, text: list[int], end: int) -> None:
        """See `Source.resume`."""
        self.tokens = text
        best = self.occurrences(text, end)[:1]
        self.length, self.position = best[0] if best else (0, -1)

    def occurrences(self, text: list[int], end: int) -> list[tuple[int, int]]:
        """Match length and following position of earlier occurrences of ``text[: end + 1]``'s end, the best first."""
        pairs = self._pairs.get((text[end - 1], text[end]), ()) if end else ()
        found = [(match_length(text, before, text, end), before + 1) for before in _latest(pairs, end)]
        if len(found) < MAX_OCCURRENCES:
            known = {position for _, position in found}
            single = (before + 1 for before in _latest(self._single.get(text[end], ()), end))
            found += [(1, position) for position in single if position not in known][: MAX_OCCURRENCES - len(found)]
        return sorted(found, reverse=True)

    def continuation(self, text: list[int], most: int) -> list[int]:
        """See `Source.continuation`. A match that reaches the end of the text repeats."""
        tokens = text[self.position : self.position + most]
        while len(tokens) < most:
            tokens.append(tokens[len(tokens) + self.position - len(text)])
        return tokens

    def acceptance(self, most: int) -> list[float]:
        """See `Source.acceptance`."""
        return list(islice(self._acceptance.along(self.length), most))


class PredictionSource(Source):
    """A text that the answer is expected to resemble. It is followed by position; after a difference it is resumed.

    Args:
        tokens: of the prediction.
    """

    priors = (0.6, 0.75, 0.8, 0.85, 0.9, 0.9, 0.95, 0.95)

    def start(self, text: list[int], end: int) -> None:
        """See `Source.start`: the answer is expected to begin as the prediction does."""
        self.position = 0

    def resume(self, text: list[int], end: int) -> None:
        """See `Source.resume`: after the last two tokens, if they are near; else one token is taken as replaced."""
        last, before = text[end], text[end - 1]
        start = max(0, self.position - _WINDOW)
        near = self.tokens[start : self.position + _WINDOW]
        after = [start + i + 1 for i in _indices(near, last) if i and near[i - 1] == before]
        if after:
            self.position, self.length = min(after, key=lambda place: abs(place - self.position)), 2
            return
        # The token may also be one that follows soon: then those between are left out.
        skipped = next(iter(_indices(self.tokens[self.position : self.position + _SKIPPED], last)), 0)
        self.position, self.length = min(self.position + skipped + 1, len(self.tokens)), 0


def _indices(tokens: Sequence[int], token: int) -> list[int]:
    """The indices of a token."""
    found, index = [], -1
    for _ in range(tokens.count(token)):
        index = tokens.index(token, index + 1)
        found.append(index)
    return found


def _latest(ends: Sequence[int], before: int) -> list[int]:
    """The latest of ascending positions, the last first, without ``before`` itself."""
    latest = ends[-MAX_OCCURRENCES - 1 :]
    return [end for end in reversed(latest) if end != before][:MAX_OCCURRENCES]


def match_length(tokens: Sequence[int], end: int, text: Sequence[int], text_end: int) -> int:
    """How many tokens up to ``tokens[end]`` equal those up to ``text[text_end]``; at most `MAX_MATCH`."""
    most = min(MAX_MATCH, end + 1, text_end + 1)
    return next((n for n in range(most) if tokens[end - n] != text[text_end - n]), most)


class LookUp:
    """The sources of one sequence.

    Args:
        prompt: the first tokens of the text; they are searched, and say nothing about acceptance.
        others: sources besides the text itself.
    """

    def __init__(self, prompt: list[int], others: Sequence[Source] = ()) -> None:
        self.text = TextSource()
        self.sources: tuple[Source, ...] = (*others, self.text)
        self._prompt = len(prompt)
        self._read = 0

    def update(self, text: list[int]) -> None:
        """Follow the new tokens of a text."""
        if not self._read:
            self._read = self._prompt
            for end in range(self._prompt):
                self.text.add(text, end)
            for source in self.sources:
                source.start(text, self._prompt - 1)
        for end in range(self._read, len(text)):
            for source in self.sources:
                source.follow(text, end)
        self._read = len(text)

    def best(self, most: int) -> tuple[Source | None, list[float]]:
        """The source that is expected to be right longest, and its `Source.acceptance`."""
        rates = [(source, source.acceptance(most)) for source in self.sources if source.points]
        return max(rates, key=lambda each: sum(each[1]), default=(None, []))

    def continuations(self, text: list[int], depth: int, width: int) -> list[list[int]]:
        """Continuations of the text, the best first.

        Args:
            text: as in the last `update`.
            depth: the most tokens of one.
            width: with 1, only the best is wanted.
        """
        source, _ = self.best(depth)
        if source is None or not depth:
            return []
        found = [source.continuation(text, depth)]
        if width > 1:
            found += [text[position : position + depth] for _, position in self.text.occurrences(text, len(text) - 1)]
        return found
