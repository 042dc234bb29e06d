"""What may serve as a model, and which models may serve together."""

from typing import Any

from mcsd.errors import UnsupportedModel, VocabularyMismatch
from mcsd.models.base import LanguageModel
from mcsd.models.head import BoundHead
from mcsd.models.transformers import TransformersModel

_HINT = "choose a draft with the target's tokenizer, or draft='ngram'"


def as_model(model: Any) -> LanguageModel:
    """A language model as it is, or transformers' behind the protocol.

    Raises:
        UnsupportedModel: neither.
    """
    if isinstance(model, LanguageModel):
        return model
    if hasattr(model, "config") and hasattr(model, "generate"):
        return TransformersModel(model)
    raise UnsupportedModel(
        f"{type(model).__name__} is not a language model", "give a transformers model or an mcsd.models.LanguageModel"
    )


def check_bound(target: LanguageModel, head: BoundHead) -> None:
    """A head drafts for the model that it is bound to.

    Raises:
        UnsupportedModel: that is another one.
    """
    if not isinstance(target, TransformersModel) or target.network is not head.target.network:
        raise UnsupportedModel(f"draft {head.name} is bound to another model than {target.name}", "bind it to this one")


def check_vocabularies(target: LanguageModel, draft: LanguageModel, tokenizer: Any | None) -> None:
    """Sizes may differ by padding only: every token of the tokenizer must be in both.

    Raises:
        VocabularyMismatch: they differ by more, or nothing tells padding from tokens.
    """
    if target.vocab_size == draft.vocab_size:
        return
    if tokenizer is None or min(target.vocab_size, draft.vocab_size) < len(tokenizer):
        raise VocabularyMismatch(
            f"draft {draft.name} has {draft.vocab_size} tokens, target {target.name} {target.vocab_size}", _HINT
        )


def check_tokenizers(target: LanguageModel, ours: Any | None, draft: LanguageModel, theirs: Any | None) -> None:
    """The same text must be the same tokens to both.

    Raises:
        VocabularyMismatch: some token has another id.
    """
    if ours is not None and theirs is not None and ours.get_vocab() != theirs.get_vocab():
        raise VocabularyMismatch(f"draft {draft.name} and target {target.name} have different tokenizers", _HINT)
