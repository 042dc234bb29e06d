"""The drafter for whatever a user gives as draft."""

from collections.abc import Iterable, Sequence
from typing import Any

from mcsd.drafters.base import Drafter
from mcsd.drafters.head import HeadDrafter
from mcsd.drafters.level import MAX_LAG, LevelDrafter
from mcsd.drafters.mixed import MAX_CHAIN, MixedDrafter
from mcsd.drafters.model import ModelDrafter
from mcsd.drafters.ngram import NgramDrafter
from mcsd.drafters.translated import TranslatedDrafter
from mcsd.errors import UnsupportedModel
from mcsd.models import BoundHead, LanguageModel
from mcsd.models.compatibility import as_model, check_bound, check_vocabularies, match_tokenizers
from mcsd.models.prefix_cache import MAX_TEXTS
from mcsd.models.vocabulary_map import TranslatedModel


def cache_slots(max_length: int, max_nodes: int) -> int:
    """Cache slots per sequence: the text, and the in-flight tokens of a tree or of a draft that catches up."""
    return max_length + 2 + max(MAX_LAG, max_nodes) + MAX_CHAIN


def make_drafter(
    draft: Any,
    target: LanguageModel,
    tokenizer: Any | None,
    max_batch: int,
    slots: int,
    draft_tokenizer: Any | None = None,
    max_texts: int = MAX_TEXTS,
    corpus: Iterable[Sequence[int]] | None = None,
) -> Drafter:
    """Make the drafter of a target.

    Args:
        draft: a `Drafter`, a `BoundHead`, a `TranslatedModel`, a ``PreTrainedModel`` or `LanguageModel`, or "ngram"
            (also None).
        target: the target.
        tokenizer: of the target, which tells padding of the vocabulary from tokens.
        max_batch, slots: size of the draft's cache; see `mcsd.models.KVCache`.
        draft_tokenizer: of a draft model, if known; it may be another one than the target's.
        max_texts: of the draft's prefix cache.
        corpus: token ids of texts in which tokens are looked up besides the text itself; None: a draft model or head
            drafts alone.

    Raises:
        VocabularyMismatch, UnsupportedModel: the draft does not fit the target.
    """
    if isinstance(draft, str | None):
        return NgramDrafter(target.device, corpus or ())
    drafter = _drafter(draft, target, (tokenizer, draft_tokenizer), max_batch, slots, max_texts)
    if corpus is None:
        return drafter
    if not isinstance(drafter, LevelDrafter):
        raise UnsupportedModel(f"{drafter.name} takes no n-grams beside it", "give a model or head, or one drafter")
    return MixedDrafter(drafter, always=True, corpus=corpus)


def _drafter(
    draft: Any, target: LanguageModel, tokenizers: tuple[Any, Any], max_batch: int, slots: int, max_texts: int
) -> Drafter:
    if isinstance(draft, Drafter):
        return draft
    if isinstance(draft, BoundHead):
        check_bound(target, draft)
        return HeadDrafter(draft, max_batch, slots, max_texts)
    if isinstance(draft, TranslatedModel):
        as_model(draft.model)
    else:
        draft = match_tokenizers(target, tokenizers[0], as_model(draft), tokenizers[1])
    if isinstance(draft, TranslatedModel):
        return TranslatedDrafter(draft, max_batch, slots, max_texts)
    check_vocabularies(target, draft, tokenizers[0])
    return ModelDrafter(draft, target.vocab_size, max_batch, slots, max_texts)
