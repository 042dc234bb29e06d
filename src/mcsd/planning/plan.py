"""Plans: the tree of each step. The engine asks a plan before a step and reports the outcome after it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from mcsd.errors import InvalidTree
from mcsd.params import SamplingParams
from mcsd.schemes.mixed_shape import MixedShape
from mcsd.schemes.registry import check_tree
from mcsd.tree import PLAIN, TreeShape


@dataclass(frozen=True)
class StepOutcome:
    """The outcome of a step.

    Attributes:
        shape: the tree that was verified; it is empty if the drafter proposed nothing.
        params: of the sequences that had candidates.
        paths: for each of them, the accepted nodes from the root down.
        seconds: time of prefill, draft, target, judge (verification) and commit; the step is not over.
    """

    shape: TreeShape
    params: Sequence[SamplingParams]
    paths: Sequence[Sequence[int]]
    seconds: Mapping[str, float]

    @classmethod
    def of(
        cls,
        tree: TreeShape | MixedShape,
        params: Sequence[SamplingParams],
        paths: Sequence[list[int]],
        seconds: Mapping[str, float],
    ) -> "StepOutcome":
        """The outcome of a step, of its drawn candidates.

        Sequences without candidates are left out; so are those whose looked-up candidate was accepted, which says
        nothing about drawn ones.
        """
        both = [(one, path) for one, path in zip(params, paths, strict=True) if one.speculative]
        if isinstance(tree, TreeShape):
            known, drawn = both, tree
        else:
            on_drawn = [(one, tree.drawn_path(path)) for one, path in both]
            known, drawn = [(one, path) for one, path in on_drawn if path is not None], tree.drawn
        shape = drawn if known else PLAIN
        return cls(shape, [one for one, _ in known], [path for _, path in known], seconds)


@runtime_checkable
class Plan(Protocol):
    """Names the tree of each step.

    It may have an attribute ``min_confidence``, see `mcsd.drafters.Drafter`, and a method ``stretches``, see
    `mcsd.planning.Planner`. Without that, a draft reads all of a text.
    """

    max_nodes: int
    """Nodes of the largest tree that it may name."""
    adapts: bool
    """Whether trees depend on earlier steps and other requests, on which the text of a seed must not depend."""

    def choose(self, params: Sequence[SamplingParams]) -> TreeShape:
        """The tree of the next step, for sequences with these parameters.

        It may depend on everything that has happened, and on nothing that is still to be sampled: so it cannot bias
        the output.
        """
        ...

    def observe(self, outcome: StepOutcome) -> None:
        """Receive the outcome of a step."""
        ...


def check_planned(plan: Plan, scheme: str, shape: TreeShape) -> None:
    """Check a tree of a plan: a scheme would verify some trees by another distribution than the target's.

    Raises:
        InvalidTree: the scheme does not support it, or it has too many nodes.
    """
    check_tree(scheme, shape)
    if len(shape) > plan.max_nodes:
        raise InvalidTree(
            f"the plan names a tree of {len(shape)} nodes; its max_nodes is {plan.max_nodes}", "raise its max_nodes"
        )


class FixedTree:
    """The same tree for every step.

    Args:
        shape: the tree; it may be changed between steps.
        max_nodes: nodes of the largest tree that it will be; by default those of ``shape``.
    """

    adapts = False

    def __init__(self, shape: TreeShape, max_nodes: int | None = None) -> None:
        self.shape = shape
        self.max_nodes = len(shape) if max_nodes is None else max_nodes

    def choose(self, params: Sequence[SamplingParams]) -> TreeShape:
        """See `Plan.choose`."""
        return self.shape

    def observe(self, outcome: StepOutcome) -> None:
        """Outcomes do not change the tree."""
