"""What the engine asks for the tree of each step, and the plan that always names the same."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from mcsd.params import SamplingParams
from mcsd.tree import TreeShape


@dataclass(frozen=True)
class Outcome:
    """What became of a step.

    Attributes:
        shape: the tree that was judged; a drafter may have had nothing to propose.
        params: of the rows.
        paths: for each row, the accepted nodes from the root down.
        seconds: that prefill, draft, target, judge and commit took; the step is not over.
    """

    shape: TreeShape
    params: Sequence[SamplingParams]
    paths: Sequence[Sequence[int]]
    seconds: Mapping[str, float]


@runtime_checkable
class Plan(Protocol):
    """What the engine asks for a tree before each step, and tells what became of it."""

    largest: int
    """Nodes of the largest tree that it may name."""

    def choose(self, params: Sequence[SamplingParams]) -> TreeShape:
        """The tree of the next step, for rows of these parameters.

        It may depend on all that has happened, and on nothing that is still to be drawn: so it cannot bias the text.
        """
        ...

    def observe(self, outcome: Outcome) -> None:
        """Be told what became of a step."""
        ...


class FixedTree:
    """The tree that somebody named.

    Args:
        shape: the tree; it may be set anew between steps.
        largest: nodes of the largest tree that it will be; by default those of this one.
    """

    def __init__(self, shape: TreeShape, largest: int | None = None) -> None:
        self.shape = shape
        self.largest = len(shape) if largest is None else largest

    def choose(self, params: Sequence[SamplingParams]) -> TreeShape:
        """See `Plan.choose`."""
        return self.shape

    def observe(self, outcome: Outcome) -> None:
        """Nothing follows from it."""
