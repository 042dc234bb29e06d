"""Files that are whole or absent, and the settings that say what a folder was made with."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mcsd.errors import InvalidOption, OutputFailed, WeightsCorrupt

SAVE_SECONDS = 30.0
"""Time between two writings of what has been done: what a break loses at most, a step or two more."""


def unwritable(path: Path, error: Exception) -> OutputFailed:
    """What to tell a user whose disk is full or whose folder cannot be written."""
    reason = getattr(error, "strerror", None) or str(error)
    return OutputFailed(f"cannot write {path}: {reason}", "free space there or choose another folder, and run it again")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its name when the block ends well, and is gone otherwise.

    Raises:
        OutputFailed: the disk is full, or the folder cannot be written.
    """
    # Two may write the same file at once.
    part = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error) from error
    finally:
        with suppress(OSError):
            part.unlink()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        OutputFailed: see `replacing`.
    """
    with replacing(path) as part:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, dict(metadata or {}))


def save_text(path: Path, text: str) -> None:
    """Write a text file.

    Raises:
        OutputFailed: see `replacing`.
    """
    with replacing(path) as part:
        part.write_text(text)


def append_line(path: Path, value: Any) -> None:
    """Add a JSON value to a file of such, as a line: it is with the operating system when this returns.

    Raises:
        OutputFailed: the disk is full, or the folder cannot be written.
    """
    try:
        with path.open("a") as file:
            file.write(json.dumps(value) + "\n")
    except OSError as error:
        raise unwritable(path, error) from error


@contextmanager
def tensors_of(path: Path) -> Iterator[Any]:
    """An open safetensors file; whatever is wrong with what the block reads of it is named.

    Raises:
        WeightsCorrupt: it cannot be read, or lacks what is looked for.
    """
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        # Tensors or metadata are missing or misshapen.
        raise WeightsCorrupt(
            f"{path} cannot be read: {error!r:.200}", "delete it, and run the command again"
        ) from error


def same_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a piece of work, or check that they are those it was begun with.

    Raises:
        InvalidOption: they are not.
        OutputFailed: see `replacing`.
    """
    try:
        old = dict(json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        save_text(path, json.dumps(dict(settings), indent=1) + "\n")
        return
    except (OSError, TypeError, ValueError) as error:
        raise WeightsCorrupt(f"{path} cannot be read: {error}", "delete the folder, or choose another") from error
    name, before, now = _difference(old, settings)
    if name:
        raise InvalidOption(
            f"{path.parent} was begun with {name}={before!r:.60}, not {now!r:.60}",
            "give the same options to go on with it, or another --out",
        )


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, Any, Any]:
    """The first setting that differs, and its two values; no name if none does. ``a.b`` is b of a."""
    for name in {**old, **new}:
        before, now = old.get(name), new.get(name)
        if before != now and isinstance(before, Mapping) and isinstance(now, Mapping):
            inner, before, now = _difference(before, now)
            return f"{name}.{inner}", before, now
        if before != now:
            return name, before, now
    return "", None, None


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """While the block runs, nobody else can be in such a block with the same file. A kill ends it too.

    Raises:
        InvalidOption: another one is.
    """
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InvalidOption(
                f"{path.parent} is being written by another process", "wait until it ends, or choose another folder"
            ) from error
        yield
