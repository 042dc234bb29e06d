"""The prefix cache: the state of the latest texts, for prompts that begin like them.

A text is kept in blocks. Texts with a common beginning share its blocks, as in RadixAttention (Zheng et al. 2023,
arXiv 2312.07104), so a system prompt is kept once, and the next turn of a conversation adds its new tokens only.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import NamedTuple

from torch import Tensor

from mcsd.models.protocol import Cache

BLOCK = 64
"""Tokens of a block. Texts, and common beginnings, that are shorter are read again, which takes hardly longer."""

MAX_TEXTS = 8
"""Texts at most."""

MAX_BYTES = 1 << 30
"""Memory of the blocks at most."""


class PrefixStats(NamedTuple):
    """The size of a prefix cache.

    Attributes:
        texts: how many are kept, without those that another one begins with.
        tokens: of all blocks.
        bytes: of all blocks.
        max_texts, max_bytes: its limits.
    """

    texts: int
    tokens: int
    bytes: int
    max_texts: int
    max_bytes: int


@dataclass(eq=False)
class _Block:
    """The state of a few tokens, and the blocks that follow in some text. All blocks but the last of a text are full.

    Attributes:
        last_use: grows with every use of this block or a later one.
    """

    tokens: tuple[int, ...]
    state: tuple[Tensor, ...]
    parent: "_Block | None"
    children: "dict[tuple[int, ...], _Block]" = field(default_factory=dict)
    last_use: int = 0

    @property
    def bytes(self) -> int:
        return sum(part.nbytes for part in self.state)

    def begin_like(self, tokens: Sequence[int]) -> "tuple[_Block | None, int]":
        """The child with the longest common beginning with some tokens, and its length."""
        if child := self.children.get(tuple(tokens)):
            return child, len(child.tokens)
        lengths = [(common_length(child.tokens, tokens), child) for child in self.children.values()]
        length, best = max(lengths, key=lambda each: each[0], default=(0, None))
        return (best, length) if length else (None, 0)


class PrefixCache:
    """Copies of the state of texts in a cache, the latest ones, within limits of number and memory.

    Only texts that ended well are to be kept: a state that holds NaN would spread.

    Args:
        cache: whose sequences are kept and started.
        max_texts: the most texts; 0 keeps none.
        max_bytes: the most memory.
    """

    def __init__(self, cache: Cache, max_texts: int = MAX_TEXTS, max_bytes: int = MAX_BYTES) -> None:
        self._cache = cache
        self.max_texts = max_texts
        self._max_bytes = max_bytes
        self._uses = count(1)
        self.clear()

    @property
    def stats(self) -> PrefixStats:
        """Its size and limits."""
        tokens = sum(len(block.tokens) for block in self._blocks())
        return PrefixStats(len(self._leaves), tokens, self._bytes, self.max_texts, self._max_bytes)

    def clear(self) -> None:
        """Drop all texts."""
        self._root = _Block((), (), None)
        self._leaves: dict[_Block, None] = {}
        self._bytes = 0

    def match(self, tokens: Sequence[int]) -> int:
        """How many first tokens of a text `start` can copy."""
        return sum(length for _, length in self._copied(tokens))

    def start(self, sequence: int, tokens: Sequence[int]) -> int:
        """Copy the state of the first tokens of a text to an empty sequence, as many as are kept. Returns how many."""
        path = self._copied(tokens)
        for block, length in path:
            self._cache.write(sequence, block.state, length)
        if not path:
            return 0
        self._touch(path[-1][0])
        return self._cache.host_lengths[sequence]

    def keep(self, sequence: int, tokens: Sequence[int]) -> None:
        """Keep the tokens of a text that a sequence has read. Those that are kept already are not copied."""
        length = min(len(tokens), self._cache.host_lengths[sequence])
        if not self.max_texts or length < BLOCK:
            return
        last, start = self._root, 0
        while start < length:
            here = tuple(tokens[start : min(start + BLOCK, length)])
            child, common = last.begin_like(here)
            if child is None or common < len(here):
                state = self._cache.read(sequence, start, start + len(here))
                if state is None:
                    return
                child = self._append(last, here, state)
            self._touch(child)
            self._evict()
            if child.tokens not in last.children:
                return  # It has no space, though all other texts are gone.
            last, start = child, start + len(here)

    def _copied(self, tokens: Sequence[int]) -> list[tuple[_Block, int]]:
        """`_path`, if it is long enough to be worth a copy."""
        path = list(self._path(tokens))
        return path if sum(length for _, length in path) >= BLOCK else []

    def _path(self, tokens: Sequence[int]) -> Iterator[tuple[_Block, int]]:
        """The blocks that a text begins with, and how many tokens of each: all of them, except in the last block."""
        block, start = self._root, 0
        while start < len(tokens):
            child, length = block.begin_like(tokens[start : start + BLOCK])
            if child is None:
                return
            yield child, length
            if length < BLOCK:
                return
            block, start = child, start + length

    def _append(self, parent: _Block, tokens: tuple[int, ...], state: tuple[Tensor, ...]) -> _Block:
        """Add a block, in place of one that it begins with."""
        for shorter in [child for child in parent.children.values() if tokens[: len(child.tokens)] == child.tokens]:
            self._remove(shorter)
        block = parent.children[tokens] = _Block(tokens, state, parent)
        self._bytes += block.bytes
        self._leaves.pop(parent, None)
        self._leaves[block] = None
        return block

    def _touch(self, block: _Block) -> None:
        """Mark a block and those before it as the latest in use."""
        use, each = next(self._uses), block
        while each.parent is not None:
            each.last_use, each = use, each.parent

    def _evict(self) -> None:
        """Drop the last blocks of the texts that were not used for the longest time, down to the limits."""
        while self._leaves and (len(self._leaves) > self.max_texts or self._bytes > self._max_bytes):
            self._remove(min(self._leaves, key=lambda leaf: leaf.last_use))

    def _remove(self, leaf: _Block) -> None:
        assert leaf.parent is not None
        del leaf.parent.children[leaf.tokens]
        self._leaves.pop(leaf)
        self._bytes -= leaf.bytes
        if not leaf.parent.children and leaf.parent is not self._root:
            self._leaves[leaf.parent] = None

    def _blocks(self) -> Iterator[_Block]:
        """All blocks."""
        pending = list(self._root.children.values())
        while pending:
            block = pending.pop()
            yield block
            pending += block.children.values()


class TextsByBeginning:
    """Texts by their first block: only those with an equal one can have a common beginning that is worth a copy."""

    def __init__(self) -> None:
        self._groups: defaultdict[tuple[int, ...], dict[int, Sequence[int]]] = defaultdict(dict)

    def add(self, key: int, text: Sequence[int]) -> None:
        """Add a text."""
        self._groups[tuple(text[:BLOCK])][key] = text

    def like(self, text: Sequence[int]) -> Mapping[int, Sequence[int]]:
        """Those that begin with the first block of a text, by their keys; if it is shorter, those that equal it."""
        return self._groups.get(tuple(text[:BLOCK]), {})


def longest_common(text: Sequence[int], others: Mapping[int, Sequence[int]]) -> tuple[int, int]:
    """The other text with the longest common beginning: its key, the length; -1 and 0 if there is none."""
    best, most = -1, 0
    for key, other in others.items():
        length = common_length(text, other)
        if length > most:
            best, most = key, length
        if length == len(text):
            break
    return best, most


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """The length of the common beginning of two texts."""
    start, most = 0, min(len(first), len(second))
    while start + BLOCK <= most and first[start : start + BLOCK] == second[start : start + BLOCK]:
        start += BLOCK
    pairs = zip(first[start : start + BLOCK], second[start : start + BLOCK], strict=False)
    return next((start + i for i, (a, b) in enumerate(pairs) if a != b), most)
