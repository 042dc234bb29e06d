"""Another language model as draft."""

from functools import cache

import torch
from torch import Tensor

from mcsd.drafters.level import Level, LevelDrafter, PendingTokens
from mcsd.models import DecoderModel, LanguageModel, TokenLayout
from mcsd.models.prefill import prefill
from mcsd.models.prefix_cache import MAX_TEXTS, PrefixCache
from mcsd.schemes.mixed_shape import MixedShape
from mcsd.tree import TreeShape


class ModelDrafter(LevelDrafter):
    """Drafts with a language model.

    Args:
        model: the draft.
        vocab_size: the target's; logits of the draft beyond it are padding and are cut off.
        max_batch, slots: size of the cache; slots must hold the longest sequence and a tree.
        max_texts: of its prefix cache.
    """

    def __init__(
        self, model: LanguageModel, vocab_size: int, max_batch: int, slots: int, max_texts: int = MAX_TEXTS
    ) -> None:
        draft_vocabulary = model.vocabulary if isinstance(model, DecoderModel) else None
        super().__init__(model.device, draft_vocabulary, vocab_size, getattr(model, "captures", False))
        self.name = model.name
        self.model = model
        self.cache = model.new_cache(max_batch, slots)
        self.prefixes = PrefixCache(self.cache, max_texts)

    def add(self, prompt: list[int], hidden: Tensor | None) -> None:
        """See `Drafter.add`."""
        self.cache.add()

    def commit(self, path: Tensor, paths: list[list[int]], hidden: Tensor | None) -> None:
        """See `Drafter.commit`."""
        # The draft has not read leaves. The ancestors of an inner node are inner, so the nodes it has read come first.
        path = path[:, :-1]
        indices = _in_flight_indices(self.tree)
        if max(indices, default=-1) < 0:
            return
        self.graphs.run(("commit", self.tree), self._keep, path, generation=self.cache.generation)
        self.cache.advance([sum(indices[node] >= 0 for node in nodes) for nodes in paths])

    def _keep(self, path: Tensor) -> tuple[Tensor, ...]:
        """`Cache.keep` the nodes ``[B, depth - 1]`` that were read. A captured function: see `GraphCache`."""
        indices = _indices_on(self.tree, self.model.device)[path]
        self.cache.keep(indices, ((path >= 0) & (indices >= 0)).sum(-1))
        return ()

    def remove(self, sequence: int) -> None:
        """See `Drafter.remove`."""
        self.cache.remove(sequence)

    def clear(self) -> None:
        """See `Drafter.clear`."""
        self.cache.clear()

    def _prefill(self, sequence: int, tokens: list[int]) -> None:
        prefill(self.model, self.cache, sequence, tokens)

    def _root_logits(self, pending: PendingTokens, *states: Tensor) -> Tensor:
        layout = TokenLayout.chain(pending.tokens.shape[1], self.model.device)
        logits = self.model.forward(pending.tokens, layout, self.cache).logits
        pending.commit(self.cache)
        return pending.last(logits)

    def _level_logits(self, tokens: Tensor, level: Level) -> Tensor:
        assert level.layout is not None
        return self.model.forward(tokens, level.layout, self.cache).logits


@cache
def _in_flight_indices(tree: TreeShape | MixedShape) -> list[int]:
    """The index of each node among those the draft reads; -1 for leaves, and for nodes that it has not drafted."""
    drawn = tree.drawn if isinstance(tree, MixedShape) else tree
    read = [node for level in drawn.levels[1:] for node in level]
    indices = {node: index for index, node in enumerate(read)}
    nodes = tree.drawn_nodes if isinstance(tree, MixedShape) else range(len(tree))
    return [indices.get(node, -1) for node in nodes]


@cache
def _indices_on(tree: TreeShape | MixedShape, device: torch.device) -> Tensor:
    """`_in_flight_indices` on a device, int64 ``[n]``."""
    return torch.tensor(_in_flight_indices(tree), dtype=torch.int64, device=device)
