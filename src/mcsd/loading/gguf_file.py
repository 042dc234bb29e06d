"""The header of a GGUF file: its tensors, checked and mapped into memory.

The reader of the gguf package builds an object for each token of the vocabulary, which takes seconds, and trusts the
sizes that a file names. This one skips the vocabulary and reads nothing outside of the file. The format is described in
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcsd.errors import WeightsCorrupt

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_ENTRIES = 2**16
_MAX_TEXT = 2**16
_MAX_DIMENSIONS = 4
_ALIGNMENT, _ARCHITECTURE = "general.alignment", "general.architecture"
_DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 2**16

_STRING, _ARRAY = 8, 9
_MAX_DEPTH = 4
"""Of arrays in arrays."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of metadata values with a fixed size, as `struct` formats."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor of a file.

    Attributes:
        type: the number of its type in ggml.
        shape: as torch has it; the last dimension is contiguous.
        offset: of its first byte in the file.
    """

    type: int
    shape: tuple[int, ...]
    offset: int


class GgufFile:
    """A GGUF file, mapped into memory.

    Args:
        path: of the file.

    Attributes:
        data: uint8, the file.
        architecture: of the network, as GGUF files name it; empty if the file does not say.
        tensors: by name.

    Raises:
        WeightsCorrupt: the file is truncated, or its header is broken.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self.data = torch.frombuffer(self._map, dtype=torch.uint8)
            header = _Header(self._map)
            self.tensors = dict(header.tensors())
            self.architecture = header.architecture
        except (OSError, OverflowError, RuntimeError, ValueError, struct.error) as error:
            raise WeightsCorrupt(
                f"{path} cannot be read: {error!s:.200}", "fetch the file again; it is not a whole GGUF file"
            ) from error

    def bytes_of(self, name: str, size: int) -> Tensor:
        """uint8 ``[size]``, the bytes of a tensor.

        Raises:
            WeightsCorrupt: the file ends before.
        """
        offset = self.tensors[name].offset
        if offset + size > len(self.data):
            raise WeightsCorrupt(
                f"{self.path} ends within tensor {name}", "fetch the file again; it is not a whole GGUF file"
            )
        return self.data[offset : offset + size]

    def release(self) -> None:
        """Give the memory of what was read back to the system; it is read from the file again when it is needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)


class _Header:
    """A cursor over the header. Whatever it reads beyond the end is a `ValueError` or `struct.error`."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._at = 0
        self.architecture = ""

    def tensors(self) -> Iterator[tuple[str, TensorInfo]]:
        """Name and description of each tensor."""
        if self._take(4) != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        (version,) = self._unpack("I")
        if version not in _VERSIONS:
            raise ValueError(f"version {version} is not known; versions 2 and 3 are")
        tensor_count, entry_count = self._unpack("QQ")
        if max(tensor_count, entry_count) > _MAX_ENTRIES:
            raise ValueError(
                f"{tensor_count} tensors and {entry_count} metadata entries: at most {_MAX_ENTRIES} of each"
            )
        alignment: Any = _DEFAULT_ALIGNMENT
        for _ in range(entry_count):
            key, (kind,) = self._text(), self._unpack("I")
            if key == _ARCHITECTURE and kind == _STRING:
                self.architecture = self._text()
                continue
            value = self._value(kind)
            alignment = value if key == _ALIGNMENT else alignment
        if not isinstance(alignment, int) or not 1 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise ValueError(f"alignment {alignment} is not a power of two up to {_MAX_ALIGNMENT}")
        found = [(self._text(), self._tensor()) for _ in range(tensor_count)]
        if len({name for name, _ in found}) != len(found):
            raise ValueError("two tensors have the same name")
        start = -(-self._at // alignment) * alignment
        for name, (kind, shape, offset) in found:
            if offset % alignment or start + offset > len(self._data):
                raise ValueError(f"tensor {name:.100} begins at {offset}, outside of the file or not aligned")
            yield name, TensorInfo(kind, shape, start + offset)

    def _take(self, size: int) -> bytes:
        end = self._at + size
        if end > len(self._data):
            raise ValueError("it ends within the header")
        part = self._data[self._at : end]
        self._at = end
        return part

    def _unpack(self, format: str) -> tuple[Any, ...]:
        return struct.unpack("<" + format, self._take(struct.calcsize("<" + format)))

    def _text(self) -> str:
        (size,) = self._unpack("Q")
        if size > _MAX_TEXT:
            raise ValueError(f"a name has {size} bytes")
        return self._take(size).decode()

    def _tensor(self) -> tuple[int, tuple[int, ...], int]:
        (dimensions,) = self._unpack("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise ValueError(f"a tensor has {dimensions} dimensions")
        shape = self._unpack(f"{dimensions}Q")
        if not 0 < prod(shape) <= 2**48:
            raise ValueError(f"a tensor has the shape {shape}")
        kind, offset = self._unpack("IQ")
        return kind, shape[::-1], offset

    def _value(self, kind: int, depth: int = 0) -> Any:
        """The next metadata value; of texts and arrays, which are skipped, None."""
        if kind in _SCALARS:
            return self._unpack(_SCALARS[kind])[0]
        if kind == _STRING:
            self._skip_texts(1)
        elif kind == _ARRAY:
            inner, count = self._unpack("IQ")
            if inner in _SCALARS:
                self._skip(count * struct.calcsize(_SCALARS[inner]))
            elif inner == _STRING:
                self._skip_texts(count)
            elif depth < _MAX_DEPTH and count * 12 <= len(self._data):
                for _ in range(count):
                    self._value(inner, depth + 1)
            else:
                raise ValueError(f"an array of {count} values of type {inner}")
        else:
            raise ValueError(f"a metadata value of type {kind}")
        return None

    def _skip(self, size: int) -> None:
        if self._at + size > len(self._data):
            raise ValueError("it ends within the header")
        self._at += size

    def _skip_texts(self, count: int) -> None:
        at, data, unpack = self._at, self._data, struct.Struct("<Q").unpack_from
        if count * 8 > len(data) - at:
            raise ValueError("it ends within the header")
        for _ in range(count):
            at += 8 + unpack(data, at)[0]
        self._at = at
        self._skip(0)
