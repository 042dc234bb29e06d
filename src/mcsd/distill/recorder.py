"""A drafter that drafts nothing and keeps what the target thought: hidden states of every token it has read."""

import torch
from torch import Tensor

from mcsd.drafters import Drafter
from mcsd.rng import Randomness
from mcsd.sampling import Settings
from mcsd.schemes import CandidateTree, Scheme
from mcsd.tree import TreeShape


class Recorder(Drafter):
    """Rides along in an engine that decodes plainly.

    Args:
        layers: whose hidden states are kept, as in `mcsd.models.Output`.
    """

    name = "recorder"
    draws = False

    def __init__(self, layers: tuple[int, ...]) -> None:
        self.hidden = layers
        self._rows: list[tuple[list[int], list[Tensor]]] = []
        self._ended: dict[tuple[int, ...], Tensor] = {}

    def states(self, text: list[int]) -> Tensor:
        """The states ``[len(text) - 1, F]`` of a text that runs or has just ended; its last token was not read."""
        read = text[:-1]
        if tuple(read) in self._ended:
            return self._ended[tuple(read)]
        return next(torch.cat(states) for running, states in self._rows if running == read)

    def forget(self) -> None:
        """Drop the texts that have ended."""
        self._ended.clear()

    def add(self, prompt: list[int], hidden: Tensor | None) -> None:
        """See `Drafter.add`."""
        self._rows.append((prompt[:-1], [] if hidden is None else [hidden[0]]))

    def draft(
        self, texts: list[list[int]], shape: TreeShape, scheme: Scheme, settings: Settings, random: Randomness
    ) -> CandidateTree:
        """See `Drafter.draft`."""
        for text, (read, _) in zip(texts, self._rows, strict=True):
            read.append(text[-1])
        return CandidateTree.none(len(texts), settings.temperature.device)

    def commit(self, path: Tensor, accepted: Tensor, hidden: Tensor | None) -> None:
        """See `Drafter.commit`."""
        assert hidden is not None
        for states, (_, kept) in zip(hidden, self._rows, strict=True):
            kept.append(states[:1].clone())

    def remove(self, row: int) -> None:
        """See `Drafter.remove`."""
        read, states = self._rows[row]
        self._ended[tuple(read)] = torch.cat(states)
        self._rows[row] = self._rows[-1]
        self._rows.pop()

    def clear(self) -> None:
        """See `Drafter.clear`."""
        self._rows.clear()
