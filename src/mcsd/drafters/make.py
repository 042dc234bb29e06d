"""The drafter for whatever a user gives as draft."""

from typing import Any

from mcsd.drafters.base import Drafter
from mcsd.drafters.head import HeadDrafter
from mcsd.drafters.model import ModelDrafter
from mcsd.drafters.ngram import NgramDrafter
from mcsd.models import BoundHead, LanguageModel
from mcsd.models.compatibility import as_model, check_bound, check_vocabularies


def make_drafter(draft: Any, target: LanguageModel, tokenizer: Any | None, max_batch: int, slots: int) -> Drafter:
    """Make the drafter of a target.

    Args:
        draft: a `Drafter`, a `BoundHead`, a ``PreTrainedModel`` or `LanguageModel`, or "ngram" (also None).
        target: the target.
        tokenizer: of the target, which tells padding of the vocabulary from tokens.
        max_batch, slots: size of the draft's cache; see `mcsd.models.KVCache`.

    Raises:
        VocabularyMismatch, UnsupportedModel: the draft does not fit the target.
    """
    if isinstance(draft, Drafter):
        return draft
    if draft is None or draft == "ngram":
        return NgramDrafter(target.device)
    if isinstance(draft, BoundHead):
        check_bound(target, draft)
        return HeadDrafter(draft, max_batch, slots)
    model = as_model(draft)
    check_vocabularies(target, model, tokenizer)
    return ModelDrafter(model, target.vocab_size, max_batch, slots)
