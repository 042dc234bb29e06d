"""Another language model as draft."""

from functools import lru_cache

import torch
from torch import Tensor

from mcsd.drafters.levels import Level, LevelDrafter, at_last, unread
from mcsd.models import Block, LanguageModel, TransformersModel
from mcsd.models.prefill import prefill
from mcsd.rng import Randomness
from mcsd.sampling import Settings
from mcsd.schemes import CandidateTree, Scheme
from mcsd.tree import TreeShape


class ModelDrafter(LevelDrafter):
    """Drafts with a language model.

    Args:
        model: the draft.
        vocab_size: the target's; what the draft's logits have beyond it is padding and is cut off.
        rows, slots: size of the cache; slots must hold the longest text and a tree.
    """

    def __init__(self, model: LanguageModel, vocab_size: int, rows: int, slots: int) -> None:
        trimmed = model.vocabulary if isinstance(model, TransformersModel) else None
        super().__init__(model.device, trimmed, vocab_size)
        self.name = model.name
        self.model = model
        self.weight_bytes = getattr(model, "weight_bytes", 0)
        self._cache = model.new_cache(rows, slots)
        self._rank = torch.empty(0, dtype=torch.int64)

    def add(self, prompt: list[int], hidden: Tensor | None) -> None:
        """See `Drafter.add`."""
        self._cache.add()

    def draft(
        self, texts: list[list[int]], shape: TreeShape, scheme: Scheme, settings: Settings, random: Randomness
    ) -> CandidateTree:
        """See `Drafter.draft`."""
        self._rank = _ranks(shape).to(self.model.device)
        return super().draft(texts, shape, scheme, settings, random)

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

    def _catch_up(self, row: int, tokens: list[int]) -> None:
        prefill(self.model, self._cache, row, tokens)

    def _root(self, texts: list[list[int]]) -> Tensor:
        cache, device = self._cache, self.model.device
        tokens, counts = unread(texts, cache.lengths.tolist(), device)
        longest = tokens.shape[1]
        logits = self.model.forward(tokens, Block.chain(longest), cache).logits
        cache.commit(torch.arange(longest, device=device).expand(len(texts), -1), counts)
        return at_last(logits, counts)

    def _level(self, tokens: Tensor, level: Level) -> Tensor:
        assert level.block is not None
        return self.model.forward(tokens, level.block, self._cache).logits


@lru_cache(maxsize=64)
def _ranks(shape: TreeShape) -> Tensor:
    """int64 ``[n]``: the place of each node among those the draft reads, -1 for leaves."""
    ranks = torch.full((len(shape),), -1, dtype=torch.int64)
    read = [node for level in shape.levels[1:] for node in level]
    ranks[read] = torch.arange(len(read))
    return ranks
