"""From tokens to text while they come: whole characters only, and stop strings found wherever tokens cut them."""

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "�"


class TextStream:
    """The text of one request, token by token.

    Text is released once it is certain: a character whose bytes are still coming, and a possible beginning of a
    stop string, are held back.

    Args:
        tokenizer: of the target; None gives no text.
        stop: strings that end the text.
    """

    def __init__(self, tokenizer: Any | None, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []
        # Tokens from _start to _read have been turned to text; decoding from _start gives the rest its context.
        self._start = self._read = 0
        self._held = ""
        self.stopped = False
        """Whether a stop string has been found; the text ends before it."""

    def push(self, token: int) -> str:
        """Take a token and return the text it makes certain."""
        if self._tokenizer is None or self.stopped:
            return ""
        self._ids.append(token)
        new = self._undecoded()
        if not new or new.endswith(_UNFINISHED):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._release(new)

    def finish(self) -> str:
        """What was held back, once no token follows."""
        if self._tokenizer is None or self.stopped:
            return ""
        self._held, rest = "", self._held + self._undecoded()
        self._start = self._read = len(self._ids)
        return self._before_stop(rest)

    def _undecoded(self) -> str:
        assert self._tokenizer is not None
        old = self._tokenizer.decode(self._ids[self._start : self._read], skip_special_tokens=True)
        new = self._tokenizer.decode(self._ids[self._start :], skip_special_tokens=True)
        return str(new[len(old) :])

    def _release(self, new: str) -> str:
        text = self._held + new
        before = self._before_stop(text)
        if self.stopped:
            self._held = ""
            return before
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _before_stop(self, text: str) -> str:
        # The string that is complete first counts; of several that end together, the longest.
        found = [(start + len(stop), start) for stop in self._stop if (start := text.find(stop)) >= 0]
        self.stopped = bool(found)
        return text[: min(found)[1]] if found else text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of ``stop`` that ends ``text``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
