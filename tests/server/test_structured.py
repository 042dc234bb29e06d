"""Structured output over HTTP: the engine's own texts, and named refusals."""

import json
from enum import Enum
from typing import Any

import httpx2 as httpx
import jsonschema
import openai
import pytest
import torch
from pydantic import BaseModel

import mcsd
from mcsd.testing import TabularModel
from support.server import Running, chat_tokenizer, running, table_engine

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


SCHEMAS: dict[str, Any] = {"first": SCHEMA, "second": {"enum": [["x"], 'y"\n']}}
TOOLS: Any = [{"type": "function", "function": {"name": n, "parameters": s}} for n, s in SCHEMAS.items()]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("marks_are_tokens", [False, True])
def test_an_answer_is_the_call_that_is_asked_for(stream: bool, marks_are_tokens: bool, no_spaces: Any) -> None:
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens(["<tool_call>", "</tool_call>"] if marks_are_tokens else [])
    size = len(tokenizer)
    generator = torch.Generator().manual_seed(0)
    target, draft = (TabularModel(torch.rand(size, size, generator=generator).softmax(-1)) for _ in range(2))
    options: Any = {"model": "tabular", "messages": TALK, "tools": TOOLS, "max_tokens": 200, "temperature": 1}
    options |= {"stream": stream, "logit_bias": no_spaces}
    second = {"type": "function", "function": {"name": "second"}}
    with running(mcsd.Engine(target, draft, tokenizer, tree="2x2")) as server, server.client() as client:
        for choice, names in (("required", {"first", "second"}), (second, {"second"})):
            found = set()
            for seed in range(16):
                done: Any = client.chat.completions.create(**options, tool_choice=choice, seed=seed)
                choices = [choice for chunk in done for choice in chunk.choices] if stream else done.choices
                parts = [each.delta if stream else each.message for each in choices]
                assert choices[-1].finish_reason == "tool_calls"
                assert not any(part.content for part in parts)
                (call,) = (call for part in parts for call in part.tool_calls or [])
                jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
                found.add(call.function.name)
            assert found == names


@pytest.mark.parametrize(
    ("tools", "asked", "param", "words"),
    [
        (TOOLS, {"tool_choice": {"type": "function", "function": {"name": "third"}}}, "tool_choice", "no tool"),
        ([], {"tool_choice": "required"}, "tool_choice", "no tool"),
        (TOOLS, {"tool_choice": "required", "regex": "a"}, "tools", "exclude"),
        ([{"name": "f", "parameters": {"type": 3}}], {"tool_choice": "required"}, "tools", "does not compile"),
    ],
)
def test_a_call_that_cannot_be_forced_is_refused(
    server: Running, tools: Any, asked: dict[str, Any], param: str, words: str
) -> None:
    given = [each if "type" in each else {"type": "function", "function": each} for each in tools]
    body = {"messages": TALK, "tools": given} | asked
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("mark", [["<tool_call>"], ["<tool", "_call>"]])
def test_calls_of_strict_tools_fit_their_schemas(mark: list[str], strict: bool, no_spaces: dict[str, float]) -> None:
    """In an answer that may call, of a model that begins calls often and ends none by itself."""
    tokenizer = chat_tokenizer()
    tokenizer.add_tokens([*mark, "</tool_call>"])
    begin = tokenizer.convert_tokens_to_ids(mark)
    weights = torch.rand(len(tokenizer), len(tokenizer), generator=torch.Generator().manual_seed(0))
    weights[:, [begin[0], tokenizer.eos_token_id]] = 5
    weights[begin[:-1], begin[-1]] = 5000
    engine = mcsd.Engine(TabularModel(weights / weights.sum(-1, keepdim=True)), "ngram", tokenizer, tree="chain:2")
    tools: Any = [{"type": "function", "function": each["function"] | {"strict": strict}} for each in TOOLS]
    options: Any = {"model": "tabular", "messages": TALK, "tools": tools, "max_tokens": 400, "temperature": 1}
    found = []
    with running(engine) as server, server.client() as client:
        for seed in range(12):
            done = client.chat.completions.create(**options, logit_bias=no_spaces, seed=seed)
            message = done.choices[0].message
            for call in message.tool_calls or ():
                assert call.type == "function"
                jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
                found.append(call.function.name)
            assert done.choices[0].finish_reason == ("tool_calls" if message.tool_calls else "stop")
            assert not strict or "<tool_call>" not in (message.content or "")
    assert {*found} == ({"first", "second"} if strict else set())


@pytest.mark.parametrize("stream", [False, True])
def test_parameters_that_leave_no_token_are_the_fault_of_the_request(server: Running, stream: bool) -> None:
    body = {"prompt": "a", "regex": "ab", "bad_words": ["b"], "stream": stream, "temperature": 1}
    answer = httpx.post(f"{server.url}/v1/completions", json=body)
    assert answer.status_code == (200 if stream else 400)
    assert '"code":"no_token_left"' in answer.text.replace(": ", ":")
    assert '"type":"invalid_request_error"' in answer.text.replace(": ", ":")
