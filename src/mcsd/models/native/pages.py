"""Memory for weights, in large pages where the system has them.

A forward reads every weight once. In pages of 4 KB it waits for some thousands of them to be looked up, and the
processor, which fetches ahead within a page only, begins anew in each.
"""

import mmap
import sys
from math import prod
from threading import Lock
from weakref import ref

import torch
from torch import Tensor

_PIECE = 2**25
"""Bytes that small weights share, so that they have large pages too."""

_LINE = 64
"""Bytes that a tensor's place is a multiple of."""


class _Pieces:
    """Places for tensors, one behind the other in a piece, which is given back with the last tensor in it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._newest: ref[mmap.mmap] | None = None
        self._used = 0

    def place(self, size: int) -> tuple[mmap.mmap, int]:
        """Memory that is zero, and where in it ``size`` bytes are free.

        Raises:
            OSError: there is none, or no large pages.
        """
        if size >= _PIECE:
            return _mapped(size), 0
        with self._lock:
            piece = None if self._newest is None else self._newest()
            if piece is None or self._used + size > _PIECE:
                piece = _mapped(_PIECE)
                self._newest, self._used = ref(piece), 0
            start = self._used
            self._used += -(-size // _LINE) * _LINE
            return piece, start


def _mapped(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


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
