"""Philox against known answers, streams that belong to their sequence, and the distributions of the three methods.

Statistical tests fail at p < 1e-6. There are about 20 of them: one false alarm in 50,000 runs of this file, if the
seeds were not fixed. Each docstring names the smallest fault that the test detects.
"""

from collections.abc import Callable
from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from torch import Tensor

from mcsd.rng import DRAW, SAMPLE, VERIFY, PhiloxStream, PhiloxStreams, _inverse_cdf, _inverse_cdf_chunked, philox

ALARM = 1e-6
WORD = st.integers(0, 2**32 - 1)


def stream(seeds: list[int], positions: list[int] | None = None, kind: int = DRAW) -> PhiloxStream:
    return PhiloxStream(torch.tensor(seeds), torch.tensor(positions or [0] * len(seeds)), kind)


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as the paper writes it, in Python's unbounded integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for step in range(10):
        high0, low0 = divmod(c0 * 0xD2511F53, 2**32)
        high1, low1 = divmod(c2 * 0xCD9E8D57, 2**32)
        r0, r1 = (k0 + step * 0x9E3779B9) % 2**32, (k1 + step * 0xBB67AE85) % 2**32
        c0, c1, c2, c3 = high1 ^ c1 ^ r0, low1, high0 ^ c3 ^ r1, low0
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
)
def test_philox_known_answers(counter: str, key: str, answer: str) -> None:
    """The vectors that come with Random123."""

    def words(text: str) -> list[int]:
        return [int(word, 16) for word in text.split()]

    assert philox(torch.tensor(words(counter)), torch.tensor(words(key))).tolist() == words(answer)
    assert plain_philox(words(counter), words(key)) == words(answer)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**31), st.sampled_from([DRAW, VERIFY]), st.integers(1, 150))
@settings(deadline=None, max_examples=40)
def test_uniform_is_the_documented_function(seed: int, position: int, kind: int, count: int) -> None:
    """48 bits of Philox at (number of the pair, 0, position, stream) under the seed's two halves."""
    signed = seed - 2**64 if seed >= 2**63 else seed
    expected = []
    for block in range((count + 1) // 2):
        w = plain_philox([block, 0, position, kind], [seed % 2**32, seed >> 32])
        expected += [((w[i] << 16) + (w[i + 1] >> 16) + 0.5) / 2**48 for i in (0, 2)]
    numbers = stream([signed], [position], kind).uniform(count)
    assert numbers.dtype == torch.float64
    assert numbers.tolist() == [expected[:count]]


@given(st.lists(st.integers(0, 90), min_size=1, max_size=6))
@settings(deadline=None, max_examples=30)
def test_portions_do_not_matter(portions: list[int]) -> None:
    at_once, in_parts = stream([3, -8], [1, 2]), stream([3, -8], [1, 2])
    pieces = [in_parts.uniform(count) for count in portions]
    assert torch.equal(torch.cat(pieces, 1), at_once.uniform(sum(portions)))


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), min_size=1, max_size=8))
@settings(deadline=None, max_examples=30)
def test_prefetched_numbers_are_those_of_each_step(moves: list[tuple[int, int]]) -> None:
    """Steps beyond the prefetched positions, sequences at different positions, and more numbers than prefetched."""
    seeds, positions = [3, -8], [0, 5]
    streams = PhiloxStreams(torch.tensor(seeds))
    for move in moves:
        for kind in (DRAW, VERIFY, SAMPLE):
            prefetched, alone = streams.at(positions, kind), stream(seeds, positions, kind)
            for count in (3, 30):
                assert torch.equal(prefetched.uniform(count), alone.uniform(count))
        positions = [p + m for p, m in zip(positions, move, strict=True)]


def test_numbers_for_matching_belong_to_tokens() -> None:
    """The i-th one of a step is the first one of `VERIFY` i positions later, whatever the steps."""
    seeds, positions = [3, -8], [4, 9]
    numbers = stream(seeds, positions, SAMPLE).uniform(100)
    for i in (0, 1, 7, 63, 64, 99):
        later = stream(seeds, [position + i for position in positions], VERIFY)
        assert torch.equal(numbers[:, i], later.uniform(1)[:, 0])


