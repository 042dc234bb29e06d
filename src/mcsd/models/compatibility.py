"""What can be a model, and which target and draft fit together."""

import warnings
from os import PathLike
from typing import Any

import torch

from mcsd.errors import InvalidOption, McsdWarning, UnsupportedModel, VocabularyMismatch
from mcsd.models.bound_head import BoundHead
from mcsd.models.protocol import DecoderModel, LanguageModel
from mcsd.models.self_check import check_tree_attention
from mcsd.models.token_texts import is_readable, ordinary_size, same_tokens
from mcsd.models.transformers import TransformersModel, check_supported
from mcsd.models.vocabulary_map import TranslatedModel, VocabularyMap

_HINT = "choose a draft with the target's tokenizer, or draft='ngram'"
_SIZES_HINT = "give the tokenizers of both (tokenizer=, draft_tokenizer=), or draft='ngram'"


def is_network(model: Any) -> bool:
    """Whether an object is a ``PreTrainedModel`` that can generate."""
    return not isinstance(model, LanguageModel) and hasattr(model, "config") and hasattr(model, "generate")


def as_model(model: Any) -> LanguageModel:
    """A language model as it is, or a ``PreTrainedModel`` wrapped. Tree attention is checked on what transformers runs.

    Raises:
        UnsupportedModel: the object is neither, or the engine cannot run it.
    """
    if is_network(model):
        model = TransformersModel(model)
    if isinstance(model, TransformersModel):
        check_tree_attention(model)
    if isinstance(model, LanguageModel):
        return model
    if isinstance(model, str | PathLike):
        raise UnsupportedModel(
            f"{str(model)!r:.80} is a name, not a model", "load models by name with mcsd.Engine.load"
        )
    raise UnsupportedModel(
        f"{type(model).__name__} is not a language model", "give a transformers model or an mcsd.models.LanguageModel"
    )


def check_length(max_length: int | None, target: LanguageModel) -> None:
    """Check a length that a user asks for. Beyond a target's own limit its logits depend on more than the text.

    Raises:
        InvalidOption: ``max_length`` is more than that. Without one, a warning says that texts are limited.
    """
    limit, context = target.max_length, getattr(target, "context", None)
    if limit is None or context is None or limit >= context:
        return
    reason = f"the rotary embeddings of {target.name} (LongRoPE) change for the whole of a text beyond {limit} tokens"
    if max_length is None:
        warnings.warn(f"texts are limited to {limit} tokens: {reason}", McsdWarning, stacklevel=3)
    elif max_length > limit:
        raise InvalidOption(f"max_length={max_length}: {reason}", f"give max_length={limit} or less")


def check_devices(target: LanguageModel, draft: Any) -> None:
    """Check that a draft model or head is on the target's device. Other drafts have none. Its dtype may differ.

    Raises:
        UnsupportedModel: it is on another device, or on several.
    """
    if is_network(draft):
        check_supported(draft)
    device = getattr(draft, "device", None)
    if isinstance(device, torch.device) and _resolved(device) != _resolved(target.device):
        name = getattr(draft, "name", type(draft).__name__)
        raise UnsupportedModel(
            f"draft {name} is on {device}, target {target.name} on {target.device}", "put both on one device"
        )


def _resolved(device: torch.device) -> torch.device:
    """A device with its index: ``cuda`` is the current one."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def check_bound(target: LanguageModel, head: BoundHead) -> None:
    """Check that a draft head is bound to the target.

    Raises:
        UnsupportedModel: it is bound to another model.
    """
    if not isinstance(target, DecoderModel) or target.embed_tokens is not head.target.embed_tokens:
        raise UnsupportedModel(f"draft {head.name} is bound to another model than {target.name}", "bind it to this one")


def check_vocabularies(target: LanguageModel, draft: LanguageModel, tokenizer: Any | None) -> None:
    """Check that the sizes of two vocabularies differ by padding and added tokens only.

    Raises:
        VocabularyMismatch: they differ in tokens, or there is no tokenizer to tell padding from tokens.
    """
    if not _sizes_fit(target, draft, tokenizer):
        raise VocabularyMismatch(
            f"draft {draft.name} has {draft.vocab_size} tokens, target {target.name} {target.vocab_size}", _SIZES_HINT
        )


def check_tokenizers(
    target: LanguageModel, target_tokenizer: Any | None, draft: LanguageModel, draft_tokenizer: Any | None
) -> None:
    """Check that both tokenizers give the same ids, as far as they are known.

    Raises:
        VocabularyMismatch: tokens have different ids.
    """
    if _are_known(target_tokenizer, draft_tokenizer) and not same_tokens(target_tokenizer, draft_tokenizer):
        raise VocabularyMismatch(f"draft {draft.name} and target {target.name} have different tokenizers", _HINT)


def match_tokenizers(
    target: LanguageModel, target_tokenizer: Any | None, draft: LanguageModel, draft_tokenizer: Any | None
) -> LanguageModel | TranslatedModel:
    """The draft as it is if both tokenizers give the same ids, as far as they are known; else translated.

    Raises:
        VocabularyMismatch: target and draft share no token.
    """
    if not _are_known(target_tokenizer, draft_tokenizer):
        return draft
    if same_tokens(target_tokenizer, draft_tokenizer) and _sizes_fit(target, draft, target_tokenizer):
        return draft
    shared = VocabularyMap(target_tokenizer, draft_tokenizer, target.vocab_size, draft.vocab_size)
    translated = TranslatedModel(draft, shared)
    count = len(translated.vocabulary)
    if not count:
        raise VocabularyMismatch(f"the tokenizers of draft {draft.name} and target {target.name} share no token", _HINT)
    warnings.warn(
        f"draft {draft.name} has another tokenizer than target {target.name}: it proposes the {count} tokens that both"
        f" have, of {draft.vocab_size}",
        McsdWarning,
        stacklevel=3,
    )
    return translated


def _sizes_fit(target: LanguageModel, draft: LanguageModel, tokenizer: Any | None) -> bool:
    """Whether both vocabularies hold every token of a tokenizer but added ones, or are equally large."""
    least = min(target.vocab_size, draft.vocab_size)
    return target.vocab_size == draft.vocab_size or (tokenizer is not None and least >= ordinary_size(tokenizer))


def _are_known(*tokenizers: Any | None) -> bool:
    return all(is_readable(each) for each in tokenizers)
