"""Drafting without a draft model: tokens are copied from where the last ones occurred before."""

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from mcsd.drafters.base import Drafter
from mcsd.drafters.corpus import Corpus, look_up_in
from mcsd.drafters.depths import DEPTHS, StepCost, best_depths, default_cost, expected_tokens
from mcsd.drafters.look_up import LookUp
from mcsd.rng import Randomness
from mcsd.sampling import BatchSamplingParams
from mcsd.schemes import CandidateTree, Scheme
from mcsd.tree import TreeShape


class NgramDrafter(Drafter):
    """Copies what followed the last tokens earlier: in the text, in a prediction of the answer, in a corpus.

    The candidates are not drawn from a distribution, so a scheme that needs no q verifies them. A step has as many of
    them, up to the tree that the plan names, as make it fastest by the acceptance rates of this text so far; where
    copies are rarely right it has none and is plain decoding.

    Args:
        device: where the target computes.
        corpus: token ids of texts in which tokens are looked up too, such as earlier outputs.

    Raises:
        InvalidOption: the corpus is too large.

    Attributes:
        cost: of a step, by which the number of candidates is chosen; see `StepCost`.
    """

    name = "ngram"
    is_sampled = False

    def __init__(self, device: torch.device | str = "cpu", corpus: Iterable[Sequence[int]] = ()) -> None:
        self._device = torch.device(device)
        self._corpus = Corpus(corpus)
        self._sequences: list[LookUp] = []
        self.cost: StepCost = default_cost

    @property
    def sequences(self) -> int:
        """See `Drafter.sequences`."""
        return len(self._sequences)

    def add(self, prompt: list[int], hidden: Tensor | None) -> None:
        """See `Drafter.add`."""
        self._sequences.append(look_up_in(self._corpus, prompt))

    def expect(self, prompt: list[int], prediction: Sequence[int]) -> None:
        """See `Drafter.expect`."""
        self._sequences[-1] = look_up_in(self._corpus, prompt, prediction)

    def draft(
        self,
        token_ids: list[list[int]],
        shape: TreeShape,
        scheme: Scheme,
        sampling: BatchSamplingParams,
        random: Randomness,
    ) -> CandidateTree:
        """See `Drafter.draft`."""
        sequences = self._sequences if len(shape) else []
        for text, sequence in zip(token_ids, sequences, strict=len(shape) > 0):
            sequence.update(text)
        takes = [one.speculative for one in sampling.params]
        both = zip(sequences, takes, strict=False)
        rates = [sequence.best(shape.depth)[1] if speculative else [] for sequence, speculative in both]
        depths = best_depths([expected_tokens(each) for each in rates], _nodes_by_depth(shape), self.cost)
        shape = _cut(shape, max(depths, default=0))
        if not len(shape):
            return CandidateTree.none(len(token_ids), self._device)
        filled = [
            _merge(sequence.continuations(text, depth, shape.width), shape)
            for sequence, text, depth in zip(sequences, token_ids, depths, strict=True)
        ]
        # One copy to the device: -1 where there is no candidate.
        table = [[nodes.get(node, -1) for node in range(len(shape))] for nodes in filled]
        tokens = torch.tensor(table, device=self._device)
        valid = tokens >= 0
        failed = torch.zeros(len(token_ids), dtype=torch.bool, device=self._device)
        return CandidateTree(shape, tokens.clamp(min=0), valid, torch.zeros_like(tokens), None, failed)

    def commit(self, path: Tensor, paths: list[list[int]], hidden: Tensor | None) -> None:
        """See `Drafter.commit`. The tokens themselves are the only state."""

    def remove(self, sequence: int) -> None:
        """See `Drafter.remove`."""
        self._sequences[sequence] = self._sequences[-1]
        self._sequences.pop()

    def clear(self) -> None:
        """See `Drafter.clear`."""
        self._sequences.clear()


@lru_cache(maxsize=64)
def _nodes_by_depth(shape: TreeShape) -> dict[int, int]:
    """The depths to which a tree may be cut, and the nodes that it then has."""
    depths = (0, *(depth for depth in DEPTHS if depth < shape.depth), shape.depth)
    return {depth: len(_cut(shape, depth)) for depth in depths}


@lru_cache(maxsize=256)
def _cut(shape: TreeShape, depth: int) -> TreeShape:
    """A tree without its nodes below a depth."""
    # Nodes are numbered by depth.
    return shape if depth >= shape.depth else TreeShape(shape.parents[: sum(each <= depth for each in shape.depths)])


def _merge(continuations: Sequence[Sequence[int]], shape: TreeShape) -> dict[int, int]:
    """Fill a tree: node to token. Children of a node come in the order in which the continuations first name them."""
    children = [[node for node in nodes if node >= 0] for nodes in shape.children.tolist()]
    filled: dict[int, int] = {}
    for tokens in continuations:
        column = 0
        for token in tokens:
            node = next((node for node in children[column] if filled.setdefault(node, token) == token), None)
            if node is None:
                break
            column = 1 + node
    return filled