def test_a_sequence_has_the_same_numbers_in_any_batch() -> None:
    """Alone, in a batch, and while other sequences no longer draw."""
    seeds, positions = [5, -(2**63), 2**62 + 1, 5], [0, 7, 7, 8]
    weights = torch.rand(4, 2, 9, generator=torch.Generator().manual_seed(0))
    batch = stream(seeds, positions)
    part = stream(seeds, positions)
    some = torch.tensor([2, 0])
    for _ in range(3):
        for method in ("sample", "sample_without_replacement"):
            full = getattr(batch, method)(weights, 4)
            assert torch.equal(getattr(part, method)(weights[some], 4, some), full[some])
        assert torch.equal(part.accept(torch.tensor([0.5, 0.5]), some), batch.accept(torch.full((4,), 0.5))[some])
    together = stream(seeds, positions).uniform(100)
    for i in range(4):
        assert torch.equal(stream(seeds[i : i + 1], positions[i : i + 1]).uniform(100)[0], together[i])


TWO_SERIES: dict[str, Callable[[int], tuple[Tensor, Tensor]]] = {
    "draw and verify": lambda n: (stream([1]).uniform(n), stream([1], kind=VERIFY).uniform(n)),
    "neighbouring positions": lambda n: (stream([1]).uniform(n), stream([1], [1]).uniform(n)),
    "neighbouring seeds": lambda n: (stream([1]).uniform(n), stream([2]).uniform(n)),
    "high halves of seeds": lambda n: (stream([1]).uniform(n), stream([1 + 2**32]).uniform(n)),
    "seeds of opposite sign": lambda n: (stream([1]).uniform(n), stream([1 - 2**63]).uniform(n)),
    "consecutive numbers": lambda n: (stream([1]).uniform(2 * n)[:, ::2], stream([1]).uniform(2 * n)[:, 1::2]),
    "first numbers of seeds": lambda n: tuple(stream(list(range(n))).uniform(2).T),  # type: ignore[return-value]
}


@pytest.mark.parametrize("case", TWO_SERIES)
def test_streams_are_uniform_and_independent(case: str) -> None:
    """Pairs on a 10 x 10 grid. Power 99 %: a correlation of 0.06 (noncentrality 40000·0.06² = 144)."""
    first, second = (series.flatten() for series in TWO_SERIES[case](40_000))
    cells = ((first * 10).long() * 10 + (second * 10).long()).bincount(minlength=100)
    assert chisquare(cells.numpy()).pvalue > ALARM
    assert 0 < min(first.min(), second.min()) < max(first.max(), second.max()) < 1


def test_sample_follows_the_weights() -> None:
    """Six distributions. Power 99.9 %: a total variation of 0.03 (noncentrality >= 4·0.03²·40000 = 144)."""
    weights = torch.tensor(
        [
            [[0, 3, 0, 1, 2, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 5, 0]],
            [[1e-20, 2e-20, 0, 0, 0, 3e-20], [7e6, 0, 1e6, 0, 0, 2e6], [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.03125]],
        ]
    )
    drawn = stream([11, 12]).sample(weights, 40_000)
    assert drawn.shape == (2, 3, 40_000)
    for weight, draws in zip(weights.flatten(0, 1), drawn.flatten(0, 1), strict=True):
        counts = draws.bincount(minlength=6)
        assert not counts[weight == 0].any()
        expected = weight[weight > 0].double()
        if len(expected) > 1:
            expected *= 40_000 / expected.sum()
            assert chisquare(counts[weight > 0].numpy(), expected.numpy()).pvalue > ALARM


def test_sample_keeps_small_weights_after_a_large_one() -> None:
    """In float32 sums 3 of 4 entries of weight 1 would vanish after 2**25: certain to show in about 780 draws."""
    weights = torch.ones(1, 1, 2**17)
    weights[..., 0] = 2.0**25
    drawn = stream([31]).sample(weights, 200_000).flatten()
    assert chisquare((drawn[drawn > 0] % 4).bincount(minlength=4).numpy()).pvalue > ALARM


class AtTheEdge(PhiloxStream):
    """A stream that gives only its smallest or its largest number."""

    u = 2.0**-49

    def uniform(self, count: int, sequences: Tensor | None = None) -> Tensor:
        return torch.full((1, count), self.u, dtype=torch.float64)


