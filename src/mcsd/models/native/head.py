"""A draft head that runs in the kernels, in one call."""

from typing import Any

import torch
from torch import Tensor

from mcsd.kernels import call, readable
from mcsd.models.cache import CacheView
from mcsd.models.native import structs
from mcsd.models.native.layers import Stack
from mcsd.models.native.linear import NativeLinear


class NativeHead:
    """What a `mcsd.models.head.DraftHead` and its output matrix compute.

    Args:
        head, output: which `fits`.
    """

    def __init__(self, head: Any, output: Any) -> None:
        # They hold what the structs point to.
        self._parts: tuple[NativeLinear, NativeLinear, NativeLinear] = (head.fuse, head.join, output)
        self._stack = Stack(head.body)
        fuse, join, out = (part.struct() for part in self._parts)
        each = structs.Norm(None, torch.finfo(torch.float32).eps)
        self._struct = structs.Head(fuse, join, each, self._stack.struct, out)

    @staticmethod
    def fits(head: Any, output: Any) -> bool:
        """Whether the kernels know all parts of a head; they are packed already."""
        return all(isinstance(part, NativeLinear) for part in (head.fuse, head.join, output)) and Stack.fits(head.body)

    def forward(
        self, states: Tensor, own: bool, embedded: Tensor, view: CacheView, logits: bool
    ) -> tuple[Tensor, Tensor]:
        """States ``[B, n, H]`` and logits ``[B, n, K]``, or none of them.

        Args:
            states: of the target ``[B, n, F]``, or the head's ``own`` ``[B, n, H]``.
            embedded: ``[B, n, H]``, of the tokens.
            view: where they stand.
            logits: whether they are wanted.

        Raises:
            ValueError: states are not of this size.
            IndexError: as `CacheView.store`.
        """
        struct, stack, shape = self._struct, self._stack, embedded.shape[:2]
        tokens, dtype = shape.numel(), stack.dtype
        states = readable(states.to(dtype), tokens, stack.width if own else self._parts[0].inputs, dtype)
        embedded = readable(embedded, tokens, stack.width, dtype)
        place = stack.place(view, shape)
        last = torch.empty_like(embedded)
        found = last.new_empty(shape[0], shape[1] if logits else 0, self._parts[2].outputs)
        call("head", struct, states, own, embedded, dtype, place, last, found if logits else None)
        return last, found
