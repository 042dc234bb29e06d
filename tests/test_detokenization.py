"""Text while it comes: equal to decoding all at once, cut by characters and stop strings, never by tokens."""

import copy
import random
from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mcsd.detokenization import TextStream
from mcsd.params import SamplingParams

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
def metaspace() -> Any:
    """As Unigram models have it: a decoder that drops the space of the first token."""
    pieces = [("<unk>", 0.0), *((piece, -1.0) for piece in ("▁", "▁a", "a", "▁b", "b", "<s>", "▁▁"))]
    tokenizer = Tokenizer(models.Unigram(pieces, 0))
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>")


@cache
def word_pieces(cleanup: bool = False) -> Any:
    """As BERT has it: a space before every token that does not continue a word."""
    words = [
        "[UNK]",
        "<s>",
        ".",
        "?",
        "!",
        ",",
        "'",
        "n",
        "'t",
        "n't",
        "'m",
        "s",
        "ve",
        "'re",
        "a",
        "##n",
        "##'s",
        "##t",
    ]
    tokenizer = Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="<s>", clean_up_tokenization_spaces=cleanup
    )


@cache
def clean_characters() -> Any:
    """Every character a token, and spaces that are cleaned up: patterns come apart and meet in all ways."""
    table = {c: i for i, c in enumerate(["<unk>", "<s>", *" .?!,'ntmsver"])}
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", clean_up_tokenization_spaces=True
    )


CONTINUING = [byte_level, byte_fallback, metaspace, word_pieces]


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


def streamed(
    ids: list[int], stop: tuple[str, ...] = (), tokenizer: Any = None, prompt: Sequence[int] = (), **fields: Any
) -> tuple[list[str], TextStream]:
    """The pieces up to where a stop string is found, or to the end."""
    stream = TextStream(tokenizer or byte_level(), SamplingParams(stop=stop, **fields), prompt)
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


@pytest.mark.parametrize("kind", CONTINUING)
@given(st.text("ab c\n", max_size=200), st.text("ab c\n", max_size=20), st.data())
@settings(deadline=None, max_examples=60)
def test_a_text_continues_its_prompt(kind: Any, before: str, text: str, data: st.DataObject) -> None:
    """Prompt and text together are what decode gives, after any prompt of whole characters and with special tokens."""
    tokenizer = kind()
    prompt = tokenizer.encode(before, add_special_tokens=False)
    special = tokenizer.all_special_ids[-1]
    prompt += [special] * data.draw(st.integers(0, 3))
    ids = tokenizer.encode(text, add_special_tokens=False)
    ids.insert(data.draw(st.integers(0, len(ids))), special)
    whole = tokenizer.decode(prompt + ids, skip_special_tokens=True)
    continued = "".join(streamed(ids, tokenizer=tokenizer, prompt=prompt)[0])
    assert tokenizer.decode(prompt, skip_special_tokens=True) + continued == whole


@pytest.mark.parametrize(
    ("kind", "prompt", "token", "text"),
    [
        (byte_fallback, ["▁a"], "▁b", " b"),
        (byte_fallback, ["▁a", "▁"], "▁b", " b"),
        (byte_fallback, ["▁"], "▁b", " b"),  # The decoder drops the prompt's.
        (byte_fallback, [], "▁b", "b"),
        (metaspace, ["▁a", *["<s>"] * 20], "▁b", " b"),
        (metaspace, ["<s>"], "▁b", "b"),
        (word_pieces, ["a"], "n", " n"),
        (word_pieces, ["a"], "##n", "n"),
    ],
)
def test_the_space_after_a_prompt(kind: Any, prompt: list[str], token: str, text: str) -> None:
    tokenizer = kind()
    ids = tokenizer.convert_tokens_to_ids([*prompt, token])
    assert streamed(ids[-1:], tokenizer=tokenizer, prompt=ids[:-1])[0] == [text, ""]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_character_that_begins_in_the_prompt_belongs_to_the_text(count: int) -> None:
    ids = [tokens_by_bytes()[bytes([byte])] for byte in "é😀".encode()]
    assert "".join(streamed(ids[2 + count :], prompt=ids[: 2 + count])[0]) == "😀"
    tokens = ["a", *(f"<0x{byte:02X}>" for byte in "😀".encode()), "b"]
    ids = byte_fallback().convert_tokens_to_ids(tokens)
    assert "".join(streamed(ids[1 + count :], (), byte_fallback(), ids[: 1 + count])[0]) == "😀b"


