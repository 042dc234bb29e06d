"""Random numbers that belong to a request, not to a batch.

Each number is a pure function of (seed, stream, position in the text, index within the step): the counter-based
generator Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). So a request draws the
same numbers alone, in any batch, and after other sequences come and go. A whole batch is one vectorised computation.

Schemes draw random numbers through the methods of `Randomness` only, so a test can replace it by an enumeration
of all outcomes.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import Protocol

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_PREFETCH = 64
"""Numbers that are generated at a time: at least those of a step with a common tree."""

_CHUNKED_VOCABULARY, _CHUNK = 4096, 64
"""From this many weights on, a chunk of them is sampled first and then an entry of the chunk."""

_MAX_POSITIONS = 128
"""Positions whose numbers are generated in one call, summed over the sequences of a batch."""

_BESIDE = 2
"""From a stream to the one beside it."""

DRAW, VERIFY, SAMPLE = 0, 1, 4
"""The streams of a request. The noise that drew a candidate must never verify it, so drawing and verification have one
each. `SAMPLE` is for verification that takes one number a token, at most: the i-th number of a step is the first one of
`VERIFY` i positions later. So a number belongs to a token of the text, whatever the steps in which it was generated.
2 and 3 are the streams beside `DRAW` and `VERIFY`."""


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10, vectorised.

    Args:
        counter: int64 ``[..., 4]`` holding 32-bit words; key: ``[..., 2]``.

    Returns:
        int64 ``[..., 4]``, words of 32 random bits.
    """
    multipliers, weyl = _constants(counter.device)
    keys = ((key[..., None, :] + weyl) & _MASK).unbind(-2)
    even, odd = counter[..., 0::2], counter[..., 1::2]
    for round_key in keys:
        # The products may wrap around in int64. Their 64 bits are still right, and the masks split them.
        product = even * multipliers
        even = ((product >> 32) & _MASK).flip(-1) ^ odd ^ round_key
        odd = (product & _MASK).flip(-1)
    return torch.stack([even, odd], dim=-1).flatten(-2)


@lru_cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """The multipliers ``[2]``, and what is added to the key in each round, ``[rounds, 2]``."""
    multipliers, weyl = torch.tensor([_MULTIPLIERS, _WEYL], device=device)
    return multipliers, torch.arange(_ROUNDS, device=device)[:, None] * weyl


