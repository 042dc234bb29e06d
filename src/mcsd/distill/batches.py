"""Training batches: the batch of each step depends on the seed and the step alone."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mcsd.distill.corpus import Record

HiddenStates = Callable[[Tensor], Tensor]
"""Computes the target's hidden states ``[B, T, F]`` of texts ``[B, T]`` that are padded on the right."""

_GROUP = 16
"""Batches whose texts are sorted by length together, to reduce padding."""


@dataclass(frozen=True)
class Batch:
    """Texts padded on the right.

    Attributes:
        tokens: int64 ``[B, T]``.
        hidden_states: float32 ``[B, T, F]``, the target's at these tokens.
        positions: int64 ``[N]``, indices into ``B * T`` of the tokens whose next token is predicted.
    """

    tokens: Tensor
    hidden_states: Tensor
    positions: Tensor

    def to(self, device: torch.device) -> "Batch":
        """The batch on another device."""
        return Batch(self.tokens.to(device), self.hidden_states.to(device), self.positions.to(device))


class Batches:
    """An endless sequence of batches.

    Args:
        records: training texts, at least one.
        batch_size: texts per batch.
        max_positions: per batch.
        first_position: earlier positions of a text are not trained on.
        seed: of the order and the positions.
        compute: the hidden states, if the records have none.
    """

    def __init__(
        self,
        records: Sequence[Record],
        batch_size: int,
        max_positions: int,
        first_position: int,
        seed: int,
        compute: HiddenStates | None = None,
    ) -> None:
        self._records = records
        self._batch_size = min(batch_size, len(records))
        self._max_positions = max_positions
        self._first_position = first_position
        self._seed = seed
        self._compute = compute
        digest = hashlib.sha256()
        for record in records:
            digest.update(f"{record.index} {len(record.tokens)} ".encode() + record.tokens.numpy().tobytes())
        self.texts = digest.hexdigest()
        """Names the texts: a run that is resumed must have the same ones."""
        self._order: dict[int, list[list[int]]] = {}

    def __getitem__(self, step: int) -> Batch:
        """The batch of a step, from 0 on."""
        batches = len(self._records) // self._batch_size
        epoch, index = divmod(step, batches)
        if epoch not in self._order:
            self._order = {epoch: self._shuffled(epoch)}
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + step)
        records = [self._records[i] for i in self._order[epoch][index]]
        return collate(records, self._max_positions, self._first_position, generator, self._compute)

    def _shuffled(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 - 1 - epoch)
        order = torch.randperm(len(self._records), generator=generator).tolist()
        size = self._batch_size * _GROUP
        batches: list[list[int]] = []
        for start in range(0, len(order), size):
            group = sorted(order[start : start + size], key=lambda i: len(self._records[i].tokens))
            batches += [group[i : i + self._batch_size] for i in range(0, len(group), self._batch_size)]
        whole = [batch for batch in batches if len(batch) == self._batch_size]
        return [whole[i] for i in torch.randperm(len(whole), generator=generator).tolist()]


def collate(
    records: Sequence[Record],
    max_positions: int,
    first_position: int,
    generator: torch.Generator,
    compute: HiddenStates | None = None,
) -> Batch:
    """Pad texts to a batch and choose up to ``max_positions`` positions, from ``first_position`` on, to train on."""
    longest = max(len(record.tokens) for record in records)
    tokens = torch.zeros(len(records), longest, dtype=torch.int64)
    trained = torch.zeros(len(records), longest, dtype=torch.bool)
    for i, record in enumerate(records):
        length = len(record.tokens)
        tokens[i, :length] = record.tokens
        trained[i, max(first_position, record.answer - 1) : length] = True
    positions = trained.flatten().nonzero()[:, 0]
    chosen = torch.randperm(len(positions), generator=generator)[:max_positions].sort().values
    return Batch(tokens, compute(tokens) if compute else _stored(records, longest), positions[chosen])


def _stored(records: Sequence[Record], longest: int) -> Tensor:
    """The hidden states of texts, padded with zeros."""
    hidden_states = torch.zeros(len(records), longest, records[0].hidden_states.shape[-1])
    for i, record in enumerate(records):
        hidden_states[i, : len(record.tokens)] = record.hidden_states.float()
    return hidden_states
