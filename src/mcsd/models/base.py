"""What the engine asks of a language model, target or draft alike. Knows no scheme and no text.

A model is weights and nothing else; what has been read so far lives in a cache, so one model can serve twice.
A forward adds *in-flight* tokens behind the committed tokens of each row; ``commit`` keeps some of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from mcsd.tree import TreeShape


@dataclass(frozen=True)
class Block:
    """How n in-flight tokens stand to each other and to the ``before`` in-flight tokens of earlier forwards.

    Attributes:
        offsets: int64 ``[before + n]``, distance of each in-flight token's position from the first uncommitted one.
        mask: bool ``[n, before + n]``, which in-flight tokens each new one sees. All see every committed token.
    """

    offsets: Tensor
    mask: Tensor

    @cached_property
    def framed(self) -> Tensor:
        """bool ``[n, 1 + before + n + 1]``: the mask between what all see and what nobody sees."""
        seen = torch.nn.functional.pad(self.mask, (1, 0), value=True)
        return torch.nn.functional.pad(seen, (0, 1), value=False)

    @cached_property
    def laid_out(self) -> tuple[Tensor, Tensor]:
        """Offsets and mask, contiguous, for those who read their memory.

        Raises:
            ValueError: they are not what they should be.
        """
        known = self.mask.shape[1]
        if self.mask.dtype != torch.bool or self.offsets.dtype != torch.int64 or self.offsets.shape != (known,):
            raise ValueError(f"offsets {tuple(self.offsets.shape)} of {self.offsets.dtype}, mask of {self.mask.dtype}")
        if not bool(((self.offsets >= 0) & (self.offsets < known)).all()):
            raise ValueError(f"{known} tokens in flight stand at positions {self.offsets.tolist()!s:.80}")
        return self.offsets.contiguous(), self.mask.contiguous()

    @property
    def before(self) -> int:
        """In-flight tokens that stand before this block."""
        return self.mask.shape[1] - self.mask.shape[0]

    @classmethod
    @lru_cache(maxsize=16)
    def chain(cls, length: int) -> "Block":
        """Tokens that follow each other."""
        return cls(torch.arange(length), torch.ones(length, length, dtype=torch.bool).tril())

    @classmethod
    @lru_cache(maxsize=64)
    def tree(cls, shape: TreeShape) -> "Block":
        """The root and all candidates of a tree, in one forward."""
        return cls(shape.offsets, shape.mask)


@dataclass(frozen=True)
class Output:
    """What a forward gives.

    Attributes:
        logits: ``[B, n, V]``; only the last column where logits were not asked for.
        hidden: ``[B, n, F]``, the hidden states asked for, one layer behind the other: 0 names the embeddings, i what
            layer i gives, and -1 the last states, which the logits are made of.
    """

    logits: Tensor
    hidden: Tensor | None


class Cache:
    """The committed length of each row. Rows in use are 0 ... used-1, without holes; the others have length 0.

    Subclasses keep what a model needs to go on from there. ``commit`` is the only way a row grows.

    Args:
        rows: the most rows in use at a time.
        device: where ``lengths`` lives.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.rows = rows
        self.used = 0
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)

    @property
    def token_bytes(self) -> int:
        """What is kept of a token, and read again by each forward."""
        return 0

    def add(self, like: int | None = None) -> int:
        """Take an empty row, or one that holds what row ``like`` has committed; its number is the highest in use."""
        assert self.used < self.rows, "no free row"
        row = self.used
        self.used += 1
        if like is not None:
            self.copy(like, row)
        return row

    def copy(self, source: int, to: int) -> None:
        """Let row ``to`` hold what row ``source`` has committed, in place of its own."""
        self._copy(source, to)
        self.lengths[to] = self.lengths[source]

    def remove(self, row: int) -> None:
        """Free a row. The last row in use moves into its place."""
        last = self.used - 1
        if row != last:
            self.copy(last, row)
        self.lengths[last] = 0
        self.used = last

    def clear(self) -> None:
        """Free all rows."""
        self.used = 0
        self.lengths.zero_()

    def commit(self, columns: Tensor, counts: Tensor, rows: slice = slice(None)) -> None:
        """Keep some in-flight tokens, in order, and forget the others.

        Args:
            columns: int64 ``[B, L]``, which in-flight tokens, ascending.
            counts: int64 ``[B]``, how many of them each row keeps.
            rows: the rows that B stands for, all in use by default.
        """
        rows = slice(*rows.indices(self.used))
        self._keep(columns, counts, rows)
        self.lengths[rows].add_(counts)

    def _copy(self, source: int, to: int) -> None:
        """Subclass hook: copy a row's committed state over another's."""

    def _keep(self, columns: Tensor, counts: Tensor, rows: slice) -> None:
        """Subclass hook: bring the kept in-flight state behind the committed state."""


@runtime_checkable
class LanguageModel(Protocol):
    """Anything that predicts the next token.

    Attributes:
        vocab_size: logits a position.
        max_length: the most positions it can attend to, None for no limit.
        device: where it computes.
        eos_token_ids: tokens that end a text.
        name: for people.
    """

    vocab_size: int
    max_length: int | None
    device: torch.device
    eos_token_ids: frozenset[int]
    name: str

    def new_cache(self, rows: int, slots: int) -> Cache:
        """An empty cache for at most ``rows`` rows of at most ``slots`` tokens each, in-flight ones included."""
        ...

    def forward(
        self,
        tokens: Tensor,
        block: Block,
        cache: Cache,
        rows: slice = slice(None),
        logits: bool = True,
        hidden: Sequence[int] = (),
    ) -> Output:
        """Read in-flight tokens.

        Args:
            tokens: int64 ``[B, n]``. Rows with fewer tokens are filled up on the right; what follows a row's own
                tokens never changes them.
            block: how the n tokens stand to each other.
            cache: of this model.
            rows: which rows B stands for, all in use by default.
            logits: whether logits are wanted for every column.
            hidden: layers whose hidden states are wanted, as `Output` gives them.
        """
        ...
