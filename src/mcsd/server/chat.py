"""``/v1/chat/completions``."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from mcsd.engine import Engine
from mcsd.errors import InvalidGrammar
from mcsd.request import Request as EngineRequest
from mcsd.results import Completion
from mcsd.server.answers import TokenWriter, head, note, usage
from mcsd.server.api_errors import ApiError, unsupported
from mcsd.server.parameters import chat_messages, sampling_fields, structured_fields, tool_definitions
from mcsd.server.schema import ChatRequest, NamedTool
from mcsd.server.service import Service, Texts, prompt_requests
from mcsd.server.streams import Event, EventStream, unless_disconnected
from mcsd.server.tool_calls import ToolCallParser, calls_grammar, knows_format
from mcsd.server.traces import trace_object, wants_trace


async def chat(service: Service, body: ChatRequest, request: Request, writer: TokenWriter) -> Response:
    """Answer a conversation."""
    engine = service.engine
    service.check_size(body.model, body.n)
    fields = sampling_fields(body, engine)
    messages = chat_messages(body.messages)
    tools = _tools(body, engine)
    trace = wants_trace(body, service.options)
    calls = _grammar_of_calls(body, engine)

    def make() -> list[EngineRequest]:
        try:
            return prompt_requests(engine, [engine.chat_tokens(messages, tools)], fields | calls, trace)
        except InvalidGrammar as error:
            if calls:
                raise ApiError(400, f"the parameters of a tool: {error}", "invalid_value", "tools") from error
            raise

    texts = await service.submit(make)
    answer = _Answer(service, body, texts, writer, bool(tools), request.scope["state"]["log"])
    if body.stream:
        return EventStream(texts, answer.events())
    async with texts:
        return JSONResponse(await unless_disconnected(request, answer.whole()))


def _tools(body: ChatRequest, engine: Engine) -> list[dict[str, Any]] | None:
    if not body.tools or body.tool_choice == "none":
        return None
    if not knows_format(getattr(engine.tokenizer, "chat_template", None)):
        raise unsupported(
            "tools", "the chat template of this model takes no tools, or in a format that mcsd does not read"
        )
    return tool_definitions(body.tools)


def _grammar_of_calls(body: ChatRequest, engine: Engine) -> dict[str, str]:
    """The sampling parameter that makes an answer a call, or calls fit their schemas, where the request asks for it."""
    functions = [tool.function.model_dump() for tool in body.tools or ()]
    choice = body.tool_choice
    is_forced = choice not in (None, "none", "auto")
    if isinstance(choice, NamedTool):
        functions = [each for each in functions if each["name"] == choice.function.name]
    if is_forced and not functions:
        raise ApiError(400, "tool_choice names no tool of this request", "invalid_value", "tool_choice")
    if not is_forced:
        if choice == "none" or not any(each["strict"] for each in functions):
            return {}
        functions = [each if each["strict"] else each | {"parameters": None} for each in functions]
    if structured_fields(body):
        raise ApiError(400, "calls that must fit a schema exclude structured output", "invalid_value", "tools")
    return {"grammar": calls_grammar(functions, is_forced, engine.tokenizer)}


class _Answer:
    """The answer to one request, whole or in events."""

    def __init__(
        self,
        service: Service,
        body: ChatRequest,
        texts: Texts,
        writer: TokenWriter,
        has_tools: bool,
        log: dict[str, Any],
    ) -> None:
        self._body, self._texts, self._writer, self._log = body, texts, writer, log
        self._has_tools = has_tools
        self._model = service.model

    async def whole(self) -> dict[str, Any]:
        """The answer in one object."""
        done = await self._texts.completions()
        counts = usage(done)
        note(self._log, counts)
        choices = [self._choice(index, each) for index, each in enumerate(done)]
        return head("chat.completion", "chatcmpl", self._model) | {"choices": choices, "usage": counts}

    def _choice(self, index: int, done: Completion) -> dict[str, Any]:
        parser = ToolCallParser() if self._has_tools else None
        text = done.text if parser is None else parser.push(done.text) + parser.finish()
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if parser is not None and parser.calls:
            message |= {"content": text or None, "tool_calls": parser.calls}
        logprobs = None if done.logprobs is None else self._writer.chat_logprobs(done.logprobs)
        ids = {"token_ids": done.token_ids} if self._body.return_token_ids else {}
        reason = _reason(done, parser)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason, **ids}

    async def events(self) -> AsyncGenerator[Event, None]:
        """The answer in chunks."""
        first = head("chat.completion.chunk", "chatcmpl", self._model)
        options = self._body.stream_options
        with_usage = options is not None and options.include_usage
        rest = {"usage": None} if with_usage else {}
        parsers = [ToolCallParser() if self._has_tools else None for _ in range(len(self._texts))]
        done: dict[int, Completion] = {}

        def event(index: int, delta: dict[str, Any], reason: str | None = None, **more: Any) -> Event:
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason} | more
            return first | {"choices": [choice]} | rest

        for index in range(len(self._texts)):
            yield event(index, {"role": "assistant", "content": ""})
        async with aclosing(self._texts.chunks()) as chunks:
            async for index, chunk in chunks:
                parser = parsers[index]
                known = len(parser.calls) if parser else 0
                text = parser.push(chunk.text) if parser else chunk.text
                if parser and chunk.completion is not None:
                    text += parser.finish()
                more: dict[str, Any] = {}
                if chunk.logprobs is not None:
                    more["logprobs"] = self._writer.chat_logprobs(chunk.logprobs)
                if self._body.return_token_ids:
                    more["token_ids"] = chunk.token_ids
                if chunk.trace is not None:
                    more["trace"] = trace_object(chunk.trace, chunk.pieces, self._writer)
                if text or more:
                    yield event(index, {"content": text}, **more)
                for place, call in enumerate(parser.calls[known:] if parser else (), known):
                    yield event(index, {"tool_calls": [{"index": place, **call}]})
                if chunk.completion is not None:
                    done[index] = chunk.completion
                    yield event(index, {}, _reason(chunk.completion, parser))
        counts = usage([done[index] for index in range(len(self._texts))])
        note(self._log, counts)
        if with_usage:
            yield first | {"choices": [], "usage": counts}


def _reason(done: Completion, parser: ToolCallParser | None) -> str:
    return "tool_calls" if parser is not None and parser.calls and done.finish_reason == "stop" else done.finish_reason
