"""Random numbers that belong to a request, not to a batch.

Each number is a pure function of (seed, stream, position in the text, how many numbers this step has used): the
counter-based generator Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). So
a request draws the same numbers alone, in a batch, and after other rows come and go, and a whole batch is one
vectorised computation.

Schemes reach randomness through the three verbs of `Randomness` only, which is what lets a test put an
enumeration of all outcomes in its place.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = torch.tensor([0xD2511F53, 0xCD9E8D57])
_WEYL = torch.tensor([0x9E3779B9, 0xBB67AE85])
_ROUNDS = 10
_BLOCK = 16
"""Numbers that are made at a time."""

_LARGE, _PART = 4096, 64
"""Of so many tokens and more, a part is drawn first."""

_TOGETHER = 128
"""Positions whose numbers are made together, those of all rows counted."""

DRAW, JUDGE = 0, 1
"""The two streams of a request: noise that chose a candidate must never judge it."""


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10, vectorised.

    Args:
        counter: int64 ``[..., 4]`` holding 32-bit words; key: ``[..., 2]``.

    Returns:
        int64 ``[..., 4]``, words of 32 random bits.
    """
    device = counter.device
    weyl = torch.arange(_ROUNDS, device=device)[:, None] * _WEYL.to(device)
    keys = ((key[..., None, :] + weyl) & _MASK).unbind(-2)
    multipliers = _MULTIPLIERS.to(device)
    even, odd = counter[..., 0::2], counter[..., 1::2]
    for round_key in keys:
        # The products wrap around in int64; their 64 bits are right all the same, and the masks take them apart.
        product = even * multipliers
        even = ((product >> 32) & _MASK).flip(-1) ^ odd ^ round_key
        odd = (product & _MASK).flip(-1)
    return torch.stack([even, odd], dim=-1).flatten(-2)


