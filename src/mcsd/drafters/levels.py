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
        device, batch = self._device, len(texts)
        if not len(shape):
            return CandidateTree.none(batch, device)
        levels = levels_of(shape, device)
        laws: list[Tensor] = []
        supports: list[Tensor] = []
        # Nodes are numbered by depth: those of the levels one behind the other are those of the tree.
        tokens: list[Tensor] = []
        choices: list[Tensor] = []
        valid: list[Tensor] = []
        first: list[Tensor] = []
        for level in levels:
            inner = len(level.inner)
            if level.block is None:
                logits = self._root(texts)
            else:
                logits = self._level(tokens[-1].index_select(1, level.within), level)
            if logits.shape[-1] > self._limit:
                logits = logits[..., : self._limit]
            flat = logits.reshape(batch * inner, -1)
            # Nothing is drawn at temperature 0: nobody asks for more of the draft's distribution than its candidates.
            width = max(level.counts) if settings.all_greedy else SUPPORT
            q = sparse_probabilities(flat, settings.repeated(inner), width)
            weights, named = (part.view(batch, inner, -1) for part in (q.weights, q.support))
            # Where the draft gives no distribution, nothing is a number.
            first.append(weights[..., 0])
            level_q = weights.nan_to_num(1.0 / weights.shape[-1])
            if self._vocabulary is not None:
                named = self._vocabulary[named]
            drawn = scheme.draw(level_q, level.counts, settings.greedy, random)[:, level.parent, level.place]
            choice = drawn.clamp(min=0)
            there = drawn >= 0
            if valid:
                there &= valid[-1].index_select(1, level.within.index_select(0, level.parent))
            laws.append(level_q)
            supports.append(named)
            tokens.append(named.index_select(1, level.parent).gather(2, choice[..., None])[..., 0])
            choices.append(choice)
            valid.append(there)
        nodes = [torch.cat(parts, dim=1) for parts in (tokens, valid, choices)]
        failed = torch.cat(first, dim=1).isnan().any(-1)
        law = None if settings.all_greedy else _of_columns(shape, torch.cat(supports, dim=1), torch.cat(laws, dim=1))
        return CandidateTree(shape, nodes[0], nodes[1], nodes[2], law, failed)


def _of_columns(shape: TreeShape, support: Tensor, weights: Tensor) -> SparseDistributions:
    """``[B, 1 + n, S]`` of ``[B, N, S]`` at the inner nodes. A leaf has no distribution, and any distinct tokens."""
    leaves = torch.arange(weights.shape[-1], device=weights.device).expand(len(weights), 1 + len(shape), -1)
    columns = inner_columns(shape, weights.device)
    return SparseDistributions(
        leaves.index_copy(1, columns, support), weights.new_zeros(leaves.shape).index_copy(1, columns, weights)
    )


def unread(texts: list[list[int]], lengths: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """What each text has beyond its first tokens: int64 ``[B, longest]``, padded with 0, and the counts ``[B]``."""
    pending = [text[length:] for text, length in zip(texts, lengths, strict=False)]
    longest = max(map(len, pending))
    padded = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in pending], device=device)
    return padded, torch.tensor([len(tokens) for tokens in pending], device=device)


def at_last(read: Tensor, counts: Tensor) -> Tensor:
    """``[B, 1, ...]`` of ``read [B, n, ...]``: what each row has at the last of its own tokens, ``counts [B]``."""
    if len(read) == 1:
        return read[:, -1:]
    return read[torch.arange(len(read), device=read.device), counts - 1][:, None]


@dataclass(frozen=True)
class Level:
    """One forward of the draft. Inner nodes are named by column (root 0, node i is 1 + i).

    Attributes:
        inner: int64 ``[N]``, the inner nodes of this depth.
        within: int64 ``[N]``, the place of each among all nodes of this depth; above: int64 ``[N]``, that of its parent
            in ``inner`` of the level before. Both are empty for the root.
        counts: how many children each of them has.
        parent, place: int64 ``[K]``, for each of all their children, which are the nodes of the next depth: index of
            its parent in ``inner``, and its own among its siblings.
        block: how the inner nodes stand to those of earlier levels; None for the root, which is committed by then.
    """

    inner: Tensor
    within: Tensor
    above: Tensor
    counts: tuple[int, ...]
    parent: Tensor
    place: Tensor
    block: Block | None


@lru_cache(maxsize=64)
def inner_columns(shape: TreeShape, device: torch.device) -> Tensor:
    """int64 ``[N]``: the inner nodes of all `levels_of` a tree."""
    return torch.cat([level.inner for level in levels_of(shape, device)])


@lru_cache(maxsize=64)
def levels_of(shape: TreeShape, device: torch.device) -> tuple[Level, ...]:
    """The levels of a tree."""
    levels = []
    known: list[int] = []
    for depth, nodes in enumerate(shape.levels):
        inner = torch.tensor(nodes) + 1
        within: list[int] = []
        above: list[int] = []
        block = None
        if depth > 0:
            before = shape.levels[depth - 1]
            within = [node - shape.depths.index(depth) for node in nodes]
            above = [before.index(shape.parents[node]) for node in nodes]
            known += inner.tolist()
            block = Block(shape.offsets[known] - 1, shape.mask[inner][:, known])
        there = shape.children[inner] >= 0
        parent, place = (part.to(device) for part in there.nonzero(as_tuple=True))
        here = torch.tensor([within, above], dtype=torch.int64, device=device)
        counts = tuple(there.sum(-1).tolist())
        levels.append(Level(inner.to(device), here[0], here[1], counts, parent, place, block))
    return tuple(levels)
