"""The key-value cache: one tensor, written in place, which grows with the longest sequence.

Keys or values of another shape than the first layer's, as in multi-head latent attention (DeepSeek-V2, arXiv
2405.04434) or in models whose layers differ, have tensors of their own beside it.

A slot is the place of a token in its sequence: committed tokens fill slots 0 ... length-1, in-flight tokens follow in
the order of their forwards. Later slots hold zeros or stale finite values, never NaN: a masked NaN still makes the
attention output NaN.
"""

from collections.abc import Sequence
from functools import cached_property
from math import prod
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor

from mcsd.errors import OutOfMemory
from mcsd.models.layout import TokenLayout
from mcsd.models.protocol import Cache

_FIRST_SLOTS, _FIRST_SLOTS_ON_A_GPU = 2048, 256
"""Slots per sequence at first; a longer sequence doubles them. On a GPU unused slots take memory."""

_COLUMNS_ON_A_GPU = 256
"""A forward on a GPU reads a multiple of so many slots: a captured forward is made for a number."""


class KVCache(Cache):
    """Keys and values of all layers: ``[layers, 2, max_batch, kv heads, slots, head size]``.

    Allocated at the first forward, which shows the shape of the keys, for sequences of a moderate length.

    Args:
        num_layers: attention layers of the model.
        max_batch: the most sequences in use at a time.
        slots: the most tokens of a sequence, in-flight tokens included.
        device: of the model.
    """

    def __init__(self, num_layers: int, max_batch: int, slots: int, device: torch.device) -> None:
        super().__init__(max_batch, device)
        self.num_layers = num_layers
        self.slots = slots
        self._store: Tensor | None = None
        self._others: dict[tuple[int, int], Tensor] = {}
        self._on_cpu = device.type == "cpu"
        self._capacity = min(slots, _FIRST_SLOTS if self._on_cpu else _FIRST_SLOTS_ON_A_GPU)
        self._written = [0] * max_batch
        self._reserved = 0

    @property
    def bytes_per_token(self) -> int:
        """Keys and values of all layers; 0 before the first forward."""
        others = sum(store[0, 0, 0, :, 0].nbytes for store in self._others.values())
        if self._store is None:
            return others
        return others + self._store[0, 0, 0, :, 0].nbytes * (2 * self.num_layers - len(self._others))

    @property
    def is_empty(self) -> bool:
        """Whether no forward has written keys or values yet."""
        return self._store is None and not self._others

    def add(self) -> int:
        """Start a sequence, cleared of an earlier request's values. See `Cache.add`."""
        index = super().add()
        self._clear(index)
        return index

    def read(self, sequence: int, start: int, stop: int) -> tuple[Tensor, ...] | None:
        """See `Cache.read`: keys and values ``[layers, 2, kv heads, stop - start, head size]`` of each tensor."""
        stores = self._stores()
        # On a GPU, memory that the cache itself may need to grow is left alone.
        if not self._on_cpu and _free_bytes(self.lengths.device) < 2 * sum(store.nbytes for store in stores):
            return None
        return tuple(
            store[:, :, sequence, :, start:stop].clone(memory_format=torch.contiguous_format) for store in stores
        )

    def view(self, sequences: slice, layout: TokenLayout) -> "CacheView":
        """The part of the cache that a forward over some sequences reads and writes."""
        needed = max(self.host_lengths[sequences]) + layout.total
        self._make_space(needed, sequences)
        columns = needed if self._on_cpu else max(self._reserved, self._rounded(needed))
        return CacheView(self, sequences, layout, columns)

    def reserve(self, tokens: int) -> int:
        """See `Cache.reserve`. Until the next call, all forwards on a GPU read so many slots, or more."""
        if self._on_cpu:
            return 0
        needed = min(self.slots, max(self.host_lengths[: self.batch_size]) + tokens)
        self._make_space(needed, slice(0, self.batch_size))
        self._reserved = self._rounded(needed)
        return self._reserved

    def _make_space(self, slots: int, sequences: slice) -> None:
        """Make space for forwards that write these sequences up to so many slots."""
        if slots > self._capacity:
            self._grow(slots)
        self._written[sequences] = [max(written, slots) for written in self._written[sequences]]

    def _rounded(self, slots: int) -> int:
        return min(self._capacity, -(-slots // _COLUMNS_ON_A_GPU) * _COLUMNS_ON_A_GPU)

    def store(self, keys: Tensor, values: Tensor) -> Tensor | None:
        """The tensor ``[layers, 2, max_batch, kv heads, slots, head size]``; None if it does not hold such tensors.

        Allocated at the first call with keys and values of equal shapes.

        Args:
            keys, values: new ones of a layer, ``[B, kv heads, n, head size]``.
        """
        shape = keys.shape[1], keys.shape[3], keys.dtype
        if (values.shape[1], values.shape[3], values.dtype) != shape:
            return None
        if self._store is None:
            size = (self.num_layers, 2, self.max_batch, keys.shape[1], self._capacity, keys.shape[3])
            self._store = _zeros(size, keys.dtype, keys.device)
            self.generation += 1
        return self._store if (self._store.shape[3], self._store.shape[5], self._store.dtype) == shape else None

    def other_store(self, layer: int, part: int, new: Tensor) -> Tensor:
        """The tensor ``[1, 1, max_batch, kv heads, slots, head size]`` of keys or values that `store` does not hold.

        Args:
            layer: index of the layer.
            part: 0: keys, 1: values.
            new: its new keys or values, ``[B, kv heads, n, head size]``.
        """
        place = layer, part
        if place not in self._others:
            shape = (1, 1, self.max_batch, new.shape[1], self._capacity, new.shape[3])
            self._others[place] = _zeros(shape, new.dtype, new.device)
            self.generation += 1
        return self._others[place]

    def _stores(self) -> list[Tensor]:
        """All tensors that are allocated; dimension 2 is the sequence, 4 the slot."""
        return [*([] if self._store is None else [self._store]), *self._others.values()]

    def _grow(self, slots: int) -> None:
        """Make space for sequences of this many slots, up to the limit of the cache. If that fails, nothing changes."""
        capacity = min(self.slots, max(slots, 2 * self._capacity))
        grown = [self._grown(store, capacity) for store in self._stores()]
        if self._store is not None:
            self._store = grown.pop(0)
        self._others = dict(zip(self._others, grown, strict=True))
        self.generation += not self.is_empty
        self._capacity = capacity

    def _grown(self, store: Tensor, capacity: int) -> Tensor:
        """A copy of a tensor with space for more slots."""
        shape = list(store.shape)
        shape[4] = capacity
        grown = _zeros(shape, store.dtype, store.device)
        for index, used in enumerate(self._written):
            grown[:, :, index, :, :used] = store[:, :, index, :, :used]
        return grown

    def _copy(self, source: int, to: int, length: int) -> None:
        self._clear(to)
        if not self.is_empty:
            self._written[to] = length
            for store in self._stores():
                store[:, :, to, :, :length] = store[:, :, source, :, :length]

    def _write(self, sequence: int, state: tuple[Tensor, ...], count: int) -> None:
        start = self.host_lengths[sequence]
        stop = start + count
        self._make_space(stop, slice(sequence, sequence + 1))
        for store, part in zip(self._stores(), state, strict=True):
            store[:, :, sequence, :, start:stop] = part[..., :count, :]

    def _clear(self, index: int) -> None:
        # A failed request may have left NaN.
        for store in self._stores():
            store[:, :, index, :, : self._written[index]] = 0
        self._written[index] = 0

    def _keep(self, columns: Tensor, counts: Tensor, sequences: slice) -> None:
        if self._on_cpu:
            self._move(columns.tolist(), counts.tolist(), sequences)
            return
        # All columns are moved, those that are not kept onto themselves: the host need not know them.
        batch, longest = columns.shape
        place = torch.arange(longest, device=columns.device)
        index = torch.arange(sequences.start, sequences.start + batch, device=columns.device)[:, None]
        start = self.lengths[sequences, None]
        source = start + torch.where(place < counts[:, None], columns, place)
        for store in self._stores():
            store[:, :, index, :, start + place] = store[:, :, index, :, source]

    def _move(self, columns: list[list[int]], counts: Sequence[int], sequences: slice) -> None:
        """Move the columns that are kept and not yet in their place."""
        index, to, source = [], [], []
        each = zip(self.host_lengths[sequences], columns, counts, strict=True)
        for number, (start, kept, count) in enumerate(each, sequences.start):
            moved = [(place, column) for place, column in enumerate(kept[:count]) if place != column]
            index += [number] * len(moved)
            to += [start + place for place, _ in moved]
            source += [start + column for _, column in moved]
        if index:
            for store in self._stores():
                store[:, :, index, :, to] = store[:, :, index, :, source]


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU the system provides their memory only when it is written.

    Raises:
        OutOfMemory: there is not enough memory.
    """
    size = prod(shape) * dtype.itemsize
    if device.type == "cuda" and size > (free := _free_bytes(device)):
        raise OutOfMemory(
            f"the key-value cache needs {size / 1e9:.1f} GB on {device}, where {free / 1e9:.1f} GB are free",
            "lower max_batch or max_length, or choose smaller models",
        )
    try:
        if device.type == "cpu":
            return torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(dtype).view(*shape)
        return torch.zeros(*shape, dtype=dtype, device=device)
    except (MemoryError, RuntimeError) as error:
        raise OutOfMemory(
            f"the key-value cache needs {size / 1e9:.1f} GB, which {device} does not have",
            "lower max_batch or max_length",
        ) from error


def _free_bytes(device: torch.device) -> int:
    """Memory that a tensor on a GPU may take: what no process has, and what torch keeps of freed tensors."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


class CacheView(transformers.Cache):
    """The part of a cache that one forward reads and writes, as transformers takes it.

    Args:
        cache: the cache.
        sequences: indices of its sequences.
        layout: of the tokens of this forward.
        columns: slots of each sequence that the forward reads.

    Attributes:
        sequences, columns: as given.
        lengths: int64 ``[B]``, committed tokens of each sequence.
        in_flight: tokens after the committed ones, those of this forward included.
    """

    def __init__(self, cache: KVCache, sequences: slice, layout: TokenLayout, columns: int) -> None:
        super().__init__(layers=[])
        self.sequences = sequences
        self.lengths = cache.lengths[sequences]
        self.columns = columns
        self.in_flight = layout.total
        self._cache, self._earlier, self._length = cache, layout.earlier, layout.new
        lengths = cache.host_lengths[sequences]
        # On a GPU the slots follow from lengths on the device, which a captured forward reads.
        self._equal_lengths = self.lengths.device.type == "cpu" and len(set(lengths)) == 1
        self._slots = slice(lengths[0] + layout.earlier, lengths[0] + layout.total)
        self._new: Sequence[Tensor] = ()
        self._all: Sequence[Tensor] = ()

    @cached_property
    def slots(self) -> Tensor:
        """int64 ``[B, n]``, the slots of the new tokens."""
        new = torch.arange(self._earlier, self._earlier + self._length, device=self.lengths.device)
        return self.lengths[:, None] + new

    @cached_property
    def _sequence_indices(self) -> Tensor:
        """int64 ``[B, 1]``."""
        return torch.arange(self.sequences.start, self.sequences.stop, device=self.lengths.device)[:, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new keys and values of a layer in place; return all that the forward may attend to."""
        common = self._cache.store(key_states, value_states)
        if common is None:
            return self._update_others(layer_idx, key_states, value_states)
        store = common.flatten(0, 1)
        if not self._all:
            # The views of all layers are made at once, which takes fewer operations.
            self._all = store[:, self.sequences, :, : self.columns].unbind()
            self._new = store[:, self.sequences, :, self._slots].unbind() if self._equal_lengths else ()
        for place, new in ((2 * layer_idx, key_states), (2 * layer_idx + 1, value_states)):
            if self._equal_lengths:
                self._new[place].copy_(new)
            else:
                store[place][self._sequence_indices, :, self.slots] = new.transpose(1, 2)
        return self._all[2 * layer_idx], self._all[2 * layer_idx + 1]

    def _update_others(self, layer: int, *states: Tensor) -> tuple[Tensor, Tensor]:
        """`update`, for keys and values with tensors of their own."""
        seen = []
        for part, new in enumerate(states):
            store = self._cache.other_store(layer, part, new)[0, 0]
            store[self._sequence_indices, :, self.slots] = new.transpose(1, 2)
            seen.append(store[self.sequences, :, : self.columns])
        return seen[0], seen[1]

    def layer(self, index: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, kv heads, columns, head size]`` of a layer, for attention that writes new ones itself.

        Args:
            index: of the layer.
            like: see `store`.
        """
        if not self._all:
            self._all = self.store(like).flatten(0, 1)[:, self.sequences, :, : self.columns].unbind()
        return self._all[2 * index], self._all[2 * index + 1]

    def store(self, like: Tensor) -> Tensor:
        """`KVCache.store`, for a forward that writes the keys and values of all layers itself.

        Args:
            like: keys ``[B, kv heads, n, head size]`` in shape and dtype; it may be empty.

        Raises:
            IndexError: the forward needs more slots than the cache has.
        """
        store = self._cache.store(like, like)
        assert store is not None, "a forward of our own has keys and values of one shape"
        if self.columns > store.shape[4]:
            raise IndexError(f"a forward needs {self.columns} slots per sequence; the cache has {store.shape[4]}")
        return store

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before this forward's, in the longest sequence."""
        return self.columns - self._length

    def get_max_length(self, layer_idx: int = 0) -> int:
        """Slots of a sequence."""
        return self._cache.slots

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Columns of the mask, and the first one."""
        return self.columns, 0
