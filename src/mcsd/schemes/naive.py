"""Schemes that sample the target and accept the candidate that matches. They never read q."""

from collections.abc import Sequence

from torch import Tensor

from mcsd.rng import Randomness
from mcsd.sampling import BatchSamplingParams
from mcsd.schemes.base import DrawsWithoutReplacement, NodeScheme, top_k_indices
from mcsd.schemes.node_level import sample_and_match
from mcsd.schemes.types import Node


class _SampleAndMatch(NodeScheme):
    """Sample y from the target; accept the candidate that is y, if any."""

    needs_q = False

    def verify_node(self, node: Node, random: Randomness) -> tuple[Tensor, Tensor]:
        """See `NodeScheme.verify_node`."""
        return sample_and_match(node, random)


class Naive(DrawsWithoutReplacement, _SampleAndMatch):
    """Candidates drawn from q without replacement: the baseline of arXiv 2401.06706."""

    name = "naive"


class TopK(_SampleAndMatch):
    """The k most probable tokens of q (EAGLE-2, arXiv 2406.16858; equal to rejection with a one-hot q)."""

    name = "top-k"

    def draw(self, q: Tensor, counts: Sequence[int], sampling: BatchSamplingParams, random: Randomness) -> Tensor:
        """See `Scheme.draw`."""
        return top_k_indices(q, max(counts))
