"""The answers of a batch: a line each, in the order of the requests. A kill loses those that were not written yet."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from itertools import chain
from pathlib import Path
from typing import Any

from mcsd.batch_files.lines import Line
from mcsd.errors import DataError
from mcsd.files import exclusive_lock, write_error


def answer_line(line: Line, status: int, body: Any) -> str:
    """The answer to a request, in ASCII."""
    response = {"status_code": status, "request_id": f"req_{line.id}", "body": body}
    return f'{_head(line)}, "response": {json.dumps(response)}, "error": null}}'


def _head(line: Line) -> str:
    """What the answer to a request begins with: it says which request was answered with which options."""
    return f'{{"id": "batch_req_{line.id}", "custom_id": {json.dumps(line.custom_id)}'


class OutputFile:
    """The open file of answers.

    Args:
        path: of the file.
        file: it, without a buffer.
        lines: all requests.

    Attributes:
        answered: the number of answers that it had; one that was being written is cut off.
        unanswered: the other requests.

    Raises:
        DataError: an answer is that of another request or of other options.
    """

    def __init__(self, path: Path, file: FileIO, lines: Iterator[Line]) -> None:
        self._path, self._file = path, file
        self.answered, self._size = 0, 0
        self.unanswered = lines
        with path.open("rb") as written:
            for answer in written:
                line = self._checked(answer, next(lines, None))
                if not answer.endswith(b"\n"):
                    self.unanswered = chain([line], lines)
                    break
                self.answered += 1
                self._size += len(answer)
        self._cut()

    def _checked(self, answer: bytes, line: Line | None) -> Line:
        """The request, if an answer, or its part, is the one to it."""
        where = f"{self._path}: line {self.answered + 1}"
        hint = "give the same input and options to go on with it, or choose another output"
        if line is None:
            raise DataError(f"{where} answers no request", hint)
        head = f"{_head(line)}, ".encode()
        if answer.startswith(head if answer.endswith(b"\n") else head[: len(answer)]):
            return line
        try:
            custom_id = json.loads(answer)["custom_id"]
        except (ValueError, TypeError, KeyError, RecursionError):
            raise DataError(f"{where} is no answer to {line.custom_id!r:.60}", hint) from None
        if custom_id != line.custom_id:
            raise DataError(f"{where} answers custom_id {custom_id!r:.60}, not {line.custom_id!r:.60}", hint)
        raise DataError(f"{where} answers {custom_id!r:.60} with another body or other options", hint)

    def append(self, text: str) -> None:
        """Add an answer: it is with the operating system when this returns, or nothing of it is left.

        Raises:
            OutputFailed: the disk is full.
        """
        data = text.encode() + b"\n"
        try:
            left = memoryview(data)
            while left:
                left = left[self._file.write(left) :]
        except BaseException as error:
            self._cut()
            if isinstance(error, OSError):
                raise write_error(self._path, error) from error
            raise
        self._size += len(data)

    def _cut(self) -> None:
        """Leave whole answers only."""
        self._file.truncate(self._size)
        self._file.seek(self._size)


@contextmanager
def open_output(path: Path, lines: Iterator[Line]) -> Iterator[OutputFile]:
    """Open the file of answers for this process alone; see `OutputFile`.

    Raises:
        InvalidOption: another process writes it.
        DataError: its answers are those of other requests or options.
        OutputFailed: it cannot be written.
    """
    with exclusive_lock(path, path):
        try:
            file = FileIO(path, "r+")
        except OSError as error:
            raise write_error(path, error) from error
        with file:
            yield OutputFile(path, file, lines)
