"""Another language model as draft: one forward a level of the tree, q cut to its likeliest tokens."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mcsd.drafters.base import Drafter
from mcsd.models import Block, LanguageModel
from mcsd.models.prefill import prefill
from mcsd.rng import Randomness
from mcsd.sampling import Settings, SparseDistributions, sparse_probabilities
from mcsd.schemes import CandidateTree, Scheme
from mcsd.tree import TreeShape

SUPPORT = 64
"""Tokens of the draft's distribution that candidates are drawn from."""


class ModelDrafter(Drafter):
    """Drafts with a language model.

    Args:
        model: the draft.
        vocab_size: the target's; what the draft's logits have beyond it is padding and is cut off.
        rows, slots: size of the cache; slots must hold the longest text and a tree.
    """

    def __init__(self, model: LanguageModel, vocab_size: int, rows: int, slots: int) -> None:
        self.name = model.name
        self.model = model
        self._vocab_size = min(vocab_size, model.vocab_size)
        self._cache = model.new_cache(rows, slots)
        self._rank = torch.empty(0, dtype=torch.int64)

    def add(self, prompt: list[int], hidden: Tensor | None) -> None:
        """See `Drafter.add`."""
        prefill(self.model, self._cache, self._cache.add(), prompt[:-1])

    def draft(
        self, texts: list[list[int]], shape: TreeShape, scheme: Scheme, settings: Settings, random: Randomness
    ) -> CandidateTree:
        """See `Drafter.draft`."""
        device = self.model.device
        batch, columns = len(texts), 1 + len(shape)
        levels = _levels(shape)
        width = min(SUPPORT, self._vocab_size)
        tokens, choice = torch.zeros(2, batch, len(shape), dtype=torch.int64, device=device)
        valid = torch.zeros(batch, len(shape), dtype=torch.bool, device=device)
        # A leaf has no distribution; its support must be distinct tokens all the same.
        support = torch.arange(width, device=device).repeat(batch, columns, 1)
        weights: Tensor | None = None
        failed = torch.zeros(batch, dtype=torch.bool, device=device)
        logits = self._catch_up(texts) if levels else None
        for level in levels:
            if level.block is not None:
                logits = self.model.forward(tokens[:, level.inner - 1], level.block, self._cache).logits
            assert logits is not None
            inner = len(level.inner)
            each = torch.arange(batch, device=device).repeat_interleave(inner)
            flat = logits[..., : self._vocab_size].reshape(batch * inner, -1)
            q = sparse_probabilities(flat, settings.select(each), width)
            level_q = q.weights.view(batch, inner, -1)
            failed |= level_q.isnan().flatten(1).any(-1)
            level_q = level_q.nan_to_num(1.0 / width)
            if weights is None:
                weights = torch.zeros(support.shape, dtype=level_q.dtype, device=device)
            weights[:, level.inner] = level_q
            support[:, level.inner] = q.support.view(batch, inner, -1)
            drawn = scheme.draw(level_q, level.count, settings.greedy, random)[:, level.parent, level.place]
            choice[:, level.kids] = drawn.clamp(min=0)
            tokens[:, level.kids] = support[:, level.inner[level.parent]].gather(2, choice[:, level.kids, None])[..., 0]
            above = level.inner[level.parent] - 1
            valid[:, level.kids] = (drawn >= 0) & (valid[:, above] if level.block is not None else True)
        self._rank = _ranks(shape).to(device)
        distributions = None if weights is None else SparseDistributions(support, weights)
        return CandidateTree(shape, tokens, valid, choice, distributions, failed)

    def commit(self, path: Tensor, accepted: Tensor, hidden: Tensor | None) -> None:
        """See `Drafter.commit`."""
        if not path.shape[1] or not len(self._rank):
            return
        # Leaves were never read by the draft; an inner node's ancestors are all inner, so what was read comes first.
        ranks = self._rank[path]
        self._cache.commit(ranks, ((path >= 0) & (ranks >= 0)).sum(-1))

    def remove(self, row: int) -> None:
        """See `Drafter.remove`."""
        self._cache.remove(row)

    def clear(self) -> None:
        """See `Drafter.clear`."""
        self._cache.clear()

    def _catch_up(self, texts: list[list[int]]) -> Tensor:
        """Read what was committed since the last draft, a token or two a row: logits ``[B, 1, V]`` after the root."""
        cache, device = self._cache, self.model.device
        pending = [text[length:] for text, length in zip(texts, cache.lengths.tolist(), strict=False)]
        longest = max(map(len, pending))
        padded = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in pending], device=device)
        counts = torch.tensor([len(tokens) for tokens in pending], device=device)
        logits = self.model.forward(padded, Block.chain(longest), cache).logits
        cache.commit(torch.arange(longest, device=device).expand(len(texts), -1), counts)
        return logits[torch.arange(len(texts), device=device), counts - 1][:, None]


@dataclass(frozen=True)
class _Level:
    """One forward of the draft. Inner nodes are named by column (root 0, node i is 1 + i).

    Attributes:
        inner: int64 ``[N]``, the inner nodes of this depth.
        count: the most children any of them has.
        kids: int64 ``[K]``, all their children, as nodes; parent, place: int64 ``[K]``, index of the parent in
            ``inner`` and of the child among its siblings.
        block: how the inner nodes stand to those of earlier levels; None for the root, which is committed by then.
    """

    inner: Tensor
    count: int
    kids: Tensor
    parent: Tensor
    place: Tensor
    block: Block | None


@lru_cache(maxsize=64)
def _levels(shape: TreeShape) -> tuple[_Level, ...]:
    levels = []
    known: list[int] = []
    for depth, nodes in enumerate(shape.levels):
        inner = torch.tensor(nodes) + 1
        block = None
        if depth > 0:
            known += inner.tolist()
            block = Block(shape.offsets[known] - 1, shape.mask[inner][:, known])
        table = shape.children[inner]
        parent, place = (table >= 0).nonzero(as_tuple=True)
        levels.append(_Level(inner, int(place.max()) + 1, table[parent, place], parent, place, block))
    return tuple(levels)


@lru_cache(maxsize=64)
def _ranks(shape: TreeShape) -> Tensor:
    """int64 ``[n]``: the place of each node among those the draft reads, -1 for leaves."""
    ranks = torch.full((len(shape),), -1, dtype=torch.int64)
    read = [node for level in shape.levels[1:] for node in level]
    ranks[read] = torch.arange(len(read))
    return ranks
