"""A draft with another tokenizer: the tokens that it shares with the target, and the target's texts in its tokens.

A draft proposes the shared tokens only (token-level intersection, Timor et al. 2025, arXiv 2502.05202). Its
distribution over them, renormalised, is the q of the candidates.
"""

from collections.abc import Iterator
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from mcsd.models.protocol import LanguageModel
from mcsd.models.token_texts import TokenText, token_texts

_REPLACEMENT = "�"


class VocabularyMap:
    """The tokens that a target and a draft share, which are those of equal text; and translations to the draft.

    Args:
        target, draft: tokenizers of transformers.
        target_size, draft_size: of the models' vocabularies. Tokens beyond them are not used.

    Attributes:
        target_ids, draft_ids: the shared tokens, in the same order. No token occurs twice.
    """

    def __init__(self, target: Any, draft: Any, target_size: int, draft_size: int) -> None:
        self._target, self._draft, self._draft_size = target, draft, draft_size
        self._texts = token_texts(target, target_size)
        self._by_text = _first_of_each_text(token_texts(draft, draft_size))
        shared = {
            token: self._by_text[text]
            for text, token in _first_of_each_text(self._texts).items()
            if text in self._by_text
        }
        self.target_ids, self.draft_ids = list(shared), list(shared.values())
        self._translated = {token: [own] for token, own in shared.items()}

    def translate(self, token: int) -> list[int]:
        """A token of the target in tokens of the draft, at least one: itself if shared, else its text in pieces."""
        if token not in self._translated:
            self._translated[token] = self._pieces(token) or [self._unknown]
        return self._translated[token]

    def encode(self, tokens: list[int]) -> list[int]:
        """A text of the target in tokens of the draft, at least one, as the draft's tokenizer splits it.

        Special tokens that are not shared are left out.
        """
        encoded: list[int] = []
        for is_special, group in groupby(tokens, lambda token: isinstance(self._texts.get(token, ""), str)):
            run = list(group)
            encoded += [own for token in run for own in self._pieces(token)] if is_special else self._split(run)
        start = [] if encoded[:1] == self._start else self._start
        return [*start, *encoded] or [self._unknown]

    def _split(self, tokens: list[int]) -> list[int]:
        """A text without special tokens in tokens of the draft."""
        try:
            text = self._target.decode(tokens, clean_up_tokenization_spaces=False)
            # The bytes of an unfinished character are no text yet.
            ids = self._draft(text.rstrip(_REPLACEMENT), add_special_tokens=False, verbose=False)["input_ids"]
        except Exception:
            # A tokenizer may raise anything, and a poor context only lowers acceptance.
            return [own for token in tokens for own in self.translate(token)]
        return [own for own in ids if own < self._draft_size]

    def _pieces(self, token: int) -> list[int]:
        """Tokens of the draft for the text of a token; what the draft has no token for is left out."""
        text = self._texts.get(token, "")
        if isinstance(text, str):
            return [self._by_text[text]] if text in self._by_text else []
        return list(self._longest_matches(text))

    def _longest_matches(self, text: bytes) -> Iterator[int]:
        start = 0
        while start < len(text):
            ends = range(min(len(text), start + self._longest), start, -1)
            end = next((end for end in ends if text[start:end] in self._by_text), None)
            if end is not None:
                yield self._by_text[text[start:end]]
            start = end or start + 1

    @cached_property
    def _longest(self) -> int:
        """Bytes of the draft's longest token."""
        return max((len(text) for text in self._by_text if isinstance(text, bytes)), default=0)

    @cached_property
    def _start(self) -> list[int]:
        """The token that the draft's tokenizer puts before a text, if it does."""
        bos = getattr(self._draft, "bos_token_id", None)
        return [bos] if bos is not None and self._draft("")["input_ids"][:1] == [bos] else []

    @cached_property
    def _unknown(self) -> int:
        """The draft's token for a text that it has none for."""
        names = ("unk_token_id", "bos_token_id", "eos_token_id")
        known = (getattr(self._draft, name, None) for name in names)
        return next((token for token in known if token is not None and token < self._draft_size), 0)


def _first_of_each_text(texts: dict[int, TokenText]) -> dict[TokenText, int]:
    """The token of each text that is not empty."""
    return {text: token for token, text in reversed(texts.items()) if text}


class TranslatedModel:
    """A draft model with another tokenizer than the target's.

    Args:
        model: the draft.
        vocabulary_map: from the target's tokens to the draft's.

    Attributes:
        name, device, precision: of the model.
        columns: int64 ``[K]``, the model's logits of shared tokens.
        vocabulary: int64 ``[K]``, their tokens, of the target.
        own_ids: int64 ``[n]``, the draft's token of each shared token of the target; 0 for others.
    """

    def __init__(self, model: LanguageModel, vocabulary_map: VocabularyMap) -> None:
        self.model = model
        self.vocabulary_map = vocabulary_map
        self.name = model.name
        self.device: torch.device = model.device
        self.precision: str = getattr(model, "precision", "")
        # The output matrix may be cut to a draft vocabulary.
        cut: Tensor | None = getattr(model, "vocabulary", None)
        tokens = range(model.vocab_size) if cut is None else cut.tolist()
        target_ids = dict(zip(vocabulary_map.draft_ids, vocabulary_map.target_ids, strict=True))
        shared = {column: target_ids[token] for column, token in enumerate(tokens) if token in target_ids}
        self.columns = torch.tensor(list(shared), dtype=torch.int64, device=self.device)
        self.vocabulary = torch.tensor(list(shared.values()), dtype=torch.int64, device=self.device)
        own_ids = torch.zeros(1 + max(vocabulary_map.target_ids, default=0), dtype=torch.int64)
        own_ids[vocabulary_map.target_ids] = torch.tensor(vocabulary_map.draft_ids, dtype=torch.int64)
        self.own_ids = own_ids.to(self.device)
