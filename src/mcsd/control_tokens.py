"""Control tokens of a conversation come from its chat template alone: users cannot write them. Free of torch."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from mcsd.errors import InvalidParameter


class SpecialTokensAsText:
    """Keeps special tokens that users write into a conversation from becoming control tokens.

    A mark inside each of them goes through the chat template. Where the rendered text is then cut at the marks and each
    piece is encoded by itself, no piece holds a whole special token of a user.

    The option ``sanitize_control_tokens`` of transformers switches the tokenizer that all requests share to another
    mode meanwhile, so a request in another thread would lose its control tokens.

    Args:
        tokenizer: of the model.
        given: texts, in lists and mappings.

    Attributes:
        found: whether the texts hold a special token.

    Raises:
        InvalidParameter: the texts are not valid Unicode, or hold every mark.
    """

    _MARKS = tuple(map(chr, range(0xFDD0, 0xFDF0)))
    """Code points that Unicode reserves for uses inside of programs."""

    def __init__(self, tokenizer: Any, given: Any) -> None:
        texts = list(_strings(given))
        try:
            for text in texts:
                text.encode()
        except UnicodeError as error:
            raise InvalidParameter("a message is not valid Unicode text", "decode it with its own encoding") from error
        # One character cannot be cut.
        special = [re.escape(token) for token in special_tokens(tokenizer) if len(token) > 1]
        self._begins = re.compile(f"(?=(?:{'|'.join(special)})).", re.DOTALL) if special else None
        self.found = self._begins is not None and any(map(self._begins.search, texts))
        self._mark = next((mark for mark in self._MARKS if not any(mark in text for text in texts)), "")
        if self.found and not self._mark:
            raise InvalidParameter("the messages hold special tokens and noncharacters", "leave out U+FDD0 to U+FDEF")

    def split(self, value: Any) -> Any:
        """A copy of texts, in lists and mappings, with a mark after the first character of each special token."""
        if not self.found or self._begins is None:
            return value
        if isinstance(value, str):
            return self._begins.sub(lambda begin: begin[0] + self._mark, value)
        if isinstance(value, Mapping):
            return {self.split(key): self.split(one) for key, one in value.items()}
        return [self.split(one) for one in value] if isinstance(value, list | tuple) else value

    def pieces(self, text: str) -> list[str]:
        """A rendered text, cut at the marks."""
        return [piece for piece in text.split(self._mark) if piece]


def _strings(value: Any) -> Iterator[str]:
    """All texts in lists and mappings."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _strings(one)


def special_tokens(tokenizer: Any | None) -> list[str]:
    """The texts of all special tokens."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return [*getattr(tokenizer, "all_special_tokens", ()), *(token.content for token in added if token.special)]