@pytest.mark.parametrize("u", [2.0**-49, 1 - 2.0**-49])
@pytest.mark.parametrize("scale", [1e-38, 1.0, 1e30])
@pytest.mark.parametrize("size", [150_000, 151_936])
def test_sample_never_draws_a_zero_weight(u: float, scale: float, size: int) -> None:
    """Not even at the ends of the range, where rounding might run off a large vocabulary, whole or in chunks."""
    random = AtTheEdge(torch.tensor([0]), torch.tensor([0]), DRAW)
    random.u = u
    weights = torch.rand(1, 8, size, generator=torch.Generator().manual_seed(1)) * scale
    weights[..., :20] = weights[..., -20:] = 0
    weights[:, 1] = 0
    weights[:, 1, 75_000] = scale
    # A chunk of the vocabulary that ends in zeros.
    weights[:, 2, 64:] = 0
    for drawn in (random.sample(weights, 1), stream([4]).sample(weights, 50)):
        assert (weights.gather(2, drawn) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sampling_by_chunks_draws_the_same_tokens(dtype: torch.dtype) -> None:
    """Peaked and flat distributions, and empty chunks. A sum is rounded across a number with probability 1e-9."""
    generator = torch.Generator().manual_seed(5)
    weights = torch.randn(3, 2, 8192, generator=generator, dtype=torch.float64).mul(
        torch.tensor([0.0, 1, 12]).view(3, 1, 1)
    )
    weights = weights.softmax(-1).to(dtype)
    weights[:, 1, 1024:4096] = 0
    u = torch.rand(3, 2, 500, generator=generator, dtype=torch.float64)
    assert torch.equal(_inverse_cdf_chunked(weights, u), _inverse_cdf(weights, u))


@pytest.mark.parametrize("count", [2, 3])
def test_without_replacement_in_draw_order(count: int) -> None:
    """Ordered tuples against drawing one after the other and renormalising, zero weights among them.

    Power 99.9 %: a total variation of 0.04 (noncentrality >= 4·0.04²·30000 = 192). Independent draws with
    replacement, or the right sets in sorted order, are 0.2 and more away.
    """
    weights = torch.tensor([0.0, 4.0, 3.0, 0.0, 2.0, 1.0])
    drawn = stream([21]).sample_without_replacement(weights.expand(1, 30_000, 6), count)[0]
    keys = (drawn * 6 ** torch.arange(count)).sum(1)
    tuples = list(permutations([1, 2, 4, 5], count))
    expected = []
    for one in tuples:
        probability, remaining = 1.0, 10.0
        for index in one:
            probability *= float(weights[index]) / remaining
            remaining -= float(weights[index])
        expected.append(probability * 30_000)
    counts = keys.bincount(minlength=6**count)
    observed = [int(counts[sum(index * 6**i for i, index in enumerate(one))]) for one in tuples]
    assert sum(observed) == 30_000
    assert chisquare(observed, expected).pvalue > ALARM


@given(
    st.lists(st.lists(st.sampled_from([0.0, 1e-30, 0.5, 3.0]), min_size=5, max_size=5).filter(any), min_size=1),
    st.integers(1, 8),
    st.integers(0, 2**62),
)
@settings(deadline=None, max_examples=60)
def test_without_replacement_stops_where_the_support_ends(rows: list[list[float]], count: int, seed: int) -> None:
    weights = torch.tensor(rows)
    drawn = stream([seed]).sample_without_replacement(weights[None], count)[0]
    assert drawn.shape == (len(rows), count)
    for weight, draws in zip(weights, drawn.tolist(), strict=True):
        support = weight.count_nonzero()
        chosen, rest = draws[:support], draws[support:]
        assert len(set(chosen)) == len(chosen) == min(support, count)
        assert all(index >= 0 and weight[index] > 0 for index in chosen)
        assert rest == [-1] * len(rest)


def test_accept_follows_the_probability() -> None:
    """40,000 sequences a case. Power 99.9 %: an error of 0.02 (8 standard deviations; the test fails at 4.9)."""
    random = stream(list(range(40_000)))
    for probability in (0.0, 0.1, 0.5, 0.97, 1.0, 1.7):
        share = random.accept(torch.full((40_000,), probability)).double().mean().item()
        sigma = (probability * max(0.0, 1 - probability) / 40_000) ** 0.5
        assert abs(share - min(1.0, probability)) <= 4.9 * sigma


def test_accept_uses_the_probability_of_each_sequence() -> None:
    probability = torch.tensor([0.0, 1.0, 0.0, 2.0])
    assert stream([1, 2, 3, 4]).accept(probability).tolist() == [False, True, False, True]
    assert stream([1, 2, 3, 4]).accept(probability[[3, 0]], torch.tensor([3, 0])).tolist() == [True, False]
