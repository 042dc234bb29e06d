"""Text while it comes: equal to decoding all at once, cut by characters and stop strings, never by tokens."""

import random
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mcsd.errors import InvalidParameter
from mcsd.params import SamplingParams
from mcsd.tokenization import PromptEncoder, TextStream

SENTENCES = [
    "The cat sat on the mat, and the abc was abcd; the bcd came after the abab.",
    "Größe, naïve café: 东京 und Ωμέγα 😀😃 family 👨‍👩‍👧 flags 🇯🇵🇩🇪.",
    "<|end|> END\n\nEND stop stopping STOP \ufffd 😀😀 abcabc aab",
    *["bcd", "bc", "cd", "abcd", "abc", "bab", "aab", "東京", "é😀"],
]
SPECIAL = "<|special|>"


@cache
def byte_level() -> Any:
    """Byte-level BPE as GPT-2, Qwen and Llama 3 have it; every byte is a token, so a character may be cut anywhere."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=[SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=SPECIAL)


@cache
def byte_fallback() -> Any:
    """As SentencePiece models (Llama 2, Gemma) have it: a space is part of a word, rare characters are byte tokens."""
    letters = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcde", "▁a", "▁b", "ab"]
    vocabulary = {token: i for i, token in enumerate(letters)}
    merges = [("▁", "a"), ("▁", "b"), ("a", "b")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


@cache
def tokens_by_bytes() -> dict[bytes, int]:
    to_byte = {character: byte for byte, character in bytes_to_unicode().items()}
    vocabulary = byte_level().get_vocab().items()
    return {bytes(to_byte[c] for c in token): i for token, i in vocabulary if token != SPECIAL}


def cut_at_random(text: str, seed: int) -> list[int]:
    """Token ids that spell a text, not only those the tokenizer would choose."""
    rest, ids, chance = text.encode(), [], random.Random(seed)
    while rest:
        length = chance.choice([n for n in range(1, len(rest) + 1) if rest[:n] in tokens_by_bytes()])
        ids.append(tokens_by_bytes()[rest[:length]])
        rest = rest[length:]
    return ids


def streamed(ids: list[int], stop: tuple[str, ...] = (), tokenizer: Any = None) -> tuple[list[str], TextStream]:
    """The pieces up to where a stop string is found, or to the end."""
    stream = TextStream(tokenizer or byte_level(), stop)
    pieces = []
    for token in ids:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream


def before_stop(text: str, stop: tuple[str, ...]) -> str | None:
    """Character by character: what stands before the first stop string to be complete, None if none ever is."""
    for end in range(len(text) + 1):
        found = [text[:end].find(s) for s in stop if s in text[:end]]
        if found:
            return text[: min(found)]
    return None


@given(st.lists(st.integers(0, 419), max_size=40))
@settings(deadline=None, max_examples=300)
def test_pieces_join_to_the_decoded_text(ids: list[int]) -> None:
    """Any tokens at all: invalid and unfinished bytes, special tokens, characters in four pieces."""
    ids = [i % len(byte_level()) for i in ids]
    assert "".join(streamed(ids)[0]) == byte_level().decode(ids, skip_special_tokens=True)


@given(st.binary(max_size=24))
@settings(deadline=None, max_examples=300)
def test_pieces_join_whatever_the_bytes(data: bytes) -> None:
    pieces, _ = streamed([tokens_by_bytes()[bytes([byte])] for byte in data])
    assert "".join(pieces) == data.decode(errors="replace")


@given(st.text("ab cz€😀", max_size=20))
@settings(deadline=None, max_examples=100)
def test_pieces_join_for_a_sentencepiece_tokenizer(text: str) -> None:
    ids = byte_fallback().encode(text, add_special_tokens=False)
    assert "".join(streamed(ids, tokenizer=byte_fallback())[0]) == byte_fallback().decode(ids)


@given(st.lists(st.sampled_from([0, *range(257, 266)]), max_size=12))
@settings(deadline=None, max_examples=100)
def test_pieces_join_around_special_tokens(ids: list[int]) -> None:
    """A SentencePiece decoder drops a space at the beginning: one behind a special token must not be taken for it."""
    expected = byte_fallback().decode(ids, skip_special_tokens=True)
    assert "".join(streamed(ids, tokenizer=byte_fallback())[0]) == expected


def test_a_character_comes_when_its_last_byte_does() -> None:
    ids = [tokens_by_bytes()[bytes([byte])] for byte in "é😀b".encode()]
    assert streamed(ids)[0] == ["", "é", "", "", "", "😀", "b", ""]


def test_unfinished_bytes_come_at_the_end() -> None:
    ids = [tokens_by_bytes()[bytes([byte])] for byte in b"a\xf0\x9f\x98"]
    assert streamed(ids)[0] == ["a", "", "", "", "\ufffd"]


STOPS = [
    ("ab", "abc"),
    ("abc", "ab"),
    ("bcd", "c"),
    ("abcd", "bc", "c"),
    ("abab",),
    ("aab",),
    ("aa", "ab"),
    ("😀",),
    ("😀😀", "é"),
    ("東京", "京"),
    ("a",),
    ("\n\n", "END"),
]


@given(
    st.text("abcd", max_size=12) | st.text("ab😀é東京\nEND ", max_size=9), st.sampled_from(STOPS), st.integers(0, 99)
)
@settings(deadline=None, max_examples=400)
def test_stop_strings_wherever_tokens_cut_them(text: str, stop: tuple[str, ...], seed: int) -> None:
    """However the text is cut into tokens, it ends before the stop string that is complete first."""
    pieces, stream = streamed(cut_at_random(text, seed), stop)
    expected = before_stop(text, stop)
    assert "".join(pieces) == (text if expected is None else expected)
    assert stream.stopped == (expected is not None)


@given(st.text("abcdé😀", max_size=12), st.sampled_from(STOPS), st.integers(0, 99))
@settings(deadline=None, max_examples=200)
def test_what_may_begin_a_stop_is_held_back_and_no_more(text: str, stop: tuple[str, ...], seed: int) -> None:
    ids = cut_at_random(text, seed)
    stream = TextStream(byte_level(), stop)
    released = ""
    for count, token in enumerate(ids, 1):
        released += stream.push(token)
        if stream.stopped:
            return
        whole = byte_level().decode(ids[:count])
        certain = whole.rstrip("\ufffd")
        certain = certain[: len(certain) - max(n for s in stop for n in range(len(s)) if certain.endswith(s[:n]))]
        if certain and whole.endswith("\ufffd"):  # a token that ends inside a character may wait as a whole
            assert certain.startswith(released)
        else:
            assert released == certain


def pushed(stop: str | tuple[str, ...], *parts: str) -> tuple[list[str], bool]:
    """The pieces for parts of text, each a token of its own, and whether it stopped."""
    ids = [tokens_by_bytes()[part.encode()] for part in parts]
    pieces, stream = streamed(ids, (stop,) if isinstance(stop, str) else stop)
    return pieces, stream.stopped


def test_stop_strings_by_hand() -> None:
    """Tokens of the trained vocabulary; the last piece is what `finish` gives."""
    assert pushed("ab", "a", "b") == (["", "", ""], True)
    assert pushed("b", "abc") == (["a", ""], True)  # inside one token
    assert pushed(("ab", "abc"), "abc") == (["", ""], True)
    assert pushed("abd", "a", "b", "c") == (["", "", "abc", ""], False)  # released when it does not come
    assert pushed("abd", "a", "b") == (["", "", "ab"], False)  # released by finish
    assert pushed("aab", "a", "a", "a", "b") == (["", "", "a", "", ""], True)
    assert pushed("abac", "a", "b", "a", "b") == (["", "", "", "ab", "ab"], False)
    assert pushed((), "a", "b") == (["a", "b", ""], False)


@pytest.mark.parametrize(("stop", "text"), [(("bcd", "c"), "ab"), (("abcd", "bc", "c"), "a"), (("cd", "abcd"), "")])
def test_the_cut_into_tokens_does_not_decide(stop: tuple[str, ...], text: str) -> None:
    """Of two stop strings that overlap, the one that is complete first counts, even if one token completes both."""
    for cut in ("a b c d", "a b cd", "a bc d", "a bcd", "ab c d", "ab cd", "abc d", "abcd"):
        pieces, stopped = pushed(stop, *cut.split())
        assert ("".join(pieces), stopped) == (text, True), cut


def test_nothing_after_a_stop() -> None:
    stream = TextStream(byte_level(), ("b",))
    tokens = tokens_by_bytes()
    assert [stream.push(tokens[b"a"]), stream.push(tokens[b"b"])] == ["a", ""]
    assert stream.stopped
    assert [stream.push(tokens[b"c"]), stream.finish(), stream.finish()] == ["", "", ""]
    assert stream.stopped


def test_a_stop_string_of_unfinished_bytes_is_found_at_the_end() -> None:
    pieces, stream = streamed([tokens_by_bytes()[bytes([byte])] for byte in b"ab\xf0\x9f"], ("\ufffd",))
    assert ("".join(pieces), stream.stopped) == ("ab", True)


def test_special_tokens_have_no_text() -> None:
    special, tokens = byte_level().pad_token_id, tokens_by_bytes()
    ids = [special, tokens[b"a"], special, special, tokens[b"b"], tokens[b"c"], special]
    assert streamed(ids)[0] == ["", "a", "", "", "b", "c", "", ""]
    assert "".join(streamed(ids, ("ab",))[0]) == ""


@pytest.mark.parametrize("stop", [(), ("a",)])
def test_no_tokenizer_no_text(stop: tuple[str, ...]) -> None:
    stream = TextStream(None, stop)
    assert [stream.push(1), stream.push(2), stream.finish()] == ["", "", ""]
    assert not stream.stopped


def words(added: str) -> Any:
    """Token i is the word of the list; a text gets the tokens of ``added`` around it, ``$A``."""
    table = {word: i for i, word in enumerate(["<unk>", "<s>", "[gMASK]", "</s>", "one", "two"])}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [(word, table[word]) for word in added.split() if word != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=added, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", additional_special_tokens=["[gMASK]"]
    )


@pytest.mark.parametrize(
    ("added", "text", "ids"),
    [
        ("<s> $A", "one", [1, 4]),
        ("<s> $A", "<s> one", [1, 4]),
        ("<s> $A", "<s>one", [1, 4]),
        ("<s> $A", "<s><s> one", [1, 1, 4]),  # As the text has it.
        ("<s> $A", "one <s>", [1, 4, 1]),
        ("<s> $A", "<s>", [1]),
        ("<s> $A </s>", "<s> one", [1, 4, 3]),
        ("[gMASK] <s> $A", "[gMASK]<s> one", [2, 1, 4]),
        ("[gMASK] <s> $A", "<s> one", [2, 1, 1, 4]),  # Not what the tokenizer adds.
        ("$A", "<s><s> one", [1, 1, 4]),
        ("$A", "one one", [4, 4]),
    ],
)
def test_a_text_has_the_tokens_that_a_tokenizer_adds_once(added: str, text: str, ids: list[int]) -> None:
    encoder = PromptEncoder(words(added), "words", 6, 100)
    assert encoder.encode(text, SamplingParams()) == ids


def test_a_text_that_is_no_unicode_is_named() -> None:
    with pytest.raises(InvalidParameter, match="not valid Unicode"):
        PromptEncoder(words("$A"), "words", 6, 100).encode("one \udce9", SamplingParams())
