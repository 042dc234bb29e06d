"""The chi-square tail, central and not, what a test can see, and Holm's correction. Free of models."""

from collections.abc import Callable, Sequence
from math import lgamma, sqrt

import torch
from torch import Tensor

_POWER = 0.9


def tail(statistic: float, degrees: int, shift: float = 0.0) -> float:
    """The probability that a chi-square variable exceeds ``statistic``.

    Args:
        statistic: at least 0.
        degrees: of freedom; with none the variable is 0.
        shift: the noncentrality: N·Σ(p'-p)²/p where N samples follow p' and are held to p.
    """
    if degrees == 0:
        return 1.0
    # A noncentral variable is a central one with twice a Poisson number of further degrees.
    terms = torch.arange(int(shift / 2 + 12 * sqrt(shift / 2)) + 40, dtype=torch.float64)
    half = torch.tensor(shift / 2, dtype=torch.float64)
    weights = (torch.special.xlogy(terms, half) - half - torch.lgamma(terms + 1)).exp()
    tails = torch.special.gammaincc(degrees / 2 + terms, torch.tensor(statistic / 2, dtype=torch.float64))
    return min(float((weights * tails).sum()), 1.0)


def visible(degrees: int, shift: float, samples: int, level: float) -> float | None:
    """The total variation from p that a test of this level finds nine times out of ten, whatever the bias is like.

    A bias of total variation d has a chi-square distance of at least 4d², so this holds for the hardest one. None where
    there is but one cell: nothing can be seen.
    """
    if degrees == 0:
        return None
    critical = _least(lambda x: tail(x, degrees, shift) <= level, degrees + shift)
    needed = _least(lambda x: tail(critical, degrees, x) >= _POWER, critical)
    return min(sqrt(needed / samples) / 2, 1.0)


def _least(true: Callable[[float], bool], guess: float) -> float:
    """The smallest number at which a condition holds that holds from there on."""
    low, high = 0.0, guess
    while not true(high):
        low, high = high, 2 * high
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if true(middle) else (middle, high)
    return high


def at_least(count: int, samples: int, probability: float) -> float:
    """The probability that at least ``count`` of so many independent events happen."""
    if count == 0:
        return 1.0
    # No event is taken to be impossible: what is allowed for is measured, and a measurement of 0 is not a proof.
    chance = torch.tensor(min(max(probability, 1e-9), 1.0), dtype=torch.float64)
    k = torch.arange(count, samples + 1, dtype=torch.float64)
    ways = lgamma(samples + 1) - torch.lgamma(k + 1) - torch.lgamma(samples - k + 1)
    log = ways + torch.xlogy(k, chance) + torch.special.xlog1py(samples - k, -chance)
    return min(float(log.exp().sum()), 1.0)


def holm(p_values: Sequence[float], level: float) -> list[bool]:
    """Which hypotheses fall, in the order given; a true one falls with a probability of at most ``level``."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    fallen = [False] * len(p_values)
    for rank, which in enumerate(order):
        if p_values[which] > level / (len(p_values) - rank):
            break
        fallen[which] = True
    return fallen


def total_variation(seen: Tensor, law: Tensor) -> Tensor:
    """Half the sum of differences between shares: ``[...]`` for counts ``[..., C]`` and a law ``[C]``."""
    shares = seen / seen.sum(-1, keepdim=True)
    return (shares - law).abs().sum(-1) / 2
