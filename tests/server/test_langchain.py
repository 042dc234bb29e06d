"""The client of LangChain: answers, streams, structured output and tools."""

from typing import Any, Literal

import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, ConfigDict

from support.server import Running, table_engine


class Weather(BaseModel):
    """The weather of a place."""

    model_config = ConfigDict(extra="forbid")

    sky: Literal["clear", "cloudy"]
    warm: bool


def model(server: Running, **options: Any) -> ChatOpenAI:
    """Without spaces, of which a random table would write many between the parts of JSON."""
    tokenizer = table_engine().tokenizer
    no_spaces = {token: -100 for text in " \n\r\t" for token in tokenizer(text)["input_ids"]}
    settings = {"model": "tabular", "temperature": 1, "seed": 1, "max_tokens": 200, "max_retries": 0} | options
    return ChatOpenAI(base_url=f"{server.url}/v1", api_key="none", logit_bias=no_spaces, **settings)


def test_a_streamed_answer_is_the_whole_one(server: Running) -> None:
    asked = model(server, max_tokens=40)
    whole = asked.invoke("hello")
    chunks = list(asked.stream("hello", stream_usage=True))
    assert len(chunks) > 10
    assert "".join(str(chunk.content) for chunk in chunks) == whole.content != ""
    told = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]  # type: ignore[attr-defined]
    assert told[-1]["output_tokens"] == whole.usage_metadata["output_tokens"]


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(server: Running, method: Any) -> None:
    structured = model(server).with_structured_output(Weather, method=method, strict=True)
    assert isinstance(structured.invoke("How is the weather?"), Weather)


def test_a_tool_is_called(server: Running) -> None:
    answer: Any = model(server).bind_tools([Weather], tool_choice="any", strict=True).invoke("How is the weather?")
    (call,) = answer.tool_calls
    assert call["name"] == "Weather"
    assert Weather(**call["args"])
