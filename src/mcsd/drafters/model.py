"""Another language model as draft."""

from functools import cache

import torch
from torch import Tensor

from mcsd.drafters.level import Level, LevelDrafter, PendingTokens
from mcsd.models import DecoderModel, LanguageModel, TokenLayout
from mcsd.models.prefill import prefill
from mcsd.models.prefix_cache import MAX_TEXTS, PrefixCache
from mcsd.rng import Randomness
from mcsd.sampling import BatchSamplingParams
from mcsd.schemes import CandidateTree, Scheme
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
        self._shape = TreeShape.parse("none")
        self._inner: frozenset[int] = frozenset()

    def add(self, prompt: list[int], hidden: Tensor | None) -> None:
        """See `Drafter.add`."""
        self.cache.add()

    def draft(
        self,
        token_ids: list[list[int]],
        shape: TreeShape,
        scheme: Scheme,
        sampling: BatchSamplingParams,
        random: Randomness,
    ) -> CandidateTree:
        """See `Drafter.draft`."""
        self._shape = shape
        self._inner = frozenset(shape.parents)
        return super().draft(token_ids, shape, scheme, sampling, random)

    def commit(self, path: Tensor, paths: list[list[int]], hidden: Tensor | None) -> None:
        """See `Drafter.commit`."""
        # The draft has not read leaves. The ancestors of an inner node are inner, so the nodes it has read come first.
        path = path[:, :-1]
        if not path.shape[1]:
            return
        self.graphs.run(("commit", self._shape), self._keep, path, generation=self.cache.generation)
        self.cache.advance([sum(node in self._inner for node in nodes) for nodes in paths])

    def _keep(self, path: Tensor) -> tuple[Tensor, ...]:
        """`Cache.keep` the nodes ``[B, depth - 1]`` that were read. A captured function: see `GraphCache`."""
        indices = _in_flight_indices(self._shape, self.model.device)[path]
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
def _in_flight_indices(shape: TreeShape, device: torch.device) -> Tensor:
    """int64 ``[n]``: the index of each node among those the draft reads, -1 for leaves."""
    indices = torch.full((len(shape),), -1, dtype=torch.int64)
    read = [node for level in shape.levels[1:] for node in level]
    indices[read] = torch.arange(len(read))
    return indices.to(device)
