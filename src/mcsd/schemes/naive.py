"""Schemes that sample the target first and look whether a candidate was right. They never read q."""

from torch import Tensor

from mcsd.rng import Randomness
from mcsd.schemes.base import Node, Scheme, likeliest, likeliest_where, look


class _SampleThenLook(Scheme):
    """Sample y from the target; if a candidate is y, go on from there."""

    needs_q = False

    def judge_node(self, node: Node, random: Randomness) -> tuple[Tensor, Tensor]:
        """See `Scheme.judge_node`."""
        return look(node, random.sample(node.p[:, None], 1, node.rows)[:, 0, 0])


class Naive(_SampleThenLook):
    """Candidates drawn from q without replacement: the baseline of arXiv 2401.06706."""

    name = "naive"

    def draw(self, q: Tensor, count: int, greedy: Tensor, random: Randomness) -> Tensor:
        """See `Scheme.draw`."""
        return likeliest_where(greedy, q, count, random.sample_without_replacement)


class TopK(_SampleThenLook):
    """The k likeliest tokens of q (EAGLE-2, arXiv 2406.16858; equal to rejection with a one-hot q)."""

    name = "top-k"

    def draw(self, q: Tensor, count: int, greedy: Tensor, random: Randomness) -> Tensor:
        """See `Scheme.draw`."""
        return likeliest(q, count)
