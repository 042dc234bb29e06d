"""Drafting a tree level by level: one forward a level, q cut to its likeliest tokens."""

from abc import abstractmethod
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mcsd.drafters.base import Drafter
from mcsd.models import Block, Cache
from mcsd.rng import Randomness
from mcsd.sampling import Settings, SparseDistributions, sparse_probabilities
from mcsd.schemes import CandidateTree, Scheme
from mcsd.tree import TreeShape

SUPPORT = 64
"""Tokens of the draft's distribution that candidates are drawn from."""

TOGETHER = 32
"""Unread tokens that rows read in one forward. One that lags by more, after plain decoding, catches up by itself: side
by side, all rows would have to be filled up to it."""


class LevelDrafter(Drafter):
    """Asks a subclass for the logits of one level after the other.

    Args:
        device: where it computes.
        vocabulary: int64 ``[K]``, the token that each logit stands for; None: its own number.
        limit: logits that count; what there is beyond them is padding.
    """

    _cache: Cache

    def __init__(self, device: torch.device, vocabulary: Tensor | None, limit: int) -> None:
        self._device = device
        self._vocabulary = vocabulary
        self._limit = limit

    @property
    def token_bytes(self) -> int:
        """See `Drafter.token_bytes`."""
        return self._cache.token_bytes

    def read(self, texts: list[list[int]]) -> None:
        """See `Drafter.read`: one row at a time, all tokens but the last."""
        begun: dict[tuple[int, ...], int] = {}
        for row, (text, known) in enumerate(zip(texts, self._cache.lengths.tolist(), strict=False)):
            if not known and len(text) > 1:
                # Rows that begin with the same text are read once.
                like = begun.setdefault(tuple(text[:-1]), row)
                if like != row:
                    self._cache.copy(like, row)
                    continue
            elif len(text) - known <= TOGETHER:
                continue
            self._catch_up(row, text[known:-1])

    @abstractmethod
    def _catch_up(self, row: int, tokens: list[int]) -> None:
        """Read and commit the first unread tokens of a row."""

    @abstractmethod
    def _root(self, texts: list[list[int]]) -> Tensor:
        """Read what was committed since the last draft, the root included: logits ``[B, 1, K]`` after the root."""

    @abstractmethod
    def _level(self, tokens: Tensor, level: "Level") -> Tensor:
        """Read the inner nodes of a level, ``tokens [B, N]``: logits ``[B, N, K]`` after them."""

    def draft(
        self, texts: list[list[int]], shape: TreeShape, scheme: Scheme, settings: Settings, random: Randomness
    ) -> CandidateTree:
        """See `Drafter.draft`."""
        device = self._device
        batch, columns = len(texts), 1 + len(shape)
        if not len(shape):
            return CandidateTree.none(batch, device)
        tokens, choice = torch.zeros(2, batch, len(shape), dtype=torch.int64, device=device)
        valid = torch.zeros(batch, len(shape), dtype=torch.bool, device=device)
        failed = torch.zeros(batch, dtype=torch.bool, device=device)
        support, weights = torch.empty(0), None
        for level in levels_of(shape):
            above = tokens[:, level.inner - 1]
            logits = self._root(texts) if level.block is None else self._level(above, level)
            inner = len(level.inner)
            each = torch.arange(batch, device=device).repeat_interleave(inner)
            flat = logits[..., : self._limit].reshape(batch * inner, -1)
            width = min(SUPPORT, flat.shape[-1])
            q = sparse_probabilities(flat, settings.select(each), width)
            level_q = q.weights.view(batch, inner, -1)
            failed |= level_q.isnan().flatten(1).any(-1)
            level_q = level_q.nan_to_num(1.0 / width)
            if weights is None:
                weights = torch.zeros(batch, columns, width, dtype=level_q.dtype, device=device)
                # A leaf has no distribution; its support must be distinct tokens all the same.
                support = torch.arange(width, device=device).repeat(batch, columns, 1)
            named = q.support if self._vocabulary is None else self._vocabulary[q.support]
            weights[:, level.inner] = level_q
            support[:, level.inner] = named.view(batch, inner, -1)
            drawn = scheme.draw(level_q, level.counts, settings.greedy, random)[:, level.parent, level.place]
            choice[:, level.kids] = drawn.clamp(min=0)
            tokens[:, level.kids] = support[:, level.inner[level.parent]].gather(2, choice[:, level.kids, None])[..., 0]
            parents = level.inner[level.parent] - 1
            valid[:, level.kids] = (drawn >= 0) & (valid[:, parents] if level.block is not None else True)
        distributions = None if weights is None else SparseDistributions(support, weights)
        return CandidateTree(shape, tokens, valid, choice, distributions, failed)


def unread(texts: list[list[int]], lengths: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """What each text has beyond its first tokens: int64 ``[B, longest]``, padded with 0, and the counts ``[B]``."""
    pending = [text[length:] for text, length in zip(texts, lengths, strict=False)]
    longest = max(map(len, pending))
    padded = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in pending], device=device)
    return padded, torch.tensor([len(tokens) for tokens in pending], device=device)


@dataclass(frozen=True)
class Level:
    """One forward of the draft. Inner nodes are named by column (root 0, node i is 1 + i).

    Attributes:
        inner: int64 ``[N]``, the inner nodes of this depth.
        above: int64 ``[N]``, the place of each one's parent in ``inner`` of the level before; empty for the root.
        counts: how many children each of them has.
        kids: int64 ``[K]``, all their children, as nodes; parent, place: int64 ``[K]``, index of the parent in
            ``inner`` and of the child among its siblings.
        block: how the inner nodes stand to those of earlier levels; None for the root, which is committed by then.
    """

    inner: Tensor
    above: Tensor
    counts: tuple[int, ...]
    kids: Tensor
    parent: Tensor
    place: Tensor
    block: Block | None


@lru_cache(maxsize=64)
def levels_of(shape: TreeShape) -> tuple[Level, ...]:
    """The levels of a tree."""
    levels = []
    known: list[int] = []
    for depth, nodes in enumerate(shape.levels):
        inner = torch.tensor(nodes) + 1
        before = shape.levels[depth - 1] if depth > 0 else ()
        above = torch.tensor([before.index(shape.parents[node]) for node in nodes if node >= 0], dtype=torch.int64)
        block = None
        if depth > 0:
            known += inner.tolist()
            block = Block(shape.offsets[known] - 1, shape.mask[inner][:, known])
        table = shape.children[inner]
        parent, place = (table >= 0).nonzero(as_tuple=True)
        levels.append(
            Level(inner, above, tuple((table >= 0).sum(-1).tolist()), table[parent, place], parent, place, block)
        )
    return tuple(levels)
