"""Structured output over HTTP: the engine's own texts, and named refusals."""

from enum import Enum
from typing import Any

import httpx2 as httpx
import openai
import pytest
from pydantic import BaseModel

from support.server import Running, table_engine

TALK: Any = [{"role": "user", "content": "hello"}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}


class Answer(Enum):
    YES = "yes"
    NO = "no"


class Verdict(BaseModel):
    answer: Answer
    sure: bool


@pytest.fixture(scope="module")
def no_spaces() -> dict[str, float]:
    """A random table would write spaces between the parts of JSON, which are allowed, until the length is reached."""
    tokenizer = table_engine().tokenizer
    return {str(token): -100 for text in (" ", "\n", "\r", "\t") for token in tokenizer(text)["input_ids"]}


@pytest.mark.parametrize("seed", range(3))
def test_a_pydantic_model_is_parsed(client: openai.OpenAI, seed: int, no_spaces: Any) -> None:
    done = client.chat.completions.parse(
        model="tabular",
        messages=TALK,
        response_format=Verdict,
        seed=seed,
        max_tokens=300,
        temperature=1,
        logit_bias=no_spaces,
    )
    assert done.choices[0].finish_reason == "stop"
    assert isinstance(done.choices[0].message.parsed, Verdict)


@pytest.mark.parametrize(
    ("asked", "own"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}}, SCHEMA),
        ({"regex": "(ab|c){3}"}, "(ab|c){3}"),
        ({"grammar": 'start: "a" | "bc"'}, 'start: "a" | "bc"'),
    ],
)
def test_texts_are_those_of_the_engine(server: Running, asked: dict[str, Any], own: Any, no_spaces: Any) -> None:
    name = next(iter(asked)).replace("response_format", "json_schema")
    bias = {int(token): value for token, value in no_spaces.items()}
    params = {"seed": 3, "max_new_tokens": 200, "temperature": 0.9, "logit_bias": bias, name: own}
    expected = table_engine().chat(TALK, **params).text
    body = {"messages": TALK, "seed": 3, "max_tokens": 200, "temperature": 0.9, "logit_bias": no_spaces, **asked}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == expected
    assert answer["choices"][0]["finish_reason"] == "stop"


def test_responses_take_a_format(server: Running) -> None:
    form = {"format": {"type": "json_schema", "name": "x", "schema": SCHEMA, "strict": True}}
    body = {"input": "hello", "text": form, "max_output_tokens": 200, "temperature": 1}
    answer = httpx.post(f"{server.url}/v1/responses", json=body).json()
    text = answer["output"][0]["content"][0]["text"]
    assert "".join(text.split()) in ('{"a":true}', '{"a":false}') or answer["status"] == "incomplete"


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        ({"regex": "(("}, "regex"),
        ({"grammar": "nonsense"}, "grammar"),
        ({"regex": "a", "grammar": 'start: "a"'}, "grammar"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": 3}}}}, "schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "schema"),
    ],
)
def test_what_does_not_compile_is_named(server: Running, asked: dict[str, Any], word: str) -> None:
    answer = httpx.post(f"{server.url}/v1/chat/completions", json={"messages": TALK, **asked})
    assert answer.status_code == 400
    assert word in answer.json()["error"]["message"]
