"""Drafting without a draft: what followed the last tokens when they stood in the text before."""

from collections import defaultdict

import torch
from torch import Tensor

from mcsd.drafters.base import Drafter
from mcsd.rng import Randomness
from mcsd.sampling import Settings
from mcsd.schemes import CandidateTree, Scheme
from mcsd.tree import TreeShape

_LONGEST = 4
"""Tokens of the longest context that is looked up; shorter ones follow."""

_PLACES = 16
"""Earlier places whose continuations are merged, the best context and the latest place first."""


class NgramDrafter(Drafter):
    """Merges the continuations of earlier occurrences of the last tokens into a tree (prompt look-up, Saxena 2023).

    The candidates are not drawn from a distribution, so a scheme that needs no q judges them.

    Args:
        device: where the target computes.
    """

    name = "ngram"
    draws = False

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rows: list[_Index] = []

    def add(self, prompt: list[int], hidden: Tensor | None) -> None:
        """See `Drafter.add`."""
        self._rows.append(_Index())

    def draft(
        self, texts: list[list[int]], shape: TreeShape, scheme: Scheme, settings: Settings, random: Randomness
    ) -> CandidateTree:
        """See `Drafter.draft`."""
        found: list[dict[int, int]] = []
        for text, index in zip(texts, self._rows if len(shape) else (), strict=len(shape) > 0):
            index.read(text)
            found.append(_merge(text, index.places(text), shape))
        if not any(found):
            shape = TreeShape.parse("none")
        tokens = torch.zeros(len(texts), len(shape), dtype=torch.int64)
        valid = torch.zeros(len(texts), len(shape), dtype=torch.bool)
        for row, nodes in enumerate(found):
            for node, token in nodes.items():
                tokens[row, node], valid[row, node] = token, True
        failed = torch.zeros(len(texts), dtype=torch.bool, device=self._device)
        tokens = tokens.to(self._device)
        return CandidateTree(shape, tokens, valid.to(self._device), torch.zeros_like(tokens), None, failed)

    def commit(self, path: Tensor, accepted: Tensor, hidden: Tensor | None) -> None:
        """Nothing to keep: the text itself is the state."""

    def remove(self, row: int) -> None:
        """See `Drafter.remove`."""
        self._rows[row] = self._rows[-1]
        self._rows.pop()

    def clear(self) -> None:
        """See `Drafter.clear`."""
        self._rows.clear()


class _Index:
    """Where each n-gram of a text ends, for n up to `_LONGEST`."""

    def __init__(self) -> None:
        self._ends: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        self._read = 0

    def read(self, text: list[int]) -> None:
        """Take in what is new in the text, but for its last token, which nothing follows yet."""
        for end in range(self._read, len(text) - 1):
            for n in range(1, min(_LONGEST, end + 1) + 1):
                self._ends[tuple(text[end + 1 - n : end + 1])].append(end)
        self._read = max(self._read, len(text) - 1)

    def places(self, text: list[int]) -> list[int]:
        """Positions of what followed the last tokens before, the longest context and the latest place first."""
        places: dict[int, None] = {}
        for n in range(min(_LONGEST, len(text)), 0, -1):
            for end in reversed(self._ends.get(tuple(text[-n:]), ())):
                if len(places) == _PLACES:
                    return list(places)
                places[end + 1] = None
        return list(places)


def _merge(text: list[int], places: list[int], shape: TreeShape) -> dict[int, int]:
    """Fill a tree: node to token. Children of a node stand in the order in which the places first name them."""
    filled: dict[int, int] = {}
    waiting = [(0, places)]
    while waiting:
        column, here = waiting.pop()
        follow: defaultdict[int, list[int]] = defaultdict(list)
        for place in here:
            if place < len(text):
                follow[text[place]].append(place + 1)
        kids = [kid for kid in shape.children[column].tolist() if kid >= 0]
        for kid, (token, after) in zip(kids, follow.items(), strict=False):
            filled[kid] = token
            waiting.append((1 + kid, after))
    return filled