def numbers(seeds: Tensor, positions: Tensor, stream: int, first: int, count: int) -> Tensor:
    """Numbers of some positions.

    Args:
        seeds: int64 ``[B]``; positions: ``[B, P]``.
        stream: `DRAW` or `JUDGE`.
        first: how many numbers of each position are left out, an even number.
        count: how many are wanted, rounded up to an even number.

    Returns:
        float64 ``[B, P, count]`` in (0, 1), 48 bits each.
    """
    # A block makes two numbers. The sequence is the same in whatever portions it is asked for.
    blocks = (count + 1) // 2
    counter = positions.new_zeros(*positions.shape, blocks, 4)
    counter[..., 0] = torch.arange(first // 2, first // 2 + blocks, device=counter.device)
    counter[..., 2] = positions[..., None]
    counter[..., 3] = stream
    key = torch.stack([seeds & _MASK, (seeds >> 32) & _MASK], dim=-1)[:, None, None]
    words = philox(counter, key)
    # 48 bits, so that u·total is always below total after rounding and inversion never runs off the end.
    bits = (words[..., 0::2] << 16) ^ (words[..., 1::2] >> 16)
    return (bits.to(torch.float64).flatten(-2) + 0.5) * 2.0**-48


class Randomness(Protocol):
    """The one door through which a scheme's decisions pass. ``rows`` says whose numbers to use, ``None`` for all."""

    def sample(self, weights: Tensor, count: int, rows: Tensor | None = None) -> Tensor:
        """Independent draws with probability proportional to ``weights``.

        Args:
            weights: ``[A, N, S]`` non-negative, N distributions for each of A rows, at least one entry positive.
            count: draws from each distribution.
            rows: int64 ``[A]``, the batch rows these are.

        Returns:
            int64 ``[A, N, count]`` indices into S.
        """
        ...

    def sample_without_replacement(self, weights: Tensor, count: int, rows: Tensor | None = None) -> Tensor:
        """As `sample`, each draw leaving out the ones before it. -1 where the support is used up.

        The indices come in draw order: the law is that of drawing one after the other and renormalising.
        """
        ...

    def accept(self, probability: Tensor, rows: Tensor | None = None) -> Tensor:
        """One yes-or-no decision a row: bool ``[A]``, true with ``probability [A]`` (1 and above always)."""
        ...


class Stream:
    """A `Randomness` for one step of a batch, made of each row's own numbers.

    Args:
        seeds: int64 ``[B]``, the requests' seeds (64 bits).
        positions: int64 ``[B]``, tokens each request has emitted: different at each of its steps.
        stream: `DRAW` or `JUDGE`.
        begin: gives the first numbers, float64 ``[B, n]``, when they are needed, if somebody has them.
    """

    def __init__(
        self, seeds: Tensor, positions: Tensor, stream: int, begin: Callable[[], Tensor] | None = None
    ) -> None:
        self._seeds = seeds
        self._positions = positions
        self._stream = stream
        self._begin = begin
        self._numbers = seeds.new_empty(len(seeds), 0, dtype=torch.float64)
        self._used = 0

    def uniform(self, count: int, rows: Tensor | None = None) -> Tensor:
        """float64 ``[A, count]`` in (0, 1), 48 bits each. Every row moves on by ``count``, chosen or not.

        Moving all rows is what keeps a row's numbers independent of which other rows are still being judged.
        """
        if self._begin:
            self._numbers, self._begin = self._begin(), None
        made = self._numbers.shape[1]
        missing = self._used + count - made
        if missing > 0:
            more = numbers(self._seeds, self._positions[:, None], self._stream, made, max(missing, _BLOCK))
            self._numbers = torch.cat([self._numbers, more[:, 0]], dim=1)
        drawn = self._numbers.narrow(1, self._used, count)
        self._used += count
        return drawn if rows is None or len(rows) == len(drawn) == 1 else drawn[rows]

    def sample(self, weights: Tensor, count: int, rows: Tensor | None = None) -> Tensor:
        """By inversion, in float64 so that no token of a large vocabulary falls between two sums."""
        a, n, size = weights.shape
        if not a:
            self.uniform(n * count)
            return weights.new_empty(0, n, count, dtype=torch.int64)
        u = self.uniform(n * count, rows).view(a, n, count)
        return _inverted(weights, u) if size % _PART or size < _LARGE else _inverted_by_parts(weights, u)

    def sample_without_replacement(self, weights: Tensor, count: int, rows: Tensor | None = None) -> Tensor:
        """One `sample` after the other, each token that was drawn left out: a number for each draw."""
        size = weights.shape[-1]
        left = weights.to(torch.float64)
        drawn: list[Tensor] = []
        for number in range(count):
            if number:
                left = left.scatter(2, drawn[-1].clamp(min=0), 0.0)
            # Where nothing is left all sums are 0, and the index runs off the end.
            pick = _inverted(left, self.uniform(left.shape[1], rows).view(*left.shape[:2], 1))
            drawn.append(pick.masked_fill(pick == size, -1))
        return torch.cat(drawn, dim=-1)

    def accept(self, probability: Tensor, rows: Tensor | None = None) -> Tensor:
        """A uniform number below the probability."""
        return self.uniform(1, rows)[:, 0] < probability


def _inverted(weights: Tensor, u: Tensor) -> Tensor:
    """For each number ``u [A, N, count]`` in (0, 1) the first index up to which ``weights [A, N, S]`` have that share.

    A token of weight 0 adds nothing and is never the first. Where all are 0 the index is S.
    """
    cumulative = weights.to(torch.float64).cumsum(-1)
    return torch.searchsorted(cumulative, u * cumulative[..., -1:], right=True)


def _inverted_by_parts(weights: Tensor, u: Tensor) -> Tensor:
    """`_inverted` where not all are 0: first a part of a large vocabulary is found, then a place in it."""
    parts = weights.reshape(*weights.shape[:2], -1, _PART)
    cumulative = parts.sum(-1, dtype=torch.float64).cumsum(-1)
    wanted = u * cumulative[..., -1:]
    part = torch.searchsorted(cumulative, wanted, right=True)
    here = parts.take_along_dim(part[..., None], dim=2).to(torch.float64).cumsum(-1)
    before = torch.nn.functional.pad(cumulative, (1, 0)).gather(-1, part)
    # Rounded otherwise than the sum of the parts: it must stay below the sum of this one.
    within = ((wanted - before)[..., None] / here[..., -1:]).clamp(max=1 - 2**-52)
    return part * _PART + torch.searchsorted(here, within * here[..., -1:], right=True)[..., 0]


class Streams:
    """Each step's `Stream`. First numbers are made for many steps at once, which takes little longer than for one.

    Args:
        seeds: int64 ``[B]``, as for `Stream`.
    """

    def __init__(self, seeds: Tensor) -> None:
        self._seeds = seeds
        self._each = torch.arange(len(seeds), device=seeds.device)
        self._steps = torch.arange(max(1, _TOGETHER // max(1, len(seeds))), device=seeds.device)
        self._first: list[int] = []
        self._made: dict[int, Tensor] = {}

    def at(self, positions: Sequence[int], stream: int) -> Stream:
        """The stream of a step; see `Stream`."""
        here = torch.tensor(positions, dtype=torch.int64, device=self._seeds.device)

        def begin() -> Tensor:
            far = [now - first for now, first in zip(positions, self._first, strict=False)]
            if len(far) < len(positions) or not all(0 <= place < len(self._steps) for place in far):
                self._first, self._made, far = list(positions), {}, [0] * len(positions)
            if stream not in self._made:
                first = torch.tensor(self._first, dtype=torch.int64, device=here.device)
                self._made[stream] = numbers(self._seeds, first[:, None] + self._steps, stream, 0, _BLOCK)
            made = self._made[stream]
            if len(far) == 1:
                return made[:, far[0]]
            return made[self._each, torch.tensor(far, dtype=torch.int64, device=here.device)]

        return Stream(self._seeds, here, stream, begin)
