"""Another language model as draft."""

from collections.abc import Sequence
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
        self._starts: list[int] = []
        """The first token of each sequence that is read: see `skip`."""
        self._kept_starts: list[int] = [0]
        """Those of the texts in the prefix cache, the latest ones, and 0."""

    def add(self, prompt: list[int], hidden: Tensor | None) -> None:
        """See `Drafter.add`."""
        self.cache.add()
        self._starts.append(0)

    def unread(self, token_ids: list[list[int]]) -> list[int]:
        """See `Drafter.unread`."""
        return [self._unread(sequence, tokens) for sequence, tokens in enumerate(self._whole_texts(token_ids))]

    def _unread(self, sequence: int, tokens: list[int]) -> int:
        """`unread` of one sequence. If nothing of it has been read, it will start like the best kept text."""
        read = self.cache.host_lengths[sequence]
        if not read:
            matches = [(start, self.prefixes.match(tokens[start:-1])) for start in self._kept_starts]
            start, read = max(matches, key=lambda match: sum(match) if match[1] else 0)
            self._starts[sequence] = start if read else 0
        length = len(tokens) - self._starts[sequence]
        return length - 1 - read if self._lags(sequence, length) else 0

    def skip(self, token_ids: list[list[int]], most: Sequence[int]) -> None:
        """See `Drafter.skip`."""
        for sequence, (tokens, count) in enumerate(zip(self._whole_texts(token_ids), most, strict=True)):
            if self._unread(sequence, tokens) > count:
                self._starts[sequence] = len(tokens) - 1 - count
                self.cache.truncate(sequence, 0)

    def _whole_texts(self, token_ids: list[list[int]]) -> list[list[int]]:
        """The texts in the draft's own tokens, before anything is skipped."""
        return token_ids

    def _texts(self, token_ids: list[list[int]]) -> list[list[int]]:
        both = zip(self._whole_texts(token_ids), self._starts, strict=True)
        return [tokens[start:] if start else tokens for tokens, start in both]

    def keep(self, sequence: int, token_ids: list[int]) -> None:
        """See `Drafter.keep`."""
        start = self._starts[sequence]
        super().keep(sequence, token_ids[start:])
        if start not in self._kept_starts:
            self._kept_starts = [0, start, *self._kept_starts[1 : self.prefixes.max_texts]]

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
        self._starts[sequence] = self._starts[-1]
        self._starts.pop()

    def clear(self) -> None:
        """See `Drafter.clear`."""
        self.cache.clear()
        self._starts.clear()

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
