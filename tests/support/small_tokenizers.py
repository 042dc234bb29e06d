"""Small tokenizers of each kind, and draft models behind them."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mcsd.errors import McsdWarning
from mcsd.models import LanguageModel
from mcsd.models.compatibility import match_tokenizers
from mcsd.models.vocabulary_map import TranslatedModel


def wrapped(made: Tokenizer, **options: Any) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=made, **options)


def pieces(vocabulary: Mapping[str, int], merges: Sequence[tuple[str, str]] = (), **options: Any) -> Any:
    """A BPE tokenizer without pre-tokenization, whose tokens are their texts."""
    made = Tokenizer(models.BPE(vocab=dict(vocabulary), merges=list(merges)))
    made.decoder = decoders.Fuse()
    return wrapped(made, **options)


def byte_level(tokens: Sequence[str], merges: Sequence[tuple[str, str]] = (), **options: Any) -> Any:
    """A byte-level BPE tokenizer: the 256 bytes and more tokens, which merges form."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, *tokens])}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return wrapped(made, **options)


def sentencepiece(tokens: Sequence[str], merges: Sequence[tuple[str, str]] = (), **options: Any) -> Any:
    """A tokenizer as SentencePiece makes it: "▁" for a space, and tokens for single bytes."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *tokens]
    vocabulary = {token: index for index, token in enumerate(names)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges), unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return wrapped(made, unk_token="<unk>", **options)


def characters(order: Sequence[int], own: Sequence[int] = ()) -> Any:
    """A tokenizer with a character a token: token i is character ``order[i]``, or a text that no other one has.

    The first of its ``own`` tokens stands for all characters that it does not know.
    """
    names = [f"own {index}" if index in own else chr(0x4E00 + order[index]) for index in range(len(order))]
    unknown = {"unk_token": names[own[0]]} if own else {}
    made = Tokenizer(models.WordLevel({name: index for index, name in enumerate(names)}, **unknown))
    made.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    made.decoder = decoders.Fuse()
    return wrapped(made, **unknown)


def translated(target: LanguageModel, tokenizer: Any, draft: LanguageModel, draft_tokenizer: Any) -> TranslatedModel:
    """A draft with another tokenizer."""
    with pytest.warns(McsdWarning, match="another tokenizer"):
        found = match_tokenizers(target, tokenizer, draft, draft_tokenizer)
    assert isinstance(found, TranslatedModel)
    return found
