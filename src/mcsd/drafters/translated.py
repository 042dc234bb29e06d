"""A language model with another tokenizer as draft."""

from dataclasses import dataclass, field

from torch import Tensor

from mcsd.drafters.level import Level, PendingTokens
from mcsd.drafters.model import ModelDrafter
from mcsd.models.prefix_cache import MAX_TEXTS
from mcsd.models.vocabulary_map import TranslatedModel, VocabularyMap


class TranslatedDrafter(ModelDrafter):
    """Drafts the tokens that both vocabularies share, from a context in the draft's own tokens.

    Candidates, and the q that they were drawn from, are tokens of the target: the draft's logits of shared tokens are
    selected before q is made. A poor translation of the context lowers acceptance and changes no distribution.

    Args:
        model: the draft.
        max_batch: sequences that run together.
        slots: as of `ModelDrafter`. The context has at most so many tokens, and at most the draft's context length;
            of a longer one the draft reads the latest part.
        max_texts: of its prefix cache.
    """

    def __init__(self, model: TranslatedModel, max_batch: int, slots: int, max_texts: int = MAX_TEXTS) -> None:
        # A translated text may be longer: it may fill the slots that the target leaves to trees.
        super().__init__(model.model, len(model.vocabulary), max_batch, 2 * slots, max_texts)
        self._vocabulary = model.vocabulary
        self._translation = model
        self._max_tokens = min(slots, model.model.max_length or slots)
        self._contexts: list[_Context] = []

    def add(self, prompt: list[int], hidden: Tensor | None) -> None:
        """See `Drafter.add`."""
        super().add(prompt, hidden)
        self._contexts.append(_Context())

    def keep(self, sequence: int, token_ids: list[int]) -> None:
        """See `Drafter.keep`: in its own tokens."""
        super().keep(sequence, self._contexts[sequence].tokens)

    def remove(self, sequence: int) -> None:
        """See `Drafter.remove`."""
        super().remove(sequence)
        self._contexts[sequence] = self._contexts[-1]
        self._contexts.pop()

    def clear(self) -> None:
        """See `Drafter.clear`."""
        super().clear()
        self._contexts.clear()

    def _whole_texts(self, token_ids: list[list[int]]) -> list[list[int]]:
        """The contexts of all sequences, as far as the draft can read them."""
        for sequence, (context, tokens) in enumerate(zip(self._contexts, token_ids, strict=True)):
            context.extend(tokens, self._translation.vocabulary_map)
            if len(context.tokens) > self._max_tokens:
                # Half of it, so that the next steps need not read it again.
                context.tokens = context.tokens[-max(1, self._max_tokens // 2) :]
                self.cache.truncate(sequence, 0)
                self._starts[sequence] = 0
        return [context.tokens for context in self._contexts]

    def _root_logits(self, pending: PendingTokens, *states: Tensor) -> Tensor:
        return self._of_shared(super()._root_logits(pending, *states))

    def _level_logits(self, tokens: Tensor, level: Level) -> Tensor:
        return self._of_shared(super()._level_logits(self._translation.own_ids[tokens], level))

    def _of_shared(self, logits: Tensor) -> Tensor:
        """The logits ``[..., K]`` of shared tokens."""
        return logits.index_select(-1, self._translation.columns)


@dataclass
class _Context:
    """The text of a sequence in tokens of the draft.

    Attributes:
        tokens: at least one, once the sequence has been read.
        length: tokens of the target that they stand for.
    """

    tokens: list[int] = field(default_factory=list)
    length: int = 0

    def extend(self, text: list[int], vocabulary_map: VocabularyMap) -> None:
        """Translate the tokens that a text has grown by: the first ones together, later ones each by itself.

        The draft's cache holds accepted candidates, which are shared tokens, so their translation must not change.
        """
        if not self.length:
            self.tokens = vocabulary_map.encode(text)
        else:
            self.tokens += [own for token in text[self.length :] for own in vocabulary_map.translate(token)]
        self.length = len(text)
