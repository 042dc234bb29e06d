"""The key-value cache: one pre-allocated tensor, written in place.

A slot is an absolute place in a row: committed tokens fill slots 0 ... length-1, in-flight tokens follow in the
order of their forwards. Slots past the end hold zeros or finite leftovers, never NaN, because a masked NaN still
poisons an attention row.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
import transformers
from torch import Tensor

from mcsd.errors import UnsupportedModel
from mcsd.models.base import Block, Cache


class KeyValueCache(Cache):
    """Keys and values of all layers: ``[layers, 2, rows, heads, slots, head size]``.

    Allocated, in full, at the first forward, when the model shows what its keys look like.

    Args:
        layers: attention layers of the model.
        rows: the most rows in use at a time.
        slots: the most tokens of a row, in-flight ones included.
        device: where the model computes.
    """

    def __init__(self, layers: int, rows: int, slots: int, device: torch.device) -> None:
        super().__init__(rows, device)
        self.layers = layers
        self.slots = slots
        self._store: Tensor | None = None
        self._written = [0] * rows

    @property
    def token_bytes(self) -> int:
        """Keys and values of all layers; 0 before the first forward."""
        return 0 if self._store is None else self._store[:, :, 0, :, 0].nbytes

    def add(self, like: int | None = None) -> int:
        """Take a row, cleared of what an earlier request left; see `Cache.add`."""
        row = super().add(like)
        if like is None:
            self._clear(row)
        return row

    def view(self, rows: slice, block: Block) -> "CacheView":
        """The cache as one forward sees it, which reads a block in some rows."""
        view = CacheView(self, rows, block)
        self._written[rows] = [max(written, view.columns) for written in self._written[rows]]
        return view

    def store(self, index: int, keys: Tensor, values: Tensor) -> Tensor:
        """All that is kept, ``[layers, 2, rows, heads, slots, head size]``; made at the first call.

        Args:
            index: a layer.
            keys, values: what it wants to keep, ``[B, heads, n, head size]``.

        Raises:
            UnsupportedModel: it is not shaped as what the first layer kept.
        """
        if self._store is None:
            shape = (self.layers, 2, self.rows, keys.shape[1], self.slots, keys.shape[3])
            self._store = torch.zeros(shape, dtype=keys.dtype, device=keys.device)
        kept = (self._store.shape[3], self._store.shape[5], self._store.dtype)
        if any((new.shape[1], new.shape[3], new.dtype) != kept for new in (keys, values)):
            raise UnsupportedModel(
                f"layer {index} has keys of shape {tuple(keys.shape)} and values of shape {tuple(values.shape)}, "
                f"where {kept[0]} heads of size {kept[1]} are kept",
                "models whose layers, or keys and values, differ in shape are not supported",
            )
        return self._store

    def _copy(self, source: int, to: int) -> None:
        self._clear(to)
        if self._store is not None:
            used = self._written[to] = int(self.lengths[source])
            self._store[:, :, to, :, :used] = self._store[:, :, source, :, :used]

    def _clear(self, row: int) -> None:
        # A failed request may have left NaN behind.
        if self._store is not None:
            self._store[:, :, row, :, : self._written[row]] = 0
        self._written[row] = 0

    def _keep(self, columns: Tensor, counts: Tensor, rows: slice) -> None:
        if self._store is None:
            return
        row, to, source = [], [], []
        each = zip(self.lengths[rows].tolist(), columns.tolist(), counts.tolist(), strict=True)
        for number, (start, kept, count) in enumerate(each, rows.start):
            moved = [(place, column) for place, column in enumerate(kept[:count]) if place != column]
            row += [number] * len(moved)
            to += [start + place for place, _ in moved]
            source += [start + column for _, column in moved]
        if row:
            self._store[:, :, row, :, to] = self._store[:, :, row, :, source]


class CacheView(transformers.Cache):
    """The part of the cache that one forward writes and reads.

    Args:
        cache: of which.
        rows: its rows.
        block: what is read there.

    Attributes:
        block: the same; rows: the same.
        lengths: int64 ``[B]``, the committed tokens of each row.
        columns: slots that the forward may look at, of the longest row.
    """

    def __init__(self, cache: KeyValueCache, rows: slice, block: Block) -> None:
        super().__init__(layers=[])
        self.block, self.rows = block, rows
        self.lengths = cache.lengths[rows]
        self._cache, self._length = cache, len(block.mask)
        known = self.lengths.tolist()
        self.columns: int = max(known) + block.mask.shape[1]
        self._even = len(set(known)) == 1
        self._slots = slice(known[0] + block.before, known[0] + block.mask.shape[1])
        self._new: Sequence[Tensor] = ()
        self._all: Sequence[Tensor] = ()

    @cached_property
    def _places(self) -> tuple[Tensor, Tensor]:
        """Rows ``[B, 1]`` and slots ``[B, n]`` of the new tokens."""
        device = self.lengths.device
        rows = torch.arange(self.rows.start, self.rows.stop, device=device)
        new = torch.arange(self.block.before, self.block.before + self._length, device=device)
        return rows[:, None], self.lengths[:, None] + new

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new keys and values of a layer in place; return all that the forward may look at."""
        store = self._cache.store(layer_idx, key_states, value_states).flatten(0, 1)
        if not self._all:
            # Those of all layers at once: a layer has little time.
            self._all = store[:, self.rows, :, : self.columns].unbind()
            self._new = store[:, self.rows, :, self._slots].unbind() if self._even else ()
        for place, new in ((2 * layer_idx, key_states), (2 * layer_idx + 1, value_states)):
            if self._even:
                self._new[place].copy_(new)
            else:
                rows, slots = self._places
                store[place][rows, :, slots] = new.transpose(1, 2)
        return self._all[2 * layer_idx], self._all[2 * layer_idx + 1]

    def store(self, like: Tensor) -> Tensor:
        """What `KeyValueCache.store` gives, for a forward that writes keys and values of all layers there itself.

        Args:
            like: keys as the layers have them, ``[B, heads, n, head size]``; it may be empty.

        Raises:
            IndexError: there are fewer slots than it may look at.
        """
        if self.columns > self._cache.slots:
            raise IndexError(f"a forward needs {self.columns} slots of a row, of which there are {self._cache.slots}")
        return self._cache.store(0, like, like)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before this forward's, in the longest row."""
        return self.columns - self._length

    def get_max_length(self, layer_idx: int = 0) -> int:
        """The slots of a row."""
        return self._cache.slots

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns of the mask, and where they begin."""
        return self.columns, 0
