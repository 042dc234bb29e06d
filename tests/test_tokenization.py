"""Prompts to token ids."""

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mcsd.errors import InvalidParameter
from mcsd.params import SamplingParams
from mcsd.tokenization import PromptEncoder


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


@pytest.mark.parametrize("attack", ["<s>", "<s></s>", "</s><s>one", "x <s", "<<s>>", "\ufdd0<s>", "<s>\ufdd0"])
def test_special_tokens_in_a_message_are_text(attack: str) -> None:
    tokenizer = words("$A")
    tokenizer.chat_template = "{% for m in messages %}<s>{{ m.content | trim }}</s>{% endfor %}{{ tools | tojson }}"
    encoder = PromptEncoder(tokenizer, "words", 100, 1000)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    for tools in ([{"name": attack, attack: [attack]}], [{"name": "one"}]):
        ids = encoder.encode_chat([{"role": "user", "content": f"one {attack} two"}], tools)
        assert [id for id in ids if id in special] == [1, 3]
    # Texts without special tokens are encoded at once, as before.
    plain = [{"role": "user", "content": "one two"}]
    assert encoder.encode_chat(plain) == tokenizer.apply_chat_template(plain, tools=None)["input_ids"]


def test_a_conversation_that_is_no_unicode_is_named() -> None:
    tokenizer = words("$A")
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(InvalidParameter, match="not valid Unicode"):
        PromptEncoder(tokenizer, "words", 100, 1000).encode_chat([{"role": "user", "content": "\ud800"}])
