"""Stop strings: where a text ends that comes piece by piece. Free of torch."""

from collections.abc import Collection, Sequence


class StopStrings:
    """Looks for stop strings in a text that grows, and holds back what may be the beginning of one.

    A stop string that holds a special token is looked for in the text with special tokens; the others in the text
    that users see.

    Args:
        stop: strings that end the text.
        include: whether the stop string is part of the text.
        special_tokens: texts of the special tokens that the text leaves out.
    """

    def __init__(self, stop: Sequence[str], include: bool = False, special_tokens: Collection[str] = ()) -> None:
        self._special = [one for one in stop if any(token in one for token in special_tokens)]
        self._plain = [one for one in stop if one not in self._special]
        self._include = include
        # The end of the text with special tokens, and which of its characters users see.
        self._held = ""
        self._shown: list[bool] = []
        self.found = False
        """Whether the text has ended at a stop string."""

    @property
    def needs_special_tokens(self) -> bool:
        """Whether a stop string holds a special token."""
        return bool(self._special)

    def push(self, text: str, special_token: str = "") -> str:
        """Add a text and then a special token that users do not see.

        Returns:
            The text that became final.
        """
        if not (self._plain or self._special):
            return text
        self._held += text + special_token
        self._shown += [True] * len(text) + [False] * len(special_token)
        places = [i for i, shown in enumerate(self._shown) if shown]
        visible = "".join(self._held[i] for i in places)
        ends = [
            (places[at + len(one) - 1] + 1, places[at], one) for one in self._plain if (at := visible.find(one)) >= 0
        ]
        ends += [(at + len(one), at, one) for one in self._special if (at := self._held.find(one)) >= 0]
        if ends:
            # The stop string that is complete first counts; of several that end together, the longest.
            _, start, stop = min(ends)
            self.found = True
            return self._take(start) + (stop if self._include else "")
        starts = [places[-n] for one in self._plain if (n := overlap(visible, one))]
        starts += [len(self._held) - n for one in self._special if (n := overlap(self._held, one))]
        return self._take(min(starts, default=len(self._held)))

    def finish(self) -> str:
        """The text that was held back; nothing follows."""
        return self._take(len(self._held))

    def _take(self, end: int) -> str:
        """Remove the held text up to ``end``, and return what users see of it."""
        text = "".join(c for c, shown in zip(self._held[:end], self._shown, strict=False) if shown)
        self._held, self._shown = self._held[end:], self._shown[end:]
        return text


def overlap(text: str, stop: str) -> int:
    """Length of the longest proper beginning of ``stop`` that ends ``text``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
