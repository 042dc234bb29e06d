"""Schemes that are not lossless, which the tests of the laws must reject."""

from dataclasses import replace

from torch import Tensor

from mcsd.rng import Randomness
from mcsd.sampling import SparseDistributions
from mcsd.schemes.recursive import McssWithoutReplacement
from mcsd.schemes.types import Node


class Broken(McssWithoutReplacement):
    """Verifies with a q that is 10 % smaller than the one it drew from."""

    def verify_node(self, node: Node, random: Randomness) -> tuple[Tensor, Tensor]:
        weaker = SparseDistributions(node.q.support, node.q.weights * 0.9)
        return super().verify_node(replace(node, q=weaker), random)


class NewQ(McssWithoutReplacement):
    """Verifies draws without replacement as if they were independent."""

    without_replacement = False
