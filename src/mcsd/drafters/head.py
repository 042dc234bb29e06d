"""A head on the target's own hidden states as draft: one small forward a level of the tree."""

import torch
from torch import Tensor

from mcsd.drafters.levels import Level, LevelDrafter, at_last, unread
from mcsd.models import Block
from mcsd.models.cache import KeyValueCache
from mcsd.models.head import BoundHead
from mcsd.models.prefill import CHUNK


class HeadDrafter(LevelDrafter):
    """Drafts with a head.

    The head reads token t together with the target's states at t-1. In a tree it has its own states instead; what it
    read so is not kept, and is read again with the target's states once it is committed.

    Args:
        head: bound to the target.
        rows, slots: size of the cache; slots must hold the longest text and a tree.
    """

    def __init__(self, head: BoundHead, rows: int, slots: int) -> None:
        super().__init__(head.device, head.vocabulary, len(head.vocabulary))
        self.name = head.name
        self.hidden = head.config.states
        self.head = head
        self.weight_bytes = head.weight_bytes
        self._cache: KeyValueCache = head.new_cache(rows, slots)
        self._states: list[list[Tensor]] = []
        """For each row, in pieces ``[c, F]``: the target's states before each of its unread tokens."""
        self._drafted = torch.empty(0)
        """``[B, N, H]``: the head's own states at the last level it read."""

    def add(self, prompt: list[int], hidden: Tensor | None) -> None:
        """See `Drafter.add`."""
        self._cache.add()
        size = len(self.hidden) * self.head.config.hidden_size
        states = torch.zeros(1, 1, size, dtype=self.head.dtype, device=self._device)
        if hidden is not None:
            states = torch.cat([states, hidden], dim=1)
        self._states.append([states[0]])

    def commit(self, path: Tensor, accepted: Tensor, hidden: Tensor | None) -> None:
        """See `Drafter.commit`."""
        assert hidden is not None
        # Behind the root and the path comes the target's own token: as many unread tokens as there are states.
        counts = (accepted + 1).tolist()
        for pieces, states, count in zip(self._states, hidden, counts, strict=True):
            pieces.append(states[:count])

    def remove(self, row: int) -> None:
        """See `Drafter.remove`."""
        self._cache.remove(row)
        self._states[row] = self._states[-1]
        self._states.pop()

    def clear(self) -> None:
        """See `Drafter.clear`."""
        self._cache.clear()
        self._states.clear()

    def _catch_up(self, row: int, tokens: list[int]) -> None:
        states = torch.cat(self._states[row])
        rows = slice(row, row + 1)
        for start in range(0, len(tokens), CHUNK):
            piece = torch.tensor([tokens[start : start + CHUNK]], device=self._device)
            length = piece.shape[1]
            before = states[None, start : start + length]
            self.head.forward(piece, before, Block.chain(length), self._cache, rows, logits=False)
            keep = torch.arange(length, device=self._device)[None]
            self._cache.commit(keep, torch.tensor([length], device=self._device), rows)
        self._states[row] = [states[len(tokens) :].clone()]

    def _root(self, texts: list[list[int]]) -> Tensor:
        tokens, counts = unread(texts, self._cache.lengths.tolist(), self._device)
        # Of a row that was copied, the states of what another has read are still there.
        known = [torch.cat(pieces)[-count:] for pieces, count in zip(self._states, counts.tolist(), strict=True)]
        alone = len(known) == 1
        states = known[0][None] if alone else torch.nn.utils.rnn.pad_sequence(known, batch_first=True)
        longest = tokens.shape[1]
        output = self.head.forward(tokens, states, Block.chain(longest), self._cache)
        self._cache.commit(torch.arange(longest, device=self._device).expand(len(texts), -1), counts)
        self._states = [[] for _ in texts]
        assert output.hidden is not None
        self._drafted = at_last(output.hidden, counts)
        return at_last(output.logits, counts)

    def _level(self, tokens: Tensor, level: Level) -> Tensor:
        assert level.block is not None
        states = self._drafted[:, level.above]
        output = self.head.forward(tokens, states, level.block, self._cache, own=True)
        assert output.hidden is not None
        self._drafted = output.hidden
        return output.logits
