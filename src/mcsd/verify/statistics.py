"""Chi-square and binomial tails, the power of the chi-square test, and Holm's correction. Free of models."""

from collections.abc import Sequence
from math import sqrt

from torch import Tensor

_POWER = 0.9

_MIN_PROBABILITY = 1e-9
"""No event counts as impossible: the probability allowed for is measured, and a measured 0 proves nothing."""


def chi_square_sf(statistic: float, degrees: int, noncentrality: float = 0.0) -> float:
    """The probability that a (noncentral) chi-square variable exceeds ``statistic``.

    Args:
        statistic: at least 0.
        degrees: of freedom; a variable with 0 degrees is 0.
        noncentrality: N·Σ(p'-p)²/p if N samples follow p' and are tested against p.
    """
    from scipy.stats import chi2, ncx2

    if degrees == 0:
        return 1.0
    return float(ncx2.sf(statistic, degrees, noncentrality) if noncentrality else chi2.sf(statistic, degrees))


def detectable_total_variation(degrees: int, noncentrality: float, samples: int, level: float) -> float | None:
    """The total variation from p that a test of this level detects with probability 0.9, for any kind of bias.

    A bias of total variation d has a chi-square distance of at least 4d², so this holds for the hardest bias. None if
    there is only one cell (0 degrees), which cannot show a bias.
    """
    from scipy.optimize import brentq
    from scipy.stats import chi2, ncx2

    if degrees == 0:
        return None
    critical = ncx2.isf(level, degrees, noncentrality) if noncentrality else chi2.isf(level, degrees)
    # With a noncentrality of four times the critical value the power is far above 0.9.
    needed = brentq(lambda x: chi_square_sf(critical, degrees, x) - _POWER, 0, 4 * critical + 40)
    return min(sqrt(needed / samples) / 2, 1.0)


def binomial_sf(count: int, samples: int, probability: float) -> float:
    """The probability of at least ``count`` events in ``samples`` independent trials."""
    from scipy.stats import binom

    return float(binom.sf(count - 1, samples, min(max(probability, _MIN_PROBABILITY), 1.0)))


def holm(p_values: Sequence[float], level: float) -> list[bool]:
    """Which hypotheses are rejected, in the given order; any is falsely rejected with probability up to ``level``."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    rejected = [False] * len(p_values)
    for rank, which in enumerate(order):
        if p_values[which] > level / (len(p_values) - rank):
            break
        rejected[which] = True
    return rejected


def total_variation(counts: Tensor, distribution: Tensor) -> Tensor:
    """Total variation distance of relative frequencies from a distribution: ``[...]`` for ``[..., C]`` and ``[C]``."""
    frequencies = counts / counts.sum(-1, keepdim=True)
    return (frequencies - distribution).abs().sum(-1) / 2
