"""Drafting without a draft model: the continuations of earlier occurrences of the last tokens."""

from collections import defaultdict

import torch
from torch import Tensor

from mcsd.drafters.base import Drafter
from mcsd.rng import Randomness
from mcsd.sampling import BatchSamplingParams
from mcsd.schemes import CandidateTree, Scheme
from mcsd.tree import TreeShape

_MAX_NGRAM = 4
"""Tokens of the longest n-gram that is looked up; shorter ones follow."""

_MAX_MATCHES = 16
"""Earlier occurrences whose continuations are merged, the longest n-gram and the latest occurrence first."""


class NgramDrafter(Drafter):
    """Merges the continuations of earlier occurrences of the last tokens into a tree (prompt look-up, Saxena 2023).

    The candidates are not drawn from a distribution, so a scheme that needs no q verifies them.

    Args:
        device: where the target computes.
    """

    name = "ngram"
    is_sampled = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._indices: list[_NgramIndex] = []

    def add(self, prompt: list[int], hidden: Tensor | None) -> None:
        """See `Drafter.add`."""
        self._indices.append(_NgramIndex())

    def draft(
        self,
        token_ids: list[list[int]],
        shape: TreeShape,
        scheme: Scheme,
        sampling: BatchSamplingParams,
        random: Randomness,
    ) -> CandidateTree:
        """See `Drafter.draft`."""
        filled: list[dict[int, int]] = []
        for text, index in zip(token_ids, self._indices if len(shape) else (), strict=len(shape) > 0):
            index.update(text)
            filled.append(_merge(text, index.continuations(text), shape))
        if not any(filled):
            return CandidateTree.none(len(token_ids), self._device)
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
        self._indices[sequence] = self._indices[-1]
        self._indices.pop()

    def clear(self) -> None:
        """See `Drafter.clear`."""
        self._indices.clear()


class _NgramIndex:
    """The positions at which each n-gram of a text ends, for n up to `_MAX_NGRAM`."""

    def __init__(self) -> None:
        self._ends: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        self._length = 0

    def update(self, text: list[int]) -> None:
        """Add the new tokens of a text, except the last one, which has no continuation yet."""
        for end in range(self._length, len(text) - 1):
            for n in range(1, min(_MAX_NGRAM, end + 1) + 1):
                self._ends[tuple(text[end + 1 - n : end + 1])].append(end)
        self._length = max(self._length, len(text) - 1)

    def continuations(self, text: list[int]) -> list[int]:
        """Positions after earlier occurrences of the last tokens, the longest n-gram and the latest one first."""
        positions: dict[int, None] = {}
        for n in range(min(_MAX_NGRAM, len(text)), 0, -1):
            for end in reversed(self._ends.get(tuple(text[-n:]), ())):
                if len(positions) == _MAX_MATCHES:
                    return list(positions)
                positions[end + 1] = None
        return list(positions)


def _merge(text: list[int], positions: list[int], shape: TreeShape) -> dict[int, int]:
    """Fill a tree: node to token. Children of a node come in the order in which the positions first name them."""
    filled: dict[int, int] = {}
    pending = [(0, positions)]
    while pending:
        column, here = pending.pop()
        next_positions: defaultdict[int, list[int]] = defaultdict(list)
        for position in here:
            if position < len(text):
                next_positions[text[position]].append(position + 1)
        children = [node for node in shape.children[column].tolist() if node >= 0]
        for node, (token, following) in zip(children, next_positions.items(), strict=False):
            filled[node] = token
            pending.append((1 + node, following))
    return filled
