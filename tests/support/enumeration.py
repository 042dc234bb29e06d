"""Enumeration of every outcome of the random decisions of the shipped code, with its probability, in float64.

Schemes draw random numbers through the methods of `mcsd.rng.Randomness` only. `Enumerated` takes outcomes from a
script. Where the script ends it takes the first possible outcome and records the others, each of which is a script of
the next round. When a round records nothing more, the probabilities of all scripts sum to 1 and their tokens have the
exact distribution.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

MAX_SCRIPTS = 4096
"""Scripts that run in one batch."""


@dataclass
class Decisions:
    """The decisions of some runs, one for each script.

    Attributes:
        script: int64 ``[R, D]``, outcomes to take, padded with -1.
        length: int64 ``[R]``, of each script.
        taken: int64 ``[R, ...]``, the outcomes taken so far.
        used: int64 ``[R]``, how many.
        probability: float64 ``[R]``, the product of their probabilities.
    """

    script: Tensor
    length: Tensor
    taken: Tensor = field(init=False)
    used: Tensor = field(init=False)
    probability: Tensor = field(init=False)
    _others: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def __post_init__(self) -> None:
        runs = len(self.script)
        self.taken = torch.zeros(runs, 64, dtype=torch.int64)
        self.used = torch.zeros(runs, dtype=torch.int64)
        self.probability = torch.ones(runs, dtype=torch.float64)

    def decide(self, runs: Tensor, weights: Tensor) -> Tensor:
        """One decision of some runs: int64 ``[A]``. ``weights [A, O]``: unnormalised probabilities of the outcomes.

        Runs without a script, beyond the last one, take the first possible outcome: other sequences of a batch.
        """
        if not len(runs):
            return runs
        own = runs < len(self.script)
        if not own.all():
            taken = (weights > 0).to(torch.int8).argmax(-1)
            taken[own] = self.decide(runs[own], weights[own])
            return taken
        index = self.used[runs]
        width = max(self.script.shape[1], 1)
        scripted = index < self.length[runs]
        possible = weights > 0
        from_script = torch.nn.functional.pad(self.script, (0, 1))[runs, index.clamp(max=width - 1)]
        taken = torch.where(scripted, from_script, possible.to(torch.int8).argmax(-1))
        probability = weights.double() / weights.double().sum(-1, keepdim=True)
        self.probability[runs] *= probability.gather(1, taken[:, None])[:, 0]
        if int(index.max()) >= self.taken.shape[1]:
            self.taken = torch.nn.functional.pad(self.taken, (0, self.taken.shape[1]))
        self.taken[runs, index] = taken
        self.used[runs] = index + 1
        others = possible & (torch.arange(weights.shape[1]) > taken[:, None]) & ~scripted[:, None]
        which, outcome = others.nonzero(as_tuple=True)
        if len(which):
            self._others.append((runs[which], index[which], outcome))
        return taken

    def next(self) -> tuple[Tensor, Tensor, Tensor]:
        """Scripts of the outcomes not taken: their runs ``[N]``, the scripts ``[N, D]``, their lengths ``[N]``."""
        if not self._others:
            none = torch.zeros(0, dtype=torch.int64)
            return none, none[:, None], none
        run, index, outcome = (torch.cat(parts) for parts in zip(*self._others, strict=True))
        length = index + 1
        script = self.taken[run, : int(length.max())]
        script = script.where(torch.arange(script.shape[1]) < index[:, None], -1).scatter(
            1, index[:, None], outcome[:, None]
        )
        return run, script, length


class Enumerated:
    """A `Randomness` that takes its outcomes from `Decisions`; ``seeds [B]`` is the run of each sequence."""

    def __init__(self, decisions: Decisions, seeds: Tensor) -> None:
        self._decisions, self._seeds = decisions, seeds

    def _runs(self, sequences: Tensor | None) -> Tensor:
        return self._seeds if sequences is None else self._seeds[sequences]

    def sample(self, weights: Tensor, count: int, sequences: Tensor | None = None) -> Tensor:
        runs, (a, n, _) = self._runs(sequences), weights.shape
        picks = [self._decisions.decide(runs, weights[:, i]) for i in range(n) for _ in range(count)]
        return torch.stack(picks, dim=1).view(a, n, count) if picks else torch.zeros(a, n, count, dtype=torch.int64)

    def sample_without_replacement(self, weights: Tensor, count: int, sequences: Tensor | None = None) -> Tensor:
        runs, (a, n, _) = self._runs(sequences), weights.shape
        out = torch.full((a, n, count), -1)
        for i in range(n):
            remaining = weights[:, i].clone()
            for j in range(count):
                some = (remaining.sum(-1) > 0).nonzero()[:, 0]
                pick = self._decisions.decide(runs[some], remaining[some])
                out[some, i, j] = pick
                remaining[some] = remaining[some].scatter(1, pick[:, None], 0.0)
        return out

    @property
    def beside(self) -> "Enumerated":
        return self

    @property
    def again(self) -> "Enumerated":
        return self

    def accept(self, probability: Tensor, sequences: Tensor | None = None) -> Tensor:
        accepted = probability.clamp(0, 1)
        return self._decisions.decide(self._runs(sequences), torch.stack([1 - accepted, accepted], dim=1)) == 1


def enumerate_all(
    starts: int, run: Callable[[Decisions, Tensor], list[list[int]]]
) -> Iterator[tuple[Tensor, list[list[int]], Tensor]]:
    """All outcomes of all starts.

    Args:
        starts: number of cases that are enumerated together.
        run: given the decisions, and int64 ``[R]``, the start of each run: returns the tokens that each emits.

    Yields:
        For a batch of the outcomes: the start of each ``[R]``, its tokens, its probability ``[R]``.
    """
    pending = [
        (torch.arange(starts), torch.zeros(starts, 0, dtype=torch.int64), torch.zeros(starts, dtype=torch.int64))
    ]
    total = 0.0
    while pending:
        start, script, length = pending.pop()
        for begin in range(0, len(start), MAX_SCRIPTS):
            part = slice(begin, begin + MAX_SCRIPTS)
            decisions = Decisions(script[part], length[part])
            emitted = run(decisions, start[part])
            total += float(decisions.probability.sum())
            # Decisions that do not reach their run would be enumerated without end.
            assert total <= starts + 1e-6, "the outcomes have more than all probability"
            yield start[part], emitted, decisions.probability
            origin, more, lengths = decisions.next()
            if len(origin):
                pending.append((start[part][origin], more, lengths))
