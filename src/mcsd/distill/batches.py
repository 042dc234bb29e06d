"""Records in batches: which ones each step reads is a function of the seed and the step alone."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mcsd.distill.corpus import Record

_GROUP = 16
"""Batches that are sorted by length together, so that little is padding."""


@dataclass(frozen=True)
class Batch:
    """Texts side by side, filled up on the right.

    Attributes:
        tokens: int64 ``[B, T]``.
        states: float32 ``[B, T, F]``, the target's at these tokens.
        positions: int64 ``[N]``, indices into ``B * T`` of tokens whose next token is to be learned.
    """

    tokens: Tensor
    states: Tensor
    positions: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The same on another device."""
        return Batch(self.tokens.to(device), self.states.to(device), self.positions.to(device))


class Batches:
    """An endless order of batches.

    Args:
        records: to learn from, at least one.
        rows: texts a batch.
        count: positions a batch at most.
        first: positions of a text before this one are not learned.
        seed: of the order and the positions.
    """

    def __init__(self, records: Sequence[Record], rows: int, count: int, first: int, seed: int) -> None:
        self._records = records
        self._rows = min(rows, len(records))
        self._count = count
        self._first = first
        self._seed = seed
        self._order: dict[int, list[list[int]]] = {}

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step, from 0 on, without end."""
        each = len(self._records) // self._rows
        epoch, place = divmod(step, each)
        if epoch not in self._order:
            self._order = {epoch: self._shuffled(epoch)}
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        return collate([self._records[i] for i in self._order[epoch][place]], self._count, self._first, generator)

    def _shuffled(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 - 1 - epoch)
        order = torch.randperm(len(self._records), generator=generator).tolist()
        size = self._rows * _GROUP
        batches: list[list[int]] = []
        for start in range(0, len(order), size):
            group = sorted(order[start : start + size], key=lambda i: len(self._records[i].tokens))
            batches += [group[i : i + self._rows] for i in range(0, len(group), self._rows)]
        whole = [batch for batch in batches if len(batch) == self._rows]
        return [whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()]


def collate(records: Sequence[Record], count: int, first: int, generator: torch.Generator) -> Batch:
    """Put texts side by side and choose ``count`` positions to learn, of those at ``first`` and later."""
    longest = max(len(record.tokens) for record in records)
    tokens = torch.zeros(len(records), longest, dtype=torch.int64)
    states = torch.zeros(len(records), longest, records[0].states.shape[-1])
    learned = torch.zeros(len(records), longest, dtype=torch.bool)
    for row, record in enumerate(records):
        length = len(record.tokens)
        tokens[row, :length] = record.tokens
        states[row, :length] = record.states.float()
        learned[row, max(first, record.answer - 1) : length] = True
    places = learned.flatten().nonzero()[:, 0]
    chosen = torch.randperm(len(places), generator=generator)[:count].sort().values
    return Batch(tokens, states, places[chosen])
