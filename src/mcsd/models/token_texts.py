"""The texts of a tokenizer's tokens, and whether two tokenizers have the same tokens."""

import re
from typing import Any

_SAME = 0.995
"""Share of equal tokens from which on two vocabularies are the same: files name their padding differently."""

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")

TokenText = bytes | str
"""The text of a token; of a special token its name, as a string, which equals no text."""


def is_readable(tokenizer: Any | None) -> bool:
    """Whether a tokenizer tells its tokens, as those of transformers do."""
    return hasattr(tokenizer, "get_vocab") and hasattr(tokenizer, "convert_tokens_to_string")


def same_tokens(tokenizer: Any, other: Any) -> bool:
    """Whether two tokenizers give the same ids to the same tokens, added tokens and padding aside."""
    ordinary, others = _ordinary_ids(tokenizer), _ordinary_ids(other)
    return len(ordinary.items() & others.items()) >= _SAME * max(len(ordinary), len(others))


def ordinary_size(tokenizer: Any) -> int:
    """The size of the least vocabulary that holds all tokens, but added ones if they are known."""
    return 1 + max(_ordinary_ids(tokenizer).values(), default=-1) if is_readable(tokenizer) else len(tokenizer)


def token_texts(tokenizer: Any, size: int) -> dict[int, TokenText]:
    """The text of every token below ``size``; of tokens with equal texts the usual one comes first.

    Byte-level BPE writes bytes as characters, "Ġ" for a space. SentencePiece writes "▁" for a space, and "<0x0A>" for
    a byte of a character without a token. The tokens of other tokenizers are their texts.
    """
    added = _added_tokens(tokenizer)
    special = {*tokenizer.all_special_ids, *(token for token, each in added.items() if each.special)}
    readers = {"aĠb": _from_byte_characters, "a▁b": _from_sentencepiece}
    written = (name for name in readers if tokenizer.convert_tokens_to_string([name]) == "a b")
    read = readers.get(next(written, ""), _literal)
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (bool(_BYTE.fullmatch(item[0])), item[1]))
    return {
        token: name if token in special else _literal(name) if token in added else read(name)
        for name, token in vocabulary
        if token < size
    }


def _ordinary_ids(tokenizer: Any) -> dict[str, int]:
    """The id of every token that was not added to the vocabulary: added ones are special, with few exceptions."""
    added = _added_tokens(tokenizer)
    return {name: token for name, token in tokenizer.get_vocab().items() if token not in added}


def _added_tokens(tokenizer: Any) -> dict[int, Any]:
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    return added


def _literal(name: str) -> bytes:
    return name.encode(errors="replace")


def _from_sentencepiece(name: str) -> bytes:
    byte = _BYTE.fullmatch(name)
    return bytes([int(byte[1], 16)]) if byte else _literal(name.replace("▁", " "))


def _from_byte_characters(name: str) -> bytes:
    try:
        return name.translate(_BYTE_CHARACTERS).encode("latin-1")
    except UnicodeEncodeError:
        return _literal(name)


def _byte_characters() -> dict[int, str]:
    """For each character that byte-level BPE writes, its byte as a character of Latin-1 (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(0x100) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {0x100 + n: chr(byte) for n, byte in enumerate(others)}


_BYTE_CHARACTERS = _byte_characters()
