"""Tails against tables and closed forms, the power against simulation, and the cells of a table."""

from math import exp, sqrt

import pytest
import torch

from mcsd.verify.pair_distribution import pooled_cells
from mcsd.verify.statistics import binomial_sf, chi_square_sf, detectable_total_variation, holm, total_variation


@pytest.mark.parametrize(
    ("statistic", "degrees", "p"),
    [(3.841459, 1, 0.05), (14.067140, 7, 0.05), (18.475307, 7, 0.01), (29.588298, 10, 0.001), (124.342113, 100, 0.05)],
)
def test_chi_square_tails_are_those_of_the_tables(statistic: float, degrees: int, p: float) -> None:
    assert chi_square_sf(statistic, degrees) == pytest.approx(p, rel=1e-4)


def test_the_chi_square_tail_of_two_degrees_is_exponential() -> None:
    for statistic in (0.0, 1.0, 40.0, 500.0):
        assert chi_square_sf(statistic, 2) == pytest.approx(exp(-statistic / 2))


@pytest.mark.parametrize("degrees", [1, 7, 300])
@pytest.mark.parametrize("noncentrality", [0.5, 20.0, 900.0])
def test_noncentral_tails_are_those_of_shifted_normal_variables(degrees: int, noncentrality: float) -> None:
    """10⁵ draws of a sum of squares: the deviation is more than five standard errors once in 10⁶ times."""
    generator = torch.Generator().manual_seed(degrees)
    at = degrees + noncentrality + 1.3 * sqrt(2 * (degrees + 2 * noncentrality))
    sums = torch.zeros(100_000, dtype=torch.float64)
    for i in range(degrees):
        normal = torch.randn(len(sums), dtype=torch.float64, generator=generator)
        sums += (normal + (sqrt(noncentrality) if i == 0 else 0.0)) ** 2
    p = chi_square_sf(at, degrees, noncentrality)
    assert 0.05 < p < 0.2
    assert float((sums > at).double().mean()) == pytest.approx(p, abs=5 * sqrt(p * (1 - p) / len(sums)))


def test_a_small_noncentrality_changes_little() -> None:
    assert chi_square_sf(20.0, 7, 1e-9) == pytest.approx(chi_square_sf(20.0, 7), rel=1e-6)


def test_one_cell_shows_nothing() -> None:
    assert chi_square_sf(0.0, 0) == 1.0
    assert detectable_total_variation(0, 0.0, 1000, 1e-3) is None


def test_binomial_tails() -> None:
    assert binomial_sf(0, 1000, 0.0) == 1.0
    assert binomial_sf(1, 1000, 0.0) == pytest.approx(1e-6, rel=1e-3)
    assert binomial_sf(1, 1000, 3e-3) == pytest.approx(1 - 0.997**1000)
    assert binomial_sf(1000, 1000, 0.5) == pytest.approx(0.5**1000)
    assert binomial_sf(7, 10, 0.5) == pytest.approx((120 + 45 + 10 + 1) / 1024)
    assert binomial_sf(5, 10, 2.0) == 1.0


def test_holm() -> None:
    assert holm([0.02, 0.5, 0.01], 0.05) == [True, False, True]
    assert holm([0.03, 0.5, 0.03], 0.05) == [False, False, False]


def test_a_detectable_bias_is_detected_nine_times_in_ten() -> None:
    """800 simulated samples: a rate of 0.9 is missed by 0.05 less than once in 10⁵ times."""
    cells, samples, level, generator = 40, 2000, 1e-3, torch.Generator().manual_seed(1)
    uniform = torch.full((cells,), 1 / cells, dtype=torch.float64)
    distance = detectable_total_variation(cells - 1, 0.0, samples, level)
    assert distance is not None
    biased = uniform * (1 + 2 * distance * torch.tensor([1.0, -1.0]).repeat(cells // 2))
    assert float(total_variation(biased, uniform)) == pytest.approx(distance)
    found = 0
    for _ in range(800):
        counts = torch.multinomial(biased, samples, replacement=True, generator=generator).bincount(minlength=cells)
        found += (
            chi_square_sf(float(((counts - samples * uniform) ** 2 / (samples * uniform)).sum()), cells - 1) <= level
        )
    assert abs(found / 800 - 0.9) < 0.05


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("samples", [30, 1000])
def test_every_cell_expects_enough_samples(sharpness: float, samples: int) -> None:
    generator = torch.Generator().manual_seed(2)
    table = (sharpness * torch.randn(4, 50, generator=generator, dtype=torch.float64)).flatten().softmax(0).view(4, 50)
    cell = pooled_cells(table, samples)
    mass = torch.zeros(int(cell.max()) + 1, dtype=torch.float64).index_add_(0, cell.flatten(), table.flatten())
    assert len(mass) == len(cell.unique())
    assert len(mass) == 1 or float(mass.min()) * samples >= 20
    large = table * samples >= 20
    # Large entries are cells of their own.
    assert len(cell[large].unique()) == int(large.sum())
