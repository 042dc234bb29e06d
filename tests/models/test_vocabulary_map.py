"""Texts of tokens, and translations between tokenizers of several kinds."""

from typing import Any

import pytest

from mcsd.models.token_texts import ordinary_size, same_tokens, token_texts
from mcsd.models.vocabulary_map import VocabularyMap
from support.small_tokenizers import byte_level, characters, pieces, sentencepiece

BYTE_LEVEL = byte_level(["Ġa", "ab", "Ã¼", "</s>"], [("a", "b"), ("Ġ", "a"), ("Ã", "¼")], eos_token="<e>")
SENTENCEPIECE = sentencepiece(
    ["▁", "a", "b", "▁a", "ab", "ü", "</s>"], [("▁", "a"), ("a", "b")], bos_token="<s>", eos_token="</s>"
)


def by_name(tokenizer: Any) -> dict[str, bytes | str]:
    texts = token_texts(tokenizer, len(tokenizer))
    return {name: texts[token] for name, token in tokenizer.get_vocab().items()}


def mapped(target: Any, draft: Any) -> VocabularyMap:
    return VocabularyMap(target, draft, len(target), len(draft))


def shared_names(both: VocabularyMap, target: Any, draft: Any) -> dict[str, str]:
    names = zip(both.target_ids, both.draft_ids, strict=True)
    return {target.convert_ids_to_tokens(one): draft.convert_ids_to_tokens(other) for one, other in names}


def test_texts_of_tokens() -> None:
    byte_texts, piece_texts = by_name(BYTE_LEVEL), by_name(SENTENCEPIECE)
    assert [byte_texts[name] for name in ("Ġa", "Ã¼", "Ã", "Ċ")] == [b" a", "ü".encode(), b"\xc3", b"\n"]
    assert [piece_texts[name] for name in ("▁a", "ü", "<0xC3>", "<0x0A>")] == [b" a", "ü".encode(), b"\xc3", b"\n"]
    # A special token is not the text that it is written as.
    assert byte_texts["</s>"] == b"</s>"
    assert piece_texts["</s>"] == "</s>"


@pytest.mark.parametrize("turned", [False, True])
def test_tokens_of_equal_text_are_shared(turned: bool) -> None:
    both = (BYTE_LEVEL, SENTENCEPIECE)[:: -1 if turned else 1]
    shared = shared_names(mapped(*both), *both)
    for pair in (("Ġa", "▁a"), ("Ã¼", "ü"), ("Ã", "<0xC3>"), ("Ċ", "<0x0A>"), ("Ġ", "▁"), ("a", "a"), ("ab", "ab")):
        assert shared[pair[turned]] == pair[not turned]
    assert "</s>" not in shared
    assert len({*shared.values()}) == len(shared) == 256 + 3


def test_special_tokens_of_equal_name_are_shared() -> None:
    target, draft = (byte_level(["</s>"], eos_token=name) for name in ("</s>", "<e>"))
    assert "</s>" not in shared_names(mapped(target, draft), target, draft)
    assert shared_names(mapped(target, target), target, target)["</s>"] == "</s>"


def test_a_text_is_split_anew_and_a_later_token_in_pieces() -> None:
    target = byte_level(["Ġab", "Ġa"], [("Ġ", "a"), ("Ġa", "b")])
    both = mapped(target, BYTE_LEVEL)
    (token,) = target(" ab")["input_ids"]
    assert BYTE_LEVEL.convert_ids_to_tokens(both.encode([*target("ab")["input_ids"], token])) == ["ab", "Ġ", "ab"]
    assert BYTE_LEVEL.convert_ids_to_tokens(both.translate(token)) == ["Ġa", "b"]


def test_the_bytes_of_an_unfinished_character_are_translated_when_it_goes_on() -> None:
    both = mapped(BYTE_LEVEL, SENTENCEPIECE)
    first, second = BYTE_LEVEL.convert_tokens_to_ids(["Ã", "¼"])
    a = BYTE_LEVEL.convert_tokens_to_ids("a")
    assert SENTENCEPIECE.convert_ids_to_tokens(both.encode([a, first])) == ["a"]
    assert SENTENCEPIECE.convert_ids_to_tokens(both.translate(second)) == ["<0xBC>"]


def test_a_token_that_the_draft_cannot_write_is_its_unknown_token() -> None:
    target, draft = pieces({"a": 0, "z": 1}), pieces({"x": 0, "a": 1, "?": 2}, unk_token="?")
    both = mapped(target, draft)
    assert both.translate(1) == both.encode([1]) == [2]
    assert both.translate(7) == [2]


def test_a_text_begins_as_the_drafts_tokenizer_begins_it() -> None:
    from tokenizers.processors import TemplateProcessing

    draft = sentencepiece(["a", "b"], bos_token="<s>")
    bos = draft.bos_token_id
    draft.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    target = byte_level(["<s>"], bos_token="<s>")
    both = mapped(target, draft)
    a = draft.convert_tokens_to_ids("a")
    assert both.encode(target("a")["input_ids"]) == [bos, a]
    assert both.encode([target.bos_token_id, *target("a")["input_ids"]]) == [bos, a]


def test_tokens_beyond_a_models_vocabulary_are_not_shared() -> None:
    tokenizer = pieces({"a": 0, "b": 1, "ab": 2}, [("a", "b")])
    assert VocabularyMap(tokenizer, tokenizer, 1, 3).target_ids == [0]
    assert VocabularyMap(tokenizer, tokenizer, 3, 2).encode([0]) == [0]
    assert VocabularyMap(tokenizer, tokenizer, 3, 2).translate(2) == [0, 1]


def test_added_tokens_make_no_other_vocabulary() -> None:
    more = pieces({"a": 0, "b": 1}, eos_token="<e>", additional_special_tokens=["<more>"])
    assert same_tokens(pieces({"a": 0, "b": 1}), more)
    assert not same_tokens(pieces({"a": 1, "b": 0}), more)
    assert ordinary_size(more) == 2 < len(more)


def test_a_text_that_the_drafts_tokenizer_refuses_is_translated_token_by_token() -> None:
    target, draft = pieces({"a": 0, "z": 1}), characters([0, 1])
    assert mapped(target, draft).encode([0, 1]) == [0, 0]
