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
