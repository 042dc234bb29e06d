"""The tails against scipy's, what a test sees against trying it, and the cells of a table."""

import pytest
import torch
from scipy.stats import binom, chi2, ncx2

from mcsd.verify.pairs import lumps
from mcsd.verify.statistics import at_least, holm, tail, total_variation, visible


@pytest.mark.parametrize("degrees", [1, 7, 300])
@pytest.mark.parametrize("sigmas", [-1.0, 0.0, 4.0])
def test_tails(degrees: int, sigmas: float) -> None:
    at = max(degrees + sigmas * (2 * degrees) ** 0.5, 0.1)
    assert tail(at, degrees) == pytest.approx(chi2.sf(at, degrees), rel=1e-6)
    for shift in (0.5, 20.0, 900.0):
        assert tail(at + shift, degrees, shift) == pytest.approx(ncx2.sf(at + shift, degrees, shift), rel=1e-6)


def test_one_cell_shows_nothing() -> None:
    assert tail(0.0, 0) == 1.0
    assert visible(0, 0.0, 1000, 1e-3) is None


def test_at_least() -> None:
    assert at_least(0, 1000, 0.0) == 1.0
    assert at_least(1, 1000, 0.0) < 1e-5
    for count in (1, 5, 1000):
        assert at_least(count, 1000, 3e-3) == pytest.approx(binom.sf(count - 1, 1000, 3e-3), rel=1e-6)


def test_holm() -> None:
    assert holm([0.02, 0.5, 0.01], 0.05) == [True, False, True]
    assert holm([0.03, 0.5, 0.03], 0.05) == [False, False, False]


def test_what_is_visible_is_found_nine_times_in_ten() -> None:
    """800 samples are tried: a share of 0.9 is missed by 0.05 less than once in 10⁵ times."""
    cells, samples, level, generator = 40, 2000, 1e-3, torch.Generator().manual_seed(1)
    law = torch.full((cells,), 1 / cells, dtype=torch.float64)
    moved = visible(cells - 1, 0.0, samples, level)
    assert moved is not None
    biased = law * (1 + 2 * moved * torch.tensor([1.0, -1.0]).repeat(cells // 2))
    assert float(total_variation(biased, law)) == pytest.approx(moved)
    found = 0
    for _ in range(800):
        counts = torch.multinomial(biased, samples, replacement=True, generator=generator).bincount(minlength=cells)
        found += tail(float(((counts - samples * law) ** 2 / (samples * law)).sum()), cells - 1) <= level
    assert abs(found / 800 - 0.9) < 0.05


@pytest.mark.parametrize("sharpness", [0.1, 1.0, 4.0, 20.0])
@pytest.mark.parametrize("samples", [30, 1000])
def test_cells_hold_enough_and_follow_the_table(sharpness: float, samples: int) -> None:
    generator = torch.Generator().manual_seed(2)
    table = (sharpness * torch.randn(4, 50, generator=generator, dtype=torch.float64)).flatten().softmax(0).view(4, 50)
    cell = lumps(table, samples)
    mass = torch.zeros(int(cell.max()) + 1, dtype=torch.float64).index_add_(0, cell.flatten(), table.flatten())
    assert len(mass) == len(cell.unique())
    assert len(mass) == 1 or float(mass.min()) * samples >= 20
    large = table * samples >= 20
    # Large entries stay apart from each other.
    assert len(cell[large].unique()) == int(large.sum())
