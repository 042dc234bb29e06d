"""Prompts: the built-in ones, those of a file, and their token ids. Free of torch."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mcsd.errors import DataError, EmptyPrompt, InvalidOption
from mcsd.params import SamplingParams
from mcsd.tokenization import PromptEncoder

_MAX_BYTES = 1 << 32
_MAX_CORPUS_BYTES = 1 << 26

QUESTIONS = (
    "Explain to a child why the sky is blue.",
    "Give three tips for staying awake during a long lecture.",
    "Write a short letter that invites a friend to a picnic.",
    "Describe how bread is baked, step by step.",
    "What are the main differences between a lake and a river?",
    "Rewrite this sentence in the past tense: She walks to the market and buys apples.",
    "Write a Python function that counts the vowels of a string.",
    "Name four professions in which people work at night, and say why.",
)
BEGINNINGS = (
    "The sun had not yet risen when",
    "def fibonacci(n):\n    ",
    "Water boils at a lower temperature on a mountain because",
    "1. Bread\n2. Milk\n3.",
    "The committee met on Tuesday to discuss",
    "Q: What is the capital of Norway?\nA:",
    "In the spring of 1912 a young engineer",
    "Dear Sir or Madam,\n\n",
)
SENTENCES = (
    "The library will be closed on Monday because of a public holiday.",
    "She opened the window and listened to the rain for a while.",
    "The new bridge was finished two years later than planned.",
    "Scientists have found traces of water in the samples that the probe brought back.",
    "Most passengers prefer the early train because it is less crowded.",
    "The city council decided yesterday to plant a thousand trees.",
    "He forgot his keys and had to wait in front of the house until evening.",
    "Prices for bread and milk have risen again this spring.",
)
"""English sentences to translate, as in the paper's second task."""


def load_prompts(path: Path) -> list[str]:
    """Read a file with one prompt per line: plain text, or JSON objects with a field "prompt" in a ``.jsonl`` file.

    Raises:
        DataError: the file cannot be read, holds no prompt, or has a line that is not a prompt.
    """
    lines = [line for line in read_text(path).splitlines() if line.strip()]
    prompts = lines
    if path.suffix == ".jsonl":
        try:
            prompts = [json.loads(line)["prompt"] for line in lines]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(
                f"{path} has a line that is not a prompt: {error!r:.100}", 'give {"prompt": "..."}'
            ) from error
    if not prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise DataError(f"{path} has no prompts", "give one a line")
    return prompts


def read_text(path: Path) -> str:
    """Read a UTF-8 file of at most 4 GiB.

    Raises:
        DataError: the file cannot be read, or is too large.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"{path} is larger than {_MAX_BYTES} bytes", "split it and give a part")
        return path.read_text()
    except (OSError, UnicodeError) as error:
        raise DataError(f"{path} cannot be read: {error}", "give a file of UTF-8 text") from error


def benchmark_prompts() -> dict[str, list[str]]:
    """The built-in prompt sets of `mcsd bench`: questions, and translations worded as in the paper."""
    template = "Translate the input English sentence into German.\nInput: {}\nOutput: "
    return {"questions": list(QUESTIONS), "translation": [template.format(sentence) for sentence in SENTENCES]}


def evenly_spaced(prompts: Sequence[str], count: int) -> list[str]:
    """At most ``count`` of the prompts, evenly spaced."""
    count = min(count, len(prompts))
    return [prompts[i * len(prompts) // count] for i in range(count)]


def default_prompts(encoder: PromptEncoder) -> list[list[int]]:
    """Token ids of typical prompts: questions in the chat template, or beginnings of texts if there is no template.

    Raises:
        RequestError: there is no tokenizer, the template refuses a question, or a prompt is too long.
    """
    if encoder.has_chat_template:
        return [encoder.encode_question(text) for text in QUESTIONS]
    return [encoder.encode(text, SamplingParams()) for text in BEGINNINGS]


def mixed_prompts(encoder: PromptEncoder) -> list[list[int]]:
    """Token ids of four beginnings of texts and four questions, alternating; see `PromptEncoder.encode_question`.

    Raises:
        RequestError: as `default_prompts`.
    """
    params = SamplingParams()
    pairs = zip(BEGINNINGS[:4], QUESTIONS[:4], strict=True)
    return [
        ids for text, question in pairs for ids in (encoder.encode(text, params), encoder.encode_question(question))
    ]


def encode_prompt_sets(
    prompts: Mapping[str, Sequence[str | list[int]]], encoder: PromptEncoder
) -> dict[str, list[list[int]]]:
    """Named sets of prompts as token ids. A text goes through `PromptEncoder.encode_question`.

    Raises:
        RequestError: there is no prompt, or one is empty or too long.
    """
    if not prompts or not all(prompts.values()):
        raise EmptyPrompt("no prompts, or a set without any", "give at least one")
    params = SamplingParams()
    return {
        name: [
            encoder.encode(encoder.encode_question(text) if isinstance(text, str) else text, params) for text in texts
        ]
        for name, texts in prompts.items()
    }


def load_corpus(look_up: str, tokenizer: Any) -> list[list[int]]:
    """The token ids of what is looked up in besides texts themselves.

    Args:
        look_up: "ngram": nothing; "ngram:PATH": a text file, or all files of a folder.
        tokenizer: of the target.

    Raises:
        DataError: a file cannot be read, or they are larger than 64 MiB together.
        InvalidOption: there is no tokenizer.
    """
    path = look_up.removeprefix("ngram").removeprefix(":")
    if not path:
        return []
    if tokenizer is None:
        raise InvalidOption(f"a corpus {path!r:.80} needs a tokenizer", "give NgramDrafter(corpus=[token ids, ...])")
    place = Path(path)
    files = sorted(file for file in place.rglob("*") if file.is_file()) if place.is_dir() else [place]
    size = sum(file.stat().st_size for file in files if file.exists())
    if size > _MAX_CORPUS_BYTES:
        raise DataError(f"a corpus of {size} bytes: at most {_MAX_CORPUS_BYTES} are read", "give fewer files")
    return [list(tokenizer(read_text(file), add_special_tokens=False)["input_ids"]) for file in files]