def uniforms(seeds: Tensor, positions: Tensor, stream: int, first: int, count: int) -> Tensor:
    """Uniform random numbers at some positions.

    Args:
        seeds: int64 ``[B]``; positions: ``[B, P]``.
        stream: `DRAW` or `VERIFY`.
        first: index of the first number at each position, even.
        count: how many numbers, rounded up to an even number.

    Returns:
        float64 ``[B, P, count]`` in (0, 1), 48 bits each.
    """
    # A block of Philox gives two numbers. The numbers do not depend on the portions they are generated in.
    blocks = (count + 1) // 2
    counter = positions.new_zeros(*positions.shape, blocks, 4)
    counter[..., 0] = torch.arange(first // 2, first // 2 + blocks, device=counter.device)
    counter[..., 2] = positions[..., None]
    counter[..., 3] = stream
    key = torch.stack([seeds & _MASK, (seeds >> 32) & _MASK], dim=-1)[:, None, None]
    words = philox(counter, key)
    # 48 bits, so that u·total stays below total after rounding and the inverse CDF never runs off the end.
    bits = (words[..., 0::2] << 16) ^ (words[..., 1::2] >> 16)
    return (bits.to(torch.float64).flatten(-2) + 0.5) * 2.0**-48


def _numbers_of_step(seeds: Tensor, positions: Tensor, stream: int, first: int, count: int) -> Tensor:
    """float64 ``[B, count or more]``: `uniforms` of a step at ``positions [B]``, of any stream."""
    if stream != SAMPLE:
        return uniforms(seeds, positions[:, None], stream, first, count)[:, 0]
    offsets = torch.arange(first, first + count, device=positions.device)
    return uniforms(seeds, positions[:, None] + offsets, VERIFY, 0, 1)[..., 0]


class Randomness(Protocol):
    """All random decisions of a scheme. ``sequences`` says whose numbers to use, ``None`` for all of the batch."""

    def sample(self, weights: Tensor, count: int, sequences: Tensor | None = None) -> Tensor:
        """Independent draws with probability proportional to ``weights``.

        Args:
            weights: ``[A, N, S]`` non-negative, N distributions for each of A sequences, at least one entry positive.
            count: draws from each distribution.
            sequences: int64 ``[A]``, their indices in the batch.

        Returns:
            int64 ``[A, N, count]`` indices into S.
        """
        ...

    def sample_without_replacement(self, weights: Tensor, count: int, sequences: Tensor | None = None) -> Tensor:
        """As `sample`, each draw excluding the ones before it; -1 where the support is exhausted.

        The indices come in draw order: their distribution is that of drawing one after the other and renormalising.
        """
        ...

    def accept(self, probability: Tensor, sequences: Tensor | None = None) -> Tensor:
        """One Bernoulli draw a sequence: bool ``[A]``, true with ``probability [A]`` (1 and above: always)."""
        ...

    @property
    def beside(self) -> "Randomness":
        """Further numbers, independent of these: drawing them leaves the next ones of this stream as they are."""
        ...

    @property
    def again(self) -> "Randomness":
        """The numbers of this stream from its start, for sequences whose decisions so far are dropped."""
        ...


class PhiloxStream:
    """A `Randomness` for one step of a batch, from each sequence's own numbers.

    Args:
        seeds: int64 ``[B]``, the requests' seeds (64 bits).
        positions: int64 ``[B]``, tokens each request has emitted: different at each of its steps.
        stream: `DRAW`, `VERIFY` or `SAMPLE`.
        prefetched: gives the first numbers, float64 ``[B, n]``; called when they are first needed.
    """

    def __init__(
        self, seeds: Tensor, positions: Tensor, stream: int, prefetched: Callable[[], Tensor] | None = None
    ) -> None:
        self._seeds = seeds
        self._positions = positions
        self._stream = stream
        self._prefetched = prefetched
        self._numbers = seeds.new_empty(len(seeds), 0, dtype=torch.float64)
        self._used = 0

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Seeds, positions and the first numbers."""
        if self._prefetched:
            self._numbers, self._prefetched = self._prefetched(), None
        return self._seeds, self._positions, self._numbers

    def with_tensors(self, tensors: Sequence[Tensor]) -> "PhiloxStream":
        """The stream of another step, from its start, with other `tensors`."""
        seeds, positions, numbers = tensors
        return PhiloxStream(seeds, positions, self._stream, lambda: numbers)

    def uniform(self, count: int, sequences: Tensor | None = None) -> Tensor:
        """float64 ``[A, count]`` in (0, 1), 48 bits each. Every sequence advances by ``count``, selected or not.

        So the numbers of a sequence do not depend on which other sequences are still being verified.
        """
        if self._prefetched:
            self._numbers, self._prefetched = self._prefetched(), None
        generated = self._numbers.shape[1]
        missing = self._used + count - generated
        if missing > 0:
            count_more = max(missing, _PREFETCH)
            more = _numbers_of_step(self._seeds, self._positions, self._stream, generated, count_more)
            self._numbers = torch.cat([self._numbers, more], dim=1)
        drawn = self._numbers.narrow(1, self._used, count)
        self._used += count
        return drawn if sequences is None or len(sequences) == len(drawn) == 1 else drawn[sequences]

    def sample(self, weights: Tensor, count: int, sequences: Tensor | None = None) -> Tensor:
        """See `Randomness.sample`. By inverse CDF, in float64 so that sums of a large vocabulary stay distinct."""
        a, n, size = weights.shape
        if not a:
            self.uniform(n * count)
            return weights.new_empty(0, n, count, dtype=torch.int64)
        u = self.uniform(n * count, sequences).view(a, n, count)
        chunked = size >= _CHUNKED_VOCABULARY and not size % _CHUNK
        return _inverse_cdf_chunked(weights, u) if chunked else _inverse_cdf(weights, u)

    def sample_without_replacement(self, weights: Tensor, count: int, sequences: Tensor | None = None) -> Tensor:
        """See `Randomness.sample_without_replacement`. One number a draw; drawn entries get weight 0."""
        size = weights.shape[-1]
        remaining = weights.to(torch.float64)
        drawn: list[Tensor] = []
        for number in range(count):
            if number:
                remaining = remaining.scatter(2, drawn[-1].clamp(min=0), 0.0)
            # Where no weight remains all sums are 0, and the index runs off the end.
            index = _inverse_cdf(remaining, self.uniform(remaining.shape[1], sequences).view(*remaining.shape[:2], 1))
            drawn.append(index.masked_fill(index == size, -1))
        return torch.cat(drawn, dim=-1)

    def accept(self, probability: Tensor, sequences: Tensor | None = None) -> Tensor:
        """See `Randomness.accept`."""
        return self.uniform(1, sequences)[:, 0] < probability

    @cached_property
    def beside(self) -> "PhiloxStream":
        """See `Randomness.beside`."""
        return PhiloxStream(self._seeds, self._positions, self._stream + _BESIDE)

    @property
    def again(self) -> "PhiloxStream":
        """See `Randomness.again`."""
        return self.with_tensors(self.tensors)


def _inverse_cdf(weights: Tensor, u: Tensor) -> Tensor:
    """For each ``u [A, N, count]`` in (0, 1) the first index of ``weights [A, N, S]`` whose cumulative share exceeds u.

    An entry of weight 0 is never chosen. Where all are 0 the index is S.
    """
    cumulative = weights.to(torch.float64).cumsum(-1)
    return torch.searchsorted(cumulative, u * cumulative[..., -1:], right=True)


def _inverse_cdf_chunked(weights: Tensor, u: Tensor) -> Tensor:
    """`_inverse_cdf` where not all weights are 0: first the chunk of a large vocabulary, then the entry in it."""
    chunks = weights.reshape(*weights.shape[:2], -1, _CHUNK)
    cumulative = chunks.sum(-1, dtype=torch.float64).cumsum(-1)
    wanted = u * cumulative[..., -1:]
    chunk = torch.searchsorted(cumulative, wanted, right=True)
    within_chunk = chunks.take_along_dim(chunk[..., None], dim=2).to(torch.float64).cumsum(-1)
    before = torch.nn.functional.pad(cumulative, (1, 0)).gather(-1, chunk)
    # The chunk's own cumulative sum is rounded otherwise than its total above: the share must stay below 1.
    share = ((wanted - before)[..., None] / within_chunk[..., -1:]).clamp(max=1 - 2**-52)
    return chunk * _CHUNK + torch.searchsorted(within_chunk, share * within_chunk[..., -1:], right=True)[..., 0]


class PhiloxStreams:
    """The `PhiloxStream` of each step. The first numbers of many steps are generated in one call.

    Args:
        seeds: int64 ``[B]``, as for `PhiloxStream`.
    """

    def __init__(self, seeds: Tensor) -> None:
        self._seeds = seeds
        self._sequences = torch.arange(len(seeds), device=seeds.device)
        self._offsets = torch.arange(max(1, _MAX_POSITIONS // max(1, len(seeds))), device=seeds.device)
        self._first: list[int] = []
        self._first_on_device = seeds
        self._generated: dict[int, Tensor] = {}

    def at(self, positions: Sequence[int], stream: int, on_device: Tensor | None = None) -> PhiloxStream:
        """The stream of a step; see `PhiloxStream`.

        Args:
            positions: tokens that each request has emitted.
            stream: `DRAW`, `VERIFY` or `SAMPLE`.
            on_device: the same positions, int64 ``[B]``, if they are on the device already.
        """
        if on_device is None:
            on_device = torch.tensor(positions, dtype=torch.int64, device=self._seeds.device)

        def prefetched() -> Tensor:
            offsets = [now - first for now, first in zip(positions, self._first, strict=False)]
            if len(offsets) < len(positions) or not all(0 <= offset < len(self._offsets) for offset in offsets):
                self._first, self._first_on_device = list(positions), on_device
                self._generated, offsets = {}, [0] * len(positions)
            if stream not in self._generated:
                self._generated[stream] = self._generate(stream)
            generated = self._generated[stream]
            if len(offsets) == 1:
                return generated[:, offsets[0]]
            return generated[self._sequences, on_device - self._first_on_device]

        return PhiloxStream(self._seeds, on_device, stream, prefetched)

    def _generate(self, stream: int) -> Tensor:
        """float64 ``[B, positions, numbers]``: the first numbers of steps at the next positions."""
        if stream == SAMPLE:
            count = len(self._offsets) + _PREFETCH - 1
            numbers = _numbers_of_step(self._seeds, self._first_on_device, stream, 0, count)
            return numbers.unfold(1, _PREFETCH, 1)
        return uniforms(self._seeds, self._first_on_device[:, None] + self._offsets, stream, 0, _PREFETCH)