@given(st.lists(st.integers(0, 19), max_size=14), st.sampled_from([(), ("a'm", "n."), ("'", "!")]))
@settings(deadline=None, max_examples=300)
def test_pieces_join_to_the_cleaned_text(ids: list[int], stop: tuple[str, ...]) -> None:
    """Also with stop strings that only the cleaned text has."""
    for tokenizer in (word_pieces(cleanup=True), clean_characters()):
        tokens = [i % len(tokenizer) for i in ids]
        whole = tokenizer.decode(tokens, skip_special_tokens=True)
        expected = before_stop(whole, stop)
        pieces, stream = streamed(tokens, stop, tokenizer, prompt=tokens)
        assert "".join(pieces) == (whole if expected is None else expected)
        assert stream.stopped == (expected is not None)


def test_every_short_text_is_cleaned_as_a_whole() -> None:
    tokenizer = clean_characters()
    for text in product(tokenizer.convert_tokens_to_ids(list(" .'nts")), repeat=4):
        assert "".join(streamed(list(text), tokenizer=tokenizer)[0]) == tokenizer.decode(text)


def test_a_bpe_tokenizer_that_ignores_the_cleanup() -> None:
    tokenizer = copy.copy(byte_level())
    tokenizer.clean_up_tokenization_spaces = True
    ids = cut_at_random("a . b", 0)
    pieces, _ = streamed(ids, tokenizer=tokenizer)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert "" not in pieces[:-1]  # Nothing is held back.


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
    stream = TextStream(byte_level(), SamplingParams(stop=stop))
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
    stream = TextStream(byte_level(), SamplingParams(stop="b"))
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


@pytest.mark.parametrize(
    ("stop", "text", "tokens"),
    [
        ((SPECIAL,), "ab", 3),
        ((f"b{SPECIAL}c",), "a", 4),
        ((f"{SPECIAL}cd", f"b{SPECIAL}"), "a", 3),  # Complete first.
        ((f"{SPECIAL}cd", "bc"), "a", 4),
        ((f"{SPECIAL}c",), "ab", 4),
        ((f"{SPECIAL}d",), "abca", None),
        (("|>",), "abca", None),  # A part of a special token is no text.
    ],
)
def test_a_stop_string_may_hold_special_tokens(stop: tuple[str, ...], text: str, tokens: int | None) -> None:
    """The text leaves special tokens out, and ends where the stop string begins in the text with them."""
    by_bytes = tokens_by_bytes()
    ids = [by_bytes[b"a"], by_bytes[b"b"], byte_level().pad_token_id, by_bytes[b"c"], by_bytes[b"a"]]
    pieces, stream = streamed(ids, stop)
    assert ("".join(pieces), stream.stopped) == (text, tokens is not None)
    assert tokens is None or len(pieces) == tokens + 1


def test_a_special_token_spelled_in_ordinary_ones() -> None:
    pieces, stream = streamed(cut_at_random(f"ab{SPECIAL}c", 3), (f"b{SPECIAL}",))
    assert ("".join(pieces), stream.stopped) == ("a", True)


def test_special_tokens_in_the_text() -> None:
    """`skip_special_tokens=False`: as decode gives it; a stop string ends it as any other."""
    special, tokens = byte_level().pad_token_id, tokens_by_bytes()
    ids = [special, tokens[b"a"], special, tokens[b"b"]]
    assert "".join(streamed(ids, skip_special_tokens=False)[0]) == byte_level().decode(ids)
    for stop, text in ((f"a{SPECIAL}", SPECIAL), ("|>a", SPECIAL[:-2]), ("ab", f"{SPECIAL}a{SPECIAL}b")):
        assert "".join(streamed(ids, (stop,), skip_special_tokens=False)[0]) == text


@pytest.mark.parametrize(("stop", "text"), [("b", "ab"), ("bc", "abc"), (f"b{SPECIAL}", f"ab{SPECIAL}"), ("x", "abcd")])
def test_a_stop_string_that_is_part_of_the_text(stop: str, text: str) -> None:
    special, tokens = byte_level().pad_token_id, tokens_by_bytes()
    ids = [tokens[b"a"], tokens[b"b"], special, tokens[b"c"], tokens[b"d"]]
    assert "".join(streamed(ids, (stop,), include_stop=True)[0]) == text


@pytest.mark.parametrize("stop", [(), ("a",)])
def test_no_tokenizer_no_text(stop: tuple[str, ...]) -> None:
    stream = TextStream(None, SamplingParams(stop=stop))
    assert [stream.push(1), stream.push(2), stream.finish()] == ["", "", ""]
    assert not stream.stopped
