"""Two ways to verify the same candidates: one row with a tree mask, or a row for each path from root to leaf.

The second is what the paper sets tree attention against: tokens that paths share are read once for each path, and each
row has the whole text in its cache. Copying the text there is not timed, only the forwards.
"""

import time

import torch
from torch import Tensor

from mcsd.bench.journal import Verified
from mcsd.models import Block, Cache, LanguageModel
from mcsd.models.prefill import prefill
from mcsd.tree import TreeShape

ROUNDS = 8


MOST_PATHS = 64
"""Each path takes a row of a cache."""


def comparable(shape: TreeShape) -> bool:
    """Whether a tree has more than one path, and no more than `MOST_PATHS`."""
    return 1 < len(shape) - len(set(shape.parents) - {-1}) <= MOST_PATHS


def leaf_paths(shape: TreeShape) -> Tensor:
    """int64 ``[paths, 1 + depth]``: columns of the tree, root first; a path that ends early repeats its last one."""
    leaves = [node for node in range(len(shape)) if node not in set(shape.parents)]
    columns = torch.nn.functional.pad(shape.paths[[1 + leaf for leaf in leaves]] + 1, (1, 0))
    return columns.cummax(dim=1).values


class Verification:
    """Reads a text once, and then trees after it, again and again.

    Args:
        target: that reads.
        text: token ids; the last one is the root.
        shape: the tree, which is `comparable`. Its candidates are tokens of the text: which they are costs nothing.
    """

    def __init__(self, target: LanguageModel, text: list[int], shape: TreeShape) -> None:
        self._target, self._shape = target, shape
        self._paths = leaf_paths(shape)
        self._one = target.new_cache(1, len(text) + len(shape))
        self._many = target.new_cache(len(self._paths), len(text) + shape.depth)
        for cache in (self._one, self._many):
            prefill(target, cache, cache.add(), text[:-1])
        for _ in self._paths[1:]:
            self._many.add(0)
        columns = [text[-1], *(text[node % len(text)] for node in range(len(shape)))]
        self._tokens = torch.tensor([columns], device=target.device)

    def as_tree(self) -> Tensor:
        """Logits ``[1, 1 + n, V]`` of one forward with a tree mask."""
        return self._read(self._tokens, Block.tree(self._shape), self._one)

    def as_batch(self) -> Tensor:
        """Logits ``[paths, 1 + depth, V]`` of one forward over all paths."""
        tokens = self._tokens[0, self._paths.to(self._tokens.device)]
        return self._read(tokens, Block.chain(tokens.shape[1]), self._many)

    def measure(self, name: str, round: int) -> Verified:
        """Time both, in an order that changes from round to round; ``name`` is what the tree is called."""
        seconds = {}
        for forward in (self.as_tree, self.as_batch)[:: -1 if round % 2 else 1]:
            start = time.perf_counter()
            forward()[0, 0, 0].item()
            seconds[forward.__name__] = time.perf_counter() - start
        shape = self._shape
        return Verified(
            *(name, len(shape), len(self._paths), shape.depth, round),
            *(seconds["as_tree"], seconds["as_batch"]),
        )

    @torch.no_grad()
    def _read(self, tokens: Tensor, block: Block, cache: Cache) -> Tensor:
        # Nothing is committed, so the next forward finds the cache as this one did.
        return self._target.forward(tokens, block, cache).logits
