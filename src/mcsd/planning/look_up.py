"""The plan of tree "auto" for candidates that are looked up: the drafter decides how many of them a step takes."""

from collections.abc import Sequence

from mcsd.params import SamplingParams
from mcsd.planning.costs import StepCosts
from mcsd.planning.plan import StepOutcome
from mcsd.tree import TreeShape


class LookUpPlan:
    """A long chain for every step. The drafter cuts it, because how often copies are right depends on each text.

    Args:
        costs: of steps.
    """

    shape = TreeShape.parse("chain:16")
    max_nodes = len(shape)
    adapts = True

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs

    @property
    def plain_seconds(self) -> float:
        """Expected seconds of a step without candidates, for one sequence."""
        return self.seconds(1, 0)

    def seconds(self, batch_size: int, nodes: int) -> float:
        """Expected seconds of a step, by its sequences and the candidates of each."""
        return self._costs.step(batch_size, nodes, (1,) * bool(nodes), 1.0)

    def choose(self, params: Sequence[SamplingParams]) -> TreeShape:
        """See `Plan.choose`."""
        return self.shape

    def observe(self, outcome: StepOutcome) -> None:
        """The drafter itself sees which of its candidates were right."""
