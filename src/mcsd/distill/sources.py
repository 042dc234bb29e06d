"""Text files that users give to learn from."""

from pathlib import Path

from mcsd.errors import DataError
from mcsd.prompts import read_text


def load_texts(path: Path) -> list[str]:
    """Read a file of plain text.

    Raises:
        DataError: the file cannot be read, or is empty.
    """
    text = read_text(path)
    if not text.strip():
        raise DataError(f"{path} is empty", "give a file that holds text")
    return [text]
