"""Fields of a request's body as sampling parameters, messages for the chat template, and tools."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mcsd.engine import Engine
from mcsd.planning import FixedTree
from mcsd.server.api_errors import ApiError, unsupported
from mcsd.server.schema import (
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    Content,
    FlatJsonSchema,
    Generation,
    JsonObject,
    JsonSchema,
    ResponsesRequest,
    Speculative,
    Tool,
)

COMPLETION_TOKENS = 16
"""New tokens of ``/v1/completions`` that does not say how many, as OpenAI's."""

_SAME_NAMES = (
    *("temperature", "top_p", "top_k", "min_p", "typical_p", "min_new_tokens", "repetition_penalty"),
    *("stop_token_ids", "include_stop", "skip_special_tokens", "bad_words", "ignore_eos", "n", "stop"),
    *("presence_penalty", "frequency_penalty"),
)


def sampling_fields(body: Generation, engine: Engine) -> dict[str, Any]:
    """The sampling parameters that a body names, as fields of `mcsd.SamplingParams`.

    Raises:
        ApiError: a value that the engine does not support.
    """
    fields = {name: value for name in _SAME_NAMES if (value := getattr(body, name, None)) is not None}
    if body.seed is not None:
        fields["seed"] = body.seed % (1 << 64)
    if biases := getattr(body, "logit_bias", None):
        fields["logit_bias"] = {int(token): bias for token, bias in biases.items()}
    if (prediction := getattr(body, "prediction", None)) is not None:
        fields["prediction"] = text_of(prediction.content)
    speculative = _speculative(body.speculative, engine)
    return fields | speculative | _lengths(body, engine) | _logprobs(body) | structured_fields(body)


def structured_fields(body: Generation) -> dict[str, Any]:
    """The sampling parameters of structured output: of ``response_format``, ``text.format``, ``regex``, ``grammar``."""
    fields: dict[str, Any] = {"regex": body.regex, "grammar": body.grammar}
    if isinstance(body, ResponsesRequest):
        form: Any = body.text and body.text.format
    else:
        form = getattr(body, "response_format", None)
    match form:
        case JsonObject():
            fields["json_object"] = True
        case JsonSchema():
            fields["json_schema"] = form.json_schema.schema_
        case FlatJsonSchema():
            fields["json_schema"] = form.schema_
    return {name: value for name, value in fields.items() if value is not None}


def _lengths(body: Generation, engine: Engine) -> dict[str, int]:
    if isinstance(body, CompletionRequest):
        return {"max_new_tokens": body.max_tokens or COMPLETION_TOKENS}
    if isinstance(body, ChatRequest):
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise ApiError(400, "give max_tokens or max_completion_tokens", "invalid_value", "max_tokens")
        return {"max_new_tokens": body.max_completion_tokens or body.max_tokens or engine.max_length}
    assert isinstance(body, ResponsesRequest)
    return {"max_new_tokens": body.max_output_tokens or engine.max_length}


def _logprobs(body: Generation) -> dict[str, int]:
    if isinstance(body, CompletionRequest):
        return {} if body.logprobs is None else {"logprobs": body.logprobs}
    if not isinstance(body, ChatRequest):
        return {}
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs: true", "invalid_value", "top_logprobs")
    return {"logprobs": body.top_logprobs or 0} if body.logprobs else {}


def speculation(engine: Engine) -> dict[str, Any]:
    """The draft, tree and scheme of an engine. The draft is named without its folder."""
    tree = str(engine.plan.shape) if isinstance(engine.plan, FixedTree) else "auto"
    return {"draft": Path(engine.draft_name).name, "tree": tree, "scheme": engine.scheme_name}


def _speculative(given: Speculative | None, engine: Engine) -> dict[str, bool]:
    if given is None:
        return {}
    has = speculation(engine)
    del has["draft"]
    if given.enabled:
        has["enabled"] = engine.draft_name != "none"
    for name, value in has.items():
        wanted = getattr(given, name)
        if wanted is not None and wanted != value:
            raise unsupported(
                f"speculative.{name}",
                f"speculative.{name}={json.dumps(wanted)} of one request is not supported: this server has"
                f" {json.dumps(value)}",
            )
    return {} if given.enabled is None else {"speculative": given.enabled}


def chat_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages as chat templates take them: contents as texts, arguments of calls as objects."""
    return [_message(message, place) for place, message in enumerate(messages)]


def _message(message: ChatMessage, place: int) -> dict[str, Any]:
    given: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role}
    if message.content is None and not message.tool_calls:
        raise ApiError(400, f"messages.{place}.content is missing", "invalid_value", f"messages.{place}.content")
    given["content"] = text_of(message.content or "")
    if message.tool_calls is not None and message.role != "assistant":
        raise ApiError(400, "only assistants call tools", "invalid_value", f"messages.{place}.tool_calls")
    for name in ("name", "tool_call_id"):
        if (value := getattr(message, name)) is not None:
            given[name] = value
    if message.tool_calls:
        given["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(call.function.arguments, f"messages.{place}.tool_calls"),
                },
            }
            for call in message.tool_calls
        ]
    return given


def _arguments(text: str, param: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "the arguments of a tool call are not JSON", "invalid_value", param) from error


def text_of(content: Content) -> str:
    """The text of a content, whose parts follow each other."""
    return content if isinstance(content, str) else "".join(part.text for part in content)


def tool_definitions(tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Tools as chat templates take them."""
    return [tool.model_dump(exclude_none=True) for tool in tools]
