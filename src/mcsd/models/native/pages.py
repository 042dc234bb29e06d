"""Memory for weights, in large pages where the system has them.

A forward reads every weight once. In pages of 4 KB it waits for some thousands of them to be looked up, and the
processor, which fetches ahead within a page only, begins anew in each.
"""

import mmap
import sys
from math import prod
from threading import Lock

import torch
from torch import Tensor

_PIECE = 2**25
"""Bytes, or a multiple, that are asked of the system at a time: many large pages, so small weights have them too."""

_LINE = 64
"""Bytes that a tensor's place is a multiple of."""


class _Pieces:
    """Places for tensors, one behind the other; a piece is given back when the last tensor in it is gone."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._piece: mmap.mmap | None = None
        self._used = 0

    def place(self, size: int) -> tuple[mmap.mmap, int]:
        """Memory that is zero, and where in it ``size`` bytes are free.

        Raises:
            OSError: there is none, or no large pages.
        """
        with self._lock:
            if self._piece is None or self._used + size > len(self._piece):
                piece = mmap.mmap(-1, -(-size // _PIECE) * _PIECE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                piece.madvise(mmap.MADV_HUGEPAGE)
                self._piece, self._used = piece, 0
            start = self._used
            self._used += -(-size // _LINE) * _LINE
            return self._piece, start


_pieces = _Pieces()


def zeros(*shape: int) -> Tensor:
    """int32 of this shape, all 0."""
    count = prod(shape)
    if sys.platform == "linux" and count:
        try:
            piece, start = _pieces.place(4 * count)
        except OSError:
            pass
        else:
            return torch.frombuffer(piece, dtype=torch.int32, count=count, offset=start).view(shape)
    return torch.zeros(shape, dtype=torch.int32)
