"""What has been measured so far, a line each: so that a run that is broken off goes on where it was."""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from mcsd.files import alone, append_line, save_text, unwritable

_FIELDS = {
    "steps": {"kind", "prompt", "temperature", "steps", "wall"},
    "forwards": {"kind", "curve", "wall"},
    "race": {"kind", "prompt", "temperature", "name", "tokens", "calls", "seconds", "wall"},
}
"""Of the entries, by kind."""


class Log:
    """A JSONL file that one process writes at a time. Its first line says what it is a log of.

    Args:
        path: the file; it need not be there.

    Attributes:
        entries: what has been taken down.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = path.with_name(f".{path.name}.lock")
        self._stack = ExitStack()
        self.entries: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.touch()
        except OSError as error:
            raise unwritable(self._lock, error) from error
        self._stack.enter_context(alone(self._lock))
        return self

    def __exit__(self, *_: object) -> None:
        if not self._path.exists():
            self._lock.unlink(missing_ok=True)
        self._stack.close()

    def begin(self, key: Mapping[str, Any]) -> None:
        """Go on with what is there, up to a line that was broken off; with nothing, if it is a log of something else.

        Args:
            key: of what.

        Raises:
            OutputFailed: it cannot be written.
        """
        head = {"log": dict(key)}
        lines = _whole(self._path)
        self.entries = _sound(lines[1:]) if lines[:1] == [head] else []
        save_text(self._path, "".join(json.dumps(line) + "\n" for line in (head, *self.entries)))

    def add(self, entry: dict[str, Any]) -> None:
        """Take an entry down, on disk.

        Raises:
            OutputFailed: it cannot be written.
        """
        self.entries.append(entry)
        append_line(self._path, entry)

    def delete(self) -> None:
        """The work is done."""
        self._path.unlink(missing_ok=True)


def _whole(path: Path) -> list[Any]:
    """The lines up to the first one that is not whole."""
    lines: list[Any] = []
    try:
        for line in path.read_text().splitlines(keepends=True):
            if not line.endswith("\n"):
                break
            lines.append(json.loads(line))
    except (OSError, ValueError, RecursionError):
        pass
    return lines


def _sound(lines: list[Any]) -> list[dict[str, Any]]:
    """The lines up to the first one that is no entry."""
    entries: list[dict[str, Any]] = []
    for line in lines:
        if not isinstance(line, dict) or set(line) != _FIELDS.get(str(line.get("kind"))):
            break
        entries.append(line)
    return entries
