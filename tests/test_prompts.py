"""What is asked where the user gives no prompts."""

from copy import copy

from mcsd.encoding import Encoder
from mcsd.models.loading import Loaded
from mcsd.prompts import BEGINNINGS, QUESTIONS, usual, varied


def test_questions_go_through_the_template_and_texts_as_they_are(smollm2: Loaded) -> None:
    tokenizer = smollm2.tokenizer
    encoder = Encoder(tokenizer, "smollm2", smollm2.model.vocab_size, 512)
    asked = [tokenizer.decode(ids) for ids in usual(encoder)]
    assert len(asked) == len(QUESTIONS)
    for text, question in zip(asked, QUESTIONS, strict=True):
        assert text.endswith(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
    mixed = [tokenizer.decode(ids) for ids in varied(encoder)]
    assert mixed[::2] == list(BEGINNINGS[:4])
    assert mixed[1::2] == asked[:4]


def test_a_model_without_a_template_goes_on_with_texts(smollm2: Loaded) -> None:
    tokenizer = copy(smollm2.tokenizer)
    tokenizer.chat_template = None
    encoder = Encoder(tokenizer, "smollm2", smollm2.model.vocab_size, 512)
    assert [tokenizer.decode(ids) for ids in usual(encoder)] == list(BEGINNINGS)
