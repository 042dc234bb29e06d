"""Memory for weights, in huge pages where the system has them.

A forward reads every weight once. With pages of 4 KB it waits for thousands of address translations, and the
processor's prefetcher, which stays within a page, starts anew in each.
"""

import mmap
import sys
from math import prod
from threading import Lock
from weakref import ref

import torch
from torch import Tensor

_ARENA_BYTES = 2**25
"""Size of an arena, which small tensors share; a larger tensor has a mapping of its own."""

_ALIGNMENT = 64
"""Bytes: a cache line."""


class _ArenaAllocator:
    """Allocates memory from arenas, front to back. An arena is unmapped when the last tensor in it is gone."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._arena: ref[mmap.mmap] | None = None
        self._used = 0

    def allocate(self, size: int) -> tuple[mmap.mmap, int]:
        """A mapping and the offset in it of ``size`` bytes, all 0.

        Raises:
            OSError: the system has no memory, or no huge pages.
        """
        if size >= _ARENA_BYTES:
            return _map_huge(size), 0
        with self._lock:
            arena = None if self._arena is None else self._arena()
            if arena is None or self._used + size > _ARENA_BYTES:
                arena = _map_huge(_ARENA_BYTES)
                self._arena, self._used = ref(arena), 0
            offset = self._used
            self._used += -(-size // _ALIGNMENT) * _ALIGNMENT
            return arena, offset


def _map_huge(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


_allocator = _ArenaAllocator()


def zeros(*shape: int) -> Tensor:
    """An int32 tensor of zeros."""
    count = prod(shape)
    if sys.platform == "linux" and count:
        try:
            arena, offset = _allocator.allocate(4 * count)
        except OSError:
            pass
        else:
            return torch.frombuffer(arena, dtype=torch.int32, count=count, offset=offset).view(shape)
    return torch.zeros(shape, dtype=torch.int32)
