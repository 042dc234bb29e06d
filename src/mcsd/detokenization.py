"""Generated tokens to text, token by token. Free of torch."""

from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from mcsd.control_tokens import special_tokens
from mcsd.params import SamplingParams
from mcsd.stop_strings import StopStrings, overlap

_UNFINISHED = "\ufffd"
_CONTEXT, _MOST_CONTEXT = 8, 64
"""Tokens of the prompt that give the text its context: at least, and at most if the last ones have no text."""


class TextStream:
    """Decodes the text of one request token by token.

    The text continues that of the prompt: with decoders that drop a space at the beginning of a text, it keeps the
    space that separates them. Where a tokenizer cleans up spaces (``clean_up_tokenization_spaces``), which can change
    the end of the prompt, the text is that of the new tokens alone.

    Text is released once it is final: an incomplete character, a space that may be cleaned up and a possible beginning
    of a stop string are held back.

    Args:
        tokenizer: of the target; without one there is no text.
        params: the stop strings, and whether the text has them and special tokens.
        prompt: token ids before the text.
    """

    def __init__(self, tokenizer: Any | None, params: SamplingParams, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._options: dict[str, bool] = {"skip_special_tokens": params.skip_special_tokens}
        self._cleanup: _SpaceCleanup | None = None
        special = special_tokens(tokenizer) if params.stop and params.skip_special_tokens else []
        self._stops = StopStrings(params.stop, params.include_stop, special)
        # Tokens whose text is released, which give the next ones their context, and those that come after them.
        self._before: list[int] = []
        self._pending: list[int] = []
        if tokenizer is None:
            return
        if _cleans_up(tokenizer):
            self._cleanup = _SpaceCleanup(tokenizer)
            self._options["clean_up_tokenization_spaces"] = False
        else:
            self._before = self._context(prompt)
        self._released = self._text = self._decode(self._before)

    @property
    def stopped(self) -> bool:
        """Whether the text has ended at a stop string."""
        return self._stops.found

    def push(self, token: int) -> str:
        """Add a token and return the text that became final."""
        if self._tokenizer is None or self.stopped:
            return ""
        text = self._decode([*self._before, *self._pending, token])
        if text == self._text and self._is_skipped(token):
            return self._push_special(token)
        self._pending.append(token)
        self._text = text
        new = self._new_text()
        if not new or new.endswith(_UNFINISHED):
            return ""
        self._before, self._pending = self._pending, []
        self._released = self._text = self._decode(self._before)
        return self._stops.push(self._cleanup.push(new) if self._cleanup else new)

    def finish(self) -> str:
        """Return the text that was held back; no token follows."""
        if self._tokenizer is None or self.stopped:
            return ""
        rest, self._text = self._new_text(), self._released
        if self._cleanup:
            rest = self._cleanup.push(rest) + self._cleanup.finish()
        text = self._stops.push(rest)
        return text if self.stopped else text + self._stops.finish()

    def _push_special(self, token: int) -> str:
        """Add a special token that is left out of the text: a stop string may hold it."""
        if not self._stops.needs_special_tokens:
            return ""
        name = self._decode([token], skip_special_tokens=False)
        return self._stops.push(self._cleanup.finish() if self._cleanup else "", name)

    def _is_skipped(self, token: int) -> bool:
        """Whether a token without text is left out of it, rather than a space that the decoder drops."""
        return not self._decode([token]) and bool(self._decode([token], skip_special_tokens=False))

    def _new_text(self) -> str:
        released, text = self._released, self._text
        if text.startswith(released):
            return text[len(released) :]
        # The prompt ends inside a character, which the text completes.
        same = (old == new for old, new in zip(released, text, strict=False))
        return text[len(list(takewhile(bool, same))) :]

    def _context(self, prompt: Sequence[int]) -> list[int]:
        """The last tokens of a prompt: enough of them for some text, which begins with a whole character."""
        size = _CONTEXT
        while size < min(_MOST_CONTEXT, len(prompt)) and not self._decode(prompt[-size:]):
            size *= 2
        tail = list(prompt[-size:])
        whole = (tail[cut:] for cut in range(4) if not self._decode(tail[cut:]).startswith(_UNFINISHED))
        return next(whole, tail)

    def _decode(self, ids: Sequence[int], **options: bool) -> str:
        assert self._tokenizer is not None
        return str(self._tokenizer.decode(list(ids), **{**self._options, **options}))


class _SpaceCleanup:
    """Cleans up spaces before punctuation as the tokenizer does, in a text that comes piece by piece."""

    _PATTERNS = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
    """What ``clean_up_tokenization`` of transformers replaces."""

    def __init__(self, tokenizer: Any) -> None:
        self._clean = tokenizer.clean_up_tokenization
        self._held = ""

    def push(self, text: str) -> str:
        """Add a text and return what became final: the rest may be the beginning of patterns."""
        text = self._held + text
        end = len(text)
        while count := max(overlap(text[:end], pattern) for pattern in self._PATTERNS):
            end -= count
        self._held = text[end:]
        return str(self._clean(text[:end]))

    def finish(self) -> str:
        """The text that was held back; nothing follows."""
        text, self._held = self._held, ""
        return str(self._clean(text))


def _cleans_up(tokenizer: Any) -> bool:
    """Whether a tokenizer cleans up spaces: transformers ignores the option for some."""
    if not getattr(tokenizer, "clean_up_tokenization_spaces", False):
        return False
    ids = tokenizer("a" + "a".join(_SpaceCleanup._PATTERNS), add_special_tokens=False)["input_ids"]
    return bool(tokenizer.decode(ids) != tokenizer.decode(ids, clean_up_tokenization_spaces=False))
