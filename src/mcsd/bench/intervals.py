"""Confidence intervals by the jackknife over prompts. Independent of models."""

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, inf, sqrt

from torch import Tensor

_MIN_PROMPTS = 3
"""With fewer prompts there is no interval."""


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % confidence interval; low and high are None with too few prompts."""

    value: float
    low: float | None = None
    high: float | None = None


def jackknife(sums: Tensor, statistic: Callable[[Tensor], Tensor], maximum: float = inf) -> Interval:
    """The interval of a function of sums over prompts, from its values with one prompt left out of all sums.

    So ratios of two systems are paired, and texts that differ in length weigh by their length. The standard error is
    that of the logarithm (Miller 1974, "The jackknife: a review"), times Student's quantile for few prompts. On ratios
    of speeds with noise of 20 % the percentiles of the paired bootstrap covered the truth 85 % of the time for 4
    prompts, 89 % for 6 and 92 % for 12; this interval did so 94, 92 and 93 % of the time.

    Args:
        sums: float64 ``[n, m]``, m quantities of each of n prompts.
        statistic: from sums ``[..., m]`` to values ``[...]``, which are not negative.
        maximum: of the statistic; bounds the interval.
    """
    count, total = len(sums), sums.sum(0)
    value = float(statistic(total))
    left_out = statistic(total - sums)
    if count < _MIN_PROMPTS or float(left_out.min()) <= 0:
        return Interval(value)
    logs = left_out.log()
    error = sqrt((count - 1) / count * float(((logs - logs.mean()) ** 2).sum()))
    factor = exp(_student_quantile(count - 1) * error)
    return Interval(value, value / factor, min(value * factor, maximum))


def _student_quantile(degrees: int) -> float:
    """The 97.5 % quantile of Student's t distribution."""
    # Imported late: the command line must start fast.
    from scipy.stats import t

    return float(t.ppf(0.975, degrees))
