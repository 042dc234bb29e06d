"""A drafter without candidates that collects the target's hidden states of all tokens it processes."""

import torch
from torch import Tensor

from mcsd.drafters import Drafter
from mcsd.rng import Randomness
from mcsd.sampling import BatchSamplingParams
from mcsd.schemes import CandidateTree, Scheme
from mcsd.tree import TreeShape


class HiddenStateCollector(Drafter):
    """Collects hidden states in an engine without candidates.

    Args:
        layers: whose hidden states are collected, as in `mcsd.models.ModelOutput`; none: the states have size 0.
    """

    name = "hidden-states"
    is_sampled = False

    def __init__(self, layers: tuple[int, ...]) -> None:
        self.hidden_layers = layers
        self._running: list[tuple[list[int], list[Tensor]]] = []
        self._finished: dict[tuple[int, ...], Tensor] = {}

    def hidden_states(self, text: list[int]) -> Tensor:
        """The hidden states ``[len(text) - 1, F]`` of a running or finished text; its last token was not processed."""
        read = text[:-1]
        if not self.hidden_layers:
            return torch.empty(len(read), 0)
        if tuple(read) in self._finished:
            return self._finished[tuple(read)]
        return next(torch.cat(states) for tokens, states in self._running if tokens == read)

    def drop_finished(self) -> None:
        """Drop the hidden states of finished texts."""
        self._finished.clear()

    @property
    def sequences(self) -> int:
        """See `Drafter.sequences`."""
        return len(self._running)

    def add(self, prompt: list[int], hidden: Tensor | None) -> None:
        """See `Drafter.add`."""
        self._running.append((prompt[:-1], [] if hidden is None else [hidden[0]]))

    def draft(
        self,
        token_ids: list[list[int]],
        shape: TreeShape,
        scheme: Scheme,
        sampling: BatchSamplingParams,
        random: Randomness,
    ) -> CandidateTree:
        """See `Drafter.draft`."""
        for text, (read, _) in zip(token_ids, self._running, strict=True):
            read.append(text[-1])
        return CandidateTree.none(len(token_ids), sampling.temperature.device)

    def commit(self, path: Tensor, paths: list[list[int]], hidden: Tensor | None) -> None:
        """See `Drafter.commit`."""
        if hidden is not None:
            for states, (_, kept) in zip(hidden, self._running, strict=True):
                kept.append(states[:1].clone())

    def remove(self, sequence: int) -> None:
        """See `Drafter.remove`."""
        read, states = self._running[sequence]
        if states:
            self._finished[tuple(read)] = torch.cat(states)
        self._running[sequence] = self._running[-1]
        self._running.pop()

    def clear(self) -> None:
        """See `Drafter.clear`."""
        self._running.clear()
