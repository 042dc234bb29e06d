"""Prompts and texts that users give to learn from."""

import json
from pathlib import Path

from mcsd.errors import DataError

_LARGEST = 1 << 32


def load_prompts(path: Path) -> list[str]:
    """A prompt a line: JSON objects with a field "prompt" in a ``.jsonl`` file, else plain text.

    Raises:
        DataError: the file cannot be read, holds no prompt, or a line that is none.
    """
    lines = [line for line in _read(path).splitlines() if line.strip()]
    prompts = lines
    if path.suffix == ".jsonl":
        try:
            prompts = [json.loads(line)["prompt"] for line in lines]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{path} holds a line that is no prompt: {error!r:.100}", 'give {"prompt": "..."}'
            ) from error
    if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise DataError(f"{path} holds no prompts", "give one a line")
    return prompts


def load_texts(path: Path) -> list[str]:
    """A file of plain text.

    Raises:
        DataError: it cannot be read, or is empty.
    """
    text = _read(path)
    if not text.strip():
        raise DataError(f"{path} is empty", "give a file that holds text")
    return [text]


def _read(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST:
            raise DataError(f"{path} is larger than {_LARGEST} bytes", "split it and give a part")
        return path.read_text()
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path} cannot be read: {error}", "give a file of UTF-8 text") from error
