"""Look-up in texts that the user gives: a suffix array of the contexts of all tokens."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property

import torch

from mcsd.drafters.look_up import MAX_MATCH, LookUp, PredictionSource, Source, match_length
from mcsd.errors import InvalidOption

MAX_TOKENS = 1 << 22
"""Tokens of the largest corpus. The index takes eight bytes a token, the tokens themselves as much again."""

_NEIGHBOURS = 8
"""Places in the order of contexts that are compared on either side of the text's own."""

_END = -1
"""Stands after each text."""


class Corpus:
    """Texts in which the last tokens of other texts are looked up.

    Args:
        texts: token ids of each.

    Raises:
        InvalidOption: more than `MAX_TOKENS` tokens, or a negative token id.
    """

    def __init__(self, texts: Iterable[Sequence[int]]) -> None:
        self.tokens: list[int] = []
        for text in texts:
            if len(self.tokens) + len(text) > MAX_TOKENS:
                raise InvalidOption(f"a corpus of more than {MAX_TOKENS} tokens", "give fewer or shorter texts")
            if text and min(text) < 0:
                raise InvalidOption(f"the corpus has a token id {min(text)}", "give token ids of the target")
            self.tokens += [*text, _END]

    @cached_property
    def _order(self) -> list[int]:
        """All positions, ordered by the tokens up to each, the last one first: by prefix doubling."""
        rank = torch.tensor(self.tokens) - _END + 1
        length = 1
        while length < MAX_MATCH:
            # A context that begins with the corpus has nothing before it, which is less than any token.
            earlier = torch.nn.functional.pad(rank, (length, 0))[: len(rank)]
            rank = torch.unique(rank * (int(rank.max()) + 1) + earlier, return_inverse=True)[1] + 1
            length *= 2
        return rank.argsort(stable=True).tolist()

    def find(self, text: Sequence[int], end: int) -> tuple[int, int]:
        """Where ``text[: end + 1]`` goes on: match length and following position, (0, -1) if nowhere.

        Of the longest matches, one that is followed by the most frequent token.
        """
        context = list(reversed(text[max(0, end + 1 - MAX_MATCH) : end + 1]))
        place = bisect_left(self._order, context, key=self._context) if self.tokens else 0
        near = self._order[max(0, place - _NEIGHBOURS) : place + _NEIGHBOURS] if self.tokens else []
        found = [(match_length(self.tokens, before, text, end), before + 1) for before in near]
        found = [each for each in found if each[0] and self.tokens[each[1]] != _END]
        if not found:
            return 0, -1
        longest = [each for each in found if each[0] == max(found)[0]]
        followers = Counter(self.tokens[position] for _, position in longest)
        return max(longest, key=lambda each: followers[self.tokens[each[1]]])

    def _context(self, position: int) -> list[int]:
        return self.tokens[max(0, position + 1 - MAX_MATCH) : position + 1][::-1]


class CorpusSource(Source):
    """A corpus, of which the longest match is followed."""

    priors = (0.0, 0.02, 0.1, 0.25, 0.4, 0.6, 0.75, 0.9)

    def __init__(self, corpus: Corpus) -> None:
        super().__init__(corpus.tokens)
        self._corpus = corpus

    def resume(self, text: list[int], end: int) -> None:
        """See `Source.resume`."""
        self.length, self.position = self._corpus.find(text, end)

    @property
    def points(self) -> bool:
        """See `Source.points`."""
        return super().points and self.tokens[self.position] != _END

    def continuation(self, text: list[int], most: int) -> list[int]:
        """See `Source.continuation`. It ends with its text."""
        tokens = super().continuation(text, most)
        return tokens[: tokens.index(_END)] if _END in tokens else tokens

    def acceptance(self, most: int) -> list[float]:
        """See `Source.acceptance`."""
        return super().acceptance(len(self.continuation([], most)))


def look_up_in(corpus: Corpus, prompt: list[int], prediction: Sequence[int] = ()) -> LookUp:
    """The sources of a new sequence: its text, the corpus, and what its answer is expected to be, if that is known."""
    predictions: list[Source] = [PredictionSource(prediction)] if prediction else []
    return LookUp(prompt, [*predictions, *([CorpusSource(corpus)] if corpus.tokens else [])])
