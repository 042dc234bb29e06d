"""Built-in prompts, and prompt files."""

from copy import copy
from pathlib import Path

import pytest

from mcsd.errors import DataError
from mcsd.loading.load import LoadedModel
from mcsd.prompts import BEGINNINGS, QUESTIONS, default_prompts, evenly_spaced, load_prompts, mixed_prompts
from mcsd.tokenization import PromptEncoder


@pytest.mark.thorough
def test_questions_use_the_chat_template_and_texts_do_not(smollm2: LoadedModel) -> None:
    tokenizer = smollm2.tokenizer
    encoder = PromptEncoder(tokenizer, "smollm2", smollm2.model.vocab_size, 512)
    asked = [tokenizer.decode(ids) for ids in default_prompts(encoder)]
    assert len(asked) == len(QUESTIONS)
    for text, question in zip(asked, QUESTIONS, strict=True):
        assert text.endswith(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n")
    mixed = [tokenizer.decode(ids) for ids in mixed_prompts(encoder)]
    assert mixed[::2] == list(BEGINNINGS[:4])
    assert mixed[1::2] == asked[:4]


@pytest.mark.thorough
def test_without_a_chat_template_the_prompts_are_texts(smollm2: LoadedModel) -> None:
    tokenizer = copy(smollm2.tokenizer)
    tokenizer.chat_template = None
    encoder = PromptEncoder(tokenizer, "smollm2", smollm2.model.vocab_size, 512)
    assert [tokenizer.decode(ids) for ids in default_prompts(encoder)] == list(BEGINNINGS)


def test_a_prompt_per_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo words\n")
    (tmp_path / "a.jsonl").write_text('{"prompt": "one\\ntwo"}\n\n{"prompt": "three", "id": 3}\n')
    assert load_prompts(tmp_path / "a.txt") == ["one", "two words"]
    assert load_prompts(tmp_path / "a.jsonl") == ["one\ntwo", "three"]


@pytest.mark.parametrize("line", ['{"question": 1}', "[1]", "{", '{"prompt": 1}', '{"prompt": " "}', "[" * 10**5])
def test_a_line_that_is_not_a_prompt_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "hi"}}\n{line}\n')
    with pytest.raises(DataError, match=r"prompts\.jsonl"):
        load_prompts(path)


def test_evenly_spaced() -> None:
    assert evenly_spaced(list("abcdef"), 3) == ["a", "c", "e"]
    assert evenly_spaced(list("ab"), 3) == ["a", "b"]
