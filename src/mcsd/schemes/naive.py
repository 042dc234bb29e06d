"""Schemes that sample the target first and look whether a candidate was right. They never read q."""

from collections.abc import Sequence

from torch import Tensor

from mcsd.rng import Randomness
from mcsd.schemes.base import DrawsWithoutReplacement, NodeScheme, likeliest
from mcsd.schemes.candidates import Node
from mcsd.schemes.walk import sample_then_look


class _SampleThenLook(NodeScheme):
    """Sample y from the target; if a candidate is y, go on from there."""

    needs_q = False

    def judge_node(self, node: Node, random: Randomness) -> tuple[Tensor, Tensor]:
        """See `NodeScheme.judge_node`."""
        return sample_then_look(node, random)


class Naive(DrawsWithoutReplacement, _SampleThenLook):
    """Candidates drawn from q without replacement: the baseline of arXiv 2401.06706."""

    name = "naive"


class TopK(_SampleThenLook):
    """The k likeliest tokens of q (EAGLE-2, arXiv 2406.16858; equal to rejection with a one-hot q)."""

    name = "top-k"

    def draw(self, q: Tensor, counts: Sequence[int], greedy: Tensor, random: Randomness) -> Tensor:
        """See `Scheme.draw`."""
        return likeliest(q, max(counts))
