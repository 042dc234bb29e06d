"""Every outcome of the random decisions of the shipping code, with its probability, in float64.

A judgement asks for random numbers through the three verbs of `mcsd.rng.Randomness` only. `Enumerated` answers them
from a script; where the script ends it takes the first outcome that is possible and notes the others, each of which is
a script for the next round. When no round has anything left to note, the probabilities of all scripts add up to 1 and
their tokens to the exact law.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

PORTION = 4096
"""Scripts that run in one batch."""


@dataclass
class Book:
    """The decisions of some runs, one a script.

    Attributes:
        script: int64 ``[R, D]``, outcomes to take, padded with -1.
        length: int64 ``[R]``, of each script.
        taken: int64 ``[R, ...]``, the outcomes taken so far.
        used: int64 ``[R]``, how many.
        chance: float64 ``[R]``, the product of their probabilities.
    """

    script: Tensor
    length: Tensor
    taken: Tensor = field(init=False)
    used: Tensor = field(init=False)
    chance: Tensor = field(init=False)
    _others: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        runs = len(self.script)
        self.taken = torch.zeros(runs, 64, dtype=torch.int64)
        self.used = torch.zeros(runs, dtype=torch.int64)
        self.chance = torch.ones(runs, dtype=torch.float64)

    def decide(self, runs: Tensor, weights: Tensor) -> Tensor:
        """One decision of some runs: int64 ``[A]``. ``weights [A, O]``: the outcomes' chances, up to a factor."""
        if not len(runs):
            return runs
        place = self.used[runs]
        width = max(self.script.shape[1], 1)
        scripted = place < self.length[runs]
        possible = weights > 0
        told = torch.nn.functional.pad(self.script, (0, 1))[runs, place.clamp(max=width - 1)]
        taken = torch.where(scripted, told, possible.to(torch.int8).argmax(-1))
        chance = weights.double() / weights.double().sum(-1, keepdim=True)
        self.chance[runs] *= chance.gather(1, taken[:, None])[:, 0]
        if int(place.max()) >= self.taken.shape[1]:
            self.taken = torch.nn.functional.pad(self.taken, (0, self.taken.shape[1]))
        self.taken[runs, place] = taken
        self.used[runs] = place + 1
        others = possible & (torch.arange(weights.shape[1]) > taken[:, None]) & ~scripted[:, None]
        which, outcome = others.nonzero(as_tuple=True)
        if len(which):
            self._others.append((runs[which], place[which], outcome))
        return taken

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scripts of the outcomes not taken: the runs they come from ``[N]``, themselves ``[N, D]``, their lengths."""
        if not self._others:
            none = torch.zeros(0, dtype=torch.int64)
            return none, none[:, None], none
        run, place, outcome = (torch.cat(parts) for parts in zip(*self._others, strict=True))
        length = place + 1
        script = self.taken[run, : int(length.max())]
        script = script.where(torch.arange(script.shape[1]) < place[:, None], -1).scatter(
            1, place[:, None], outcome[:, None]
        )
        return run, script, length


class Enumerated:
    """A `Randomness` that takes its outcomes from a book; ``seeds [B]`` name the run of each row of the batch."""

    def __init__(self, book: Book, seeds: Tensor) -> None:
        self._book, self._seeds = book, seeds

    def _runs(self, rows: Tensor | None) -> Tensor:
        return self._seeds if rows is None else self._seeds[rows]

    def sample(self, weights: Tensor, count: int, rows: Tensor | None = None) -> Tensor:
        runs, (a, n, _) = self._runs(rows), weights.shape
        picks = [self._book.decide(runs, weights[:, i]) for i in range(n) for _ in range(count)]
        return torch.stack(picks, dim=1).view(a, n, count) if picks else torch.zeros(a, n, count, dtype=torch.int64)

    def sample_without_replacement(self, weights: Tensor, count: int, rows: Tensor | None = None) -> Tensor:
        runs, (a, n, _) = self._runs(rows), weights.shape
        out = torch.full((a, n, count), -1)
        for i in range(n):
            left = weights[:, i].clone()
            for j in range(count):
                some = (left.sum(-1) > 0).nonzero()[:, 0]
                pick = self._book.decide(runs[some], left[some])
                out[some, i, j] = pick
                left[some] = left[some].scatter(1, pick[:, None], 0.0)
        return out

    def accept(self, probability: Tensor, rows: Tensor | None = None) -> Tensor:
        yes = probability.clamp(0, 1)
        return self._book.decide(self._runs(rows), torch.stack([1 - yes, yes], dim=1)) == 1


def enumerate_all(
    starts: int, run: Callable[[Book, Tensor], list[list[int]]]
) -> Iterator[tuple[Tensor, list[list[int]], Tensor]]:
    """All outcomes of all starts.

    Args:
        starts: how many things are enumerated side by side.
        run: with a book, and int64 ``[R]``, the start of each of its runs: the tokens that each emits.

    Yields:
        For a portion of the outcomes: the start of each ``[R]``, its tokens, its probability ``[R]``.
    """
    waiting = [
        (torch.arange(starts), torch.zeros(starts, 0, dtype=torch.int64), torch.zeros(starts, dtype=torch.int64))
    ]
    while waiting:
        start, script, length = waiting.pop()
        for begin in range(0, len(start), PORTION):
            part = slice(begin, begin + PORTION)
            book = Book(script[part], length[part])
            emitted = run(book, start[part])
            yield start[part], emitted, book.chance
            origin, more, lengths = book.next()
            if len(origin):
                waiting.append((start[part][origin], more, lengths))
