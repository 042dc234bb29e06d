"""Atomic writes, locks, JSONL logs, and the settings that a folder's content was made with."""

import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar
from uuid import uuid4

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mcsd.errors import DataError, InvalidOption, OutputFailed, WeightsCorrupt

SAVE_SECONDS = 30.0
"""Time between two checkpoints: the most work that an interruption loses, plus a step or two."""


def write_error(path: Path, error: Exception) -> OutputFailed:
    """The error to raise where a disk is full or a folder cannot be written."""
    reason = getattr(error, "strerror", None) or str(error)
    return OutputFailed(f"cannot write {path}: {reason}", "free space there or choose another folder, and run it again")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, renamed to it when the block succeeds and deleted otherwise.

    Raises:
        OutputFailed: the disk is full, or the folder cannot be written.
    """
    # Two processes may write the same file at once.
    part = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise write_error(path, error) from error
    finally:
        with suppress(OSError):
            part.unlink()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file.

    Raises:
        OutputFailed: see `atomic_path`.
    """
    with atomic_path(path) as part:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, dict(metadata or {}))


def save_text(path: Path, text: str) -> None:
    """Write a text file.

    Raises:
        OutputFailed: see `atomic_path`.
    """
    with atomic_path(path) as part:
        part.write_text(text, encoding="utf-8")


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """An open safetensors file. Errors of the block that come from its content are raised as `WeightsCorrupt`.

    Raises:
        WeightsCorrupt: the file cannot be read, or a tensor or metadata is missing or misshapen.
    """
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        raise WeightsCorrupt(
            f"{path} cannot be read: {error!r:.200}", "delete it, and run the command again"
        ) from error


Record = TypeVar("Record")


class JsonlLog(Generic[Record]):
    """Records in a file, a JSON object a line, written as they are appended: a kill loses the one in flight, no more.

    A last line without its end was being written, and is dropped. Without a key, any other line that is no record is an
    error. With a key, the log is a cache: its first line holds the key, a log of another key starts anew, and records
    from the first broken line on are dropped.

    Args:
        path: the file; it need not exist.
        parse: from a JSON value to a record; raises TypeError, ValueError or KeyError if it is none.
        key: what the records depend on.

    Attributes:
        records: in order. They are dataclasses or JSON objects.

    Raises:
        DataError: there is no key, and the file cannot be read or a line is no record.
        OutputFailed: the file cannot be written.
    """

    def __init__(self, path: Path, parse: Callable[[Any], Record], key: Mapping[str, Any] | None = None) -> None:
        self.path = path
        self.records: list[Record] = []
        try:
            text = path.read_text() if path.exists() else ""
        except (OSError, UnicodeError) as error:
            if key is None:
                raise DataError(f"{path} cannot be read: {error}", "delete the folder, or choose another") from error
            text = ""
        head = "" if key is None else json.dumps({"log": key}) + "\n"
        kept = head
        lines = text.splitlines(keepends=True)
        for number, line in enumerate(lines if text.startswith(head) else [], 1):
            if not line.endswith("\n") or (head and number == 1):
                continue
            try:
                self.records.append(parse(json.loads(line)))
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                if key is None:
                    raise DataError(
                        f"{path} holds no record in line {number}: {error!r:.80}", "delete the line, or the folder"
                    ) from error
                break
            kept += line
        if kept != text:
            save_text(path, kept)

    def append(self, record: Record) -> None:
        """Add a record: it is with the operating system when this returns.

        Raises:
            OutputFailed: the disk is full, or the folder cannot be written.
        """
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(record, default=asdict) + "\n")
        except OSError as error:
            raise write_error(self.path, error) from error
        self.records.append(record)


VERSION = "version"
"""The setting that numbers the format of a folder's files."""


def check_settings(path: Path, settings: Mapping[str, Any]) -> None:
    """Write the settings of a piece of work, or check that they are those it was begun with.

    Raises:
        InvalidOption: they differ, or the folder's files have another format.
        WeightsCorrupt: the file holds no settings.
        OutputFailed: see `atomic_path`.
    """
    try:
        old = dict(json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        save_text(path, json.dumps(dict(settings), indent=1) + "\n")
        return
    except (OSError, TypeError, ValueError) as error:
        raise WeightsCorrupt(f"{path} cannot be read: {error}", "delete the folder, or choose another") from error
    if old.get(VERSION) != settings.get(VERSION):
        raise InvalidOption(
            f"{path.parent} was begun with another version of mcsd, whose files have another format",
            "give another --out, or go on with the version it was begun with",
        )
    name, before, now = _first_difference(old, settings)
    if name:
        raise InvalidOption(
            f"{path.parent} was begun with {name}={before!r:.60}, not {now!r:.60}",
            "give the same options to go on with it, or another --out",
        )


def _first_difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, Any, Any]:
    """The first setting that differs, and its two values; an empty name if none does. ``a.b`` is b of a."""
    for name in {**old, **new}:
        before, now = old.get(name), new.get(name)
        if before != now and isinstance(before, Mapping) and isinstance(now, Mapping):
            inner, before, now = _first_difference(before, now)
            return f"{name}.{inner}", before, now
        if before != now:
            return name, before, now
    return "", None, None


@contextmanager
def exclusive_lock(path: Path, of: Path | None = None) -> Iterator[None]:
    """Lock a file, which is created if it is missing, while the block runs. A kill releases the lock too.

    Args:
        path: the file.
        of: what the lock protects; None: its folder.

    Raises:
        InvalidOption: another process holds it.
        OutputFailed: the file cannot be created.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT, 0o666)
    except OSError as error:
        raise write_error(path, error) from error
    with os.fdopen(descriptor) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InvalidOption(
                f"{of or path.parent} is being written by another process", "wait until it ends, or write elsewhere"
            ) from error
        yield
