"""How many looked-up tokens a step takes: as many as make it fastest by their expected acceptance and its cost."""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

DEPTHS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Lengths of chains: few, because a GPU captures the forward of each."""

_MIN_GAIN = 1.02
"""Candidates are proposed if the step is expected to be this many times as fast as one without."""

StepCost = Callable[[int, int], float]
"""``(sequences, candidates of each) -> duration of a step``, in any unit."""


def default_cost(batch_size: int, nodes: int) -> float:
    """The cost of a step where none was measured: one more token costs a twentieth of a forward of one."""
    return 20.0 + batch_size * (1 + nodes)


def expected_tokens(rates: Sequence[float], otherwise: float = 1.0) -> list[float]:
    """The expected tokens of a step by the number of looked-up tokens, from none.

    Args:
        rates: the probability that the first one, two, … looked-up tokens are right.
        otherwise: expected tokens of the step if the first one is not.
    """
    if not rates:
        return [otherwise]
    wrong = (1 - rates[0]) * otherwise
    return [otherwise, *(wrong + rates[0] + total for total in accumulate(rates))]


def best_depths(
    tokens: Sequence[Sequence[float]], nodes: Mapping[int, int], cost: StepCost, alone: bool = False
) -> list[int]:
    """How many looked-up tokens each sequence takes.

    Args:
        tokens: for each sequence, its `expected_tokens`.
        nodes: candidates of the tree by its depth, from 0.
        cost: of a step.
        alone: whether what a sequence takes must not depend on the others.
    """
    depths = [_fastest([each], nodes, cost) for each in tokens]
    if len(tokens) > 1 and not alone:
        most = _fastest(tokens, nodes, cost)
        depths = [min(depth, most) for depth in depths]
    return depths


def _fastest(tokens: Sequence[Sequence[float]], nodes: Mapping[int, int], cost: StepCost) -> int:
    """The depth with the most expected tokens per second of all sequences; 0 if a step without is about as fast."""
    if max(map(len, tokens)) == 1:
        return 0
    speeds = {
        depth: sum(each[min(depth, len(each) - 1)] for each in tokens) / cost(len(tokens), count)
        for depth, count in nodes.items()
    }
    best = max(speeds, key=speeds.__getitem__)
    return best if speeds[best] > _MIN_GAIN * speeds[0] else 0
