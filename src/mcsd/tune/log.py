"""What has been measured so far, a line each: so that a run that is broken off goes on where it was."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mcsd.errors import OutputFailed


class Log:
    """A JSONL file whose first line says what it is a log of.

    Args:
        path: the file; whatever it is a log of something else, or is no log, is begun anew.
        key: of what.

    Raises:
        OutputFailed: it cannot be written.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self._path = path
        self.entries: list[dict[str, Any]] = []
        head = {"log": dict(key)}
        lines = _read(path)
        whole = lines[:1] == [head]
        self.entries = lines[1:] if whole else []
        # What a kill has left half-written is gone, too.
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(line) + "\n" for line in (head, *self.entries)))
        except OSError as error:
            raise _unwritable(path, error) from error

    def add(self, entry: dict[str, Any]) -> None:
        """Take an entry down, on disk.

        Raises:
            OutputFailed: it cannot be written.
        """
        self.entries.append(entry)
        try:
            with self._path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        except OSError as error:
            raise _unwritable(self._path, error) from error

    def delete(self) -> None:
        """The work is done."""
        self._path.unlink(missing_ok=True)


def _read(path: Path) -> list[Any]:
    """The lines up to the first one that is not whole."""
    lines: list[Any] = []
    try:
        for line in path.read_text().splitlines(keepends=True):
            if not line.endswith("\n"):
                break
            lines.append(json.loads(line))
    except (OSError, ValueError):
        pass
    return lines


def _unwritable(path: Path, error: OSError) -> OutputFailed:
    return OutputFailed(
        f"cannot write {path}: {error.strerror or error}", "free space there, or set MCSD_HOME to another folder"
    )
