"""The requests of a batch: lines of a file, checked before anything is generated and read one by one."""

import hashlib
import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mcsd.errors import DataError

MAX_LINE = 1 << 24
"""Bytes of a line."""


class Line(NamedTuple):
    """A request.

    Attributes:
        raw: its bytes, without the line break.
        custom_id: the user's name for it.
        id: of its answer: a digest of its bytes and of the options.
        seed: used if its body has none; from the same digest.
        value: all of it, as JSON.
    """

    raw: bytes
    custom_id: str
    id: str
    seed: int
    value: dict[str, Any]

    @classmethod
    def of(cls, raw: bytes, key: bytes) -> "Line":
        """The request in some bytes.

        Args:
            raw: the bytes.
            key: of the options, see `BatchOptions.key`.

        Raises:
            ValueError: they are no JSON object with a custom_id.
        """
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"is not JSON: {error!s:.100}") from error
        if not isinstance(value, dict):
            raise ValueError("is no JSON object")
        custom_id = value.get("custom_id")
        if not isinstance(custom_id, str) or not custom_id:
            raise ValueError("has no custom_id, which is a text")
        digest = hashlib.blake2b(raw, key=key, digest_size=20).digest()
        return cls(raw, custom_id, digest[:12].hex(), int.from_bytes(digest[12:], "little"), value)


def read_lines(path: Path, key: bytes) -> Iterator[Line]:
    """The requests of a file, read as they are asked for. Empty lines are left out.

    Raises:
        DataError: the file cannot be read, or a line is no request.
    """
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(MAX_LINE + 1):
                number += 1
                if len(raw) > MAX_LINE:
                    raise ValueError(f"is longer than {MAX_LINE} bytes")
                if raw := raw.strip():
                    yield Line.of(raw, key)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}", "give a file of requests, one a line") from error
    except ValueError as error:
        raise DataError(f"{path}: line {number} {error}", 'give {"custom_id", "method", "url", "body"}') from error


def check_lines(path: Path, key: bytes) -> int:
    """Check a file of requests, and return their number. It takes eight bytes of memory a line.

    Raises:
        DataError: there is none, a line is no request, or two have the same custom_id.
    """
    if not path.is_file():
        raise DataError(f"{path} is no file", "give a file of requests, one a line")
    hashes = array("Q", (_hash(line) for line in read_lines(path, key)))
    if not hashes:
        raise DataError(f"{path} has no requests", "give one a line")
    ordered = np.sort(np.frombuffer(hashes, np.uint64))
    suspects = set(ordered[1:][ordered[1:] == ordered[:-1]].tolist())
    seen: set[str] = set()
    for line in read_lines(path, key) if suspects else ():
        if line.custom_id in seen:
            raise DataError(f"{path} has the custom_id {line.custom_id!r:.80} twice", "give each line one of its own")
        if _hash(line) in suspects:
            seen.add(line.custom_id)
    return len(hashes)


def _hash(line: Line) -> int:
    name = line.custom_id.encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little")
