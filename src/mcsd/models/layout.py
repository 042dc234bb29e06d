"""The layout of in-flight tokens: their positions, and which of them attend to each other."""

from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import Tensor

from mcsd.tree import TreeShape

_CPU = torch.device("cpu")

_LONGEST_KEPT = 64
"""Tokens of chains that are kept: those of steps. Longer ones are prompts, of any length."""


@dataclass(frozen=True)
class TokenLayout:
    """Positions and attention of n new tokens and the in-flight tokens of earlier forwards.

    In-flight tokens have been read but not committed. Every token attends to all committed tokens.

    Attributes:
        offsets: int64 ``[earlier + n]``, position of each in-flight token relative to the first uncommitted position.
        mask: bool ``[n, earlier + n]``, which in-flight tokens each new token attends to.
    """

    offsets: Tensor
    mask: Tensor

    @property
    def new(self) -> int:
        """The number n of new tokens."""
        return self.mask.shape[0]

    @property
    def total(self) -> int:
        """All in-flight tokens, those of earlier forwards included."""
        return self.mask.shape[1]

    @property
    def earlier(self) -> int:
        """In-flight tokens of earlier forwards."""
        return self.total - self.new

    @cached_property
    def padded_mask(self) -> Tensor:
        """bool ``[n, 1 + total + 1]``: the mask, after a column that all attend to and before one that none does."""
        return torch.nn.functional.pad(torch.nn.functional.pad(self.mask, (1, 0), value=True), (0, 1), value=False)

    @cached_property
    def contiguous(self) -> tuple[Tensor, Tensor]:
        """Offsets and mask in contiguous memory, checked, for code that reads it directly.

        Raises:
            ValueError: wrong dtypes or shapes, or an offset outside ``[0, total)``.
        """
        if self.mask.dtype != torch.bool or self.offsets.dtype != torch.int64 or self.offsets.shape != (self.total,):
            raise ValueError(f"offsets {tuple(self.offsets.shape)} of {self.offsets.dtype}, mask of {self.mask.dtype}")
        if not bool(((self.offsets >= 0) & (self.offsets < self.total)).all()):
            raise ValueError(f"offsets {self.offsets.tolist()!s:.80} of {self.total} in-flight tokens")
        return self.offsets.contiguous(), self.mask.contiguous()

    def to(self, device: torch.device) -> "TokenLayout":
        """The layout with its tensors on a device."""
        return self if self.mask.device == device else TokenLayout(self.offsets.to(device), self.mask.to(device))

    @classmethod
    def chain(cls, length: int, device: torch.device = _CPU) -> "TokenLayout":
        """Tokens that follow each other (causal attention)."""
        if length <= _LONGEST_KEPT:
            return cls._short_chain(length, device)
        mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        return cls(torch.arange(length, device=device), mask)

    @classmethod
    @cache
    def _short_chain(cls, length: int, device: torch.device) -> "TokenLayout":
        return cls(torch.arange(length), torch.ones(length, length, dtype=torch.bool).tril()).to(device)

    @classmethod
    @cache
    def tree(cls, shape: TreeShape, device: torch.device = _CPU) -> "TokenLayout":
        """The root and all candidates of a tree, in one forward (tree attention)."""
        return cls(shape.offsets, shape.mask).to(device)
