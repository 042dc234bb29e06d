"""Two ways to verify the same candidates: one sequence with a tree mask, or a batch with a sequence for each path.

The second is the paper's baseline for tree attention: tokens that paths share are read once for each path, and each
sequence has the whole text in its cache. Copying the text there is not timed, only the forwards.
"""

import time

import torch
from torch import Tensor

from mcsd.bench.records import AttentionRecord
from mcsd.models import Cache, LanguageModel, TokenLayout
from mcsd.models.prefill import prefill
from mcsd.tree import TreeShape

REPEATS = 8

MAX_PATHS = 64
"""Each path takes a sequence of a cache."""


def has_paths_to_compare(shape: TreeShape) -> bool:
    """Whether a tree has more than one path, and no more than `MAX_PATHS`."""
    return 1 < len(shape) - len(set(shape.parents) - {-1}) <= MAX_PATHS


def leaf_paths(shape: TreeShape) -> Tensor:
    """int64 ``[paths, 1 + depth]``: columns of the tree, root first; a path that ends early repeats its last one."""
    leaves = [node for node in range(len(shape)) if node not in set(shape.parents)]
    columns = torch.nn.functional.pad(shape.paths[[1 + leaf for leaf in leaves]] + 1, (1, 0))
    return columns.cummax(dim=1).values


class AttentionBenchmark:
    """Times forwards over a tree after a text, which is read once.

    Args:
        target: the model.
        text: token ids; the last one is the root.
        shape: the tree, for which `has_paths_to_compare` holds. Its candidates are tokens of the text: which ones they
            are does not change the time.
    """

    def __init__(self, target: LanguageModel, text: list[int], shape: TreeShape) -> None:
        self._target, self._shape = target, shape
        self._paths = leaf_paths(shape)
        self._tree_cache = target.new_cache(1, len(text) + len(shape))
        self._batch_cache = target.new_cache(len(self._paths), len(text) + shape.depth)
        for cache in (self._tree_cache, self._batch_cache):
            prefill(target, cache, cache.add(), text[:-1])
        for _ in self._paths[1:]:
            self._batch_cache.copy(0, self._batch_cache.add())
        columns = [text[-1], *(text[node % len(text)] for node in range(len(shape)))]
        self._tokens = torch.tensor([columns], device=target.device)

    def as_tree(self) -> Tensor:
        """Logits ``[1, 1 + n, V]`` of one forward with a tree mask."""
        return self._forward(self._tokens, TokenLayout.tree(self._shape, self._tokens.device), self._tree_cache)

    def as_batch(self) -> Tensor:
        """Logits ``[paths, 1 + depth, V]`` of one forward over all paths."""
        tokens = self._tokens[0, self._paths.to(self._tokens.device)]
        return self._forward(tokens, TokenLayout.chain(tokens.shape[1], tokens.device), self._batch_cache)

    def measure(self, tree: str, repeat: int) -> AttentionRecord:
        """Time both, in an order that alternates between repeats; ``tree`` is the name of the shape."""
        seconds = {}
        for forward in (self.as_tree, self.as_batch)[:: -1 if repeat % 2 else 1]:
            start = time.perf_counter()
            forward()[0, 0, 0].item()
            seconds[forward.__name__] = time.perf_counter() - start
        shape = self._shape
        return AttentionRecord(
            *(tree, len(shape), len(self._paths), shape.depth, repeat),
            *(seconds["as_tree"], seconds["as_batch"]),
        )

    @torch.no_grad()
    def _forward(self, tokens: Tensor, layout: TokenLayout, cache: Cache) -> Tensor:
        # Nothing is committed, so the next forward finds the same cache.
        return self._target.forward(tokens, layout, cache).logits
