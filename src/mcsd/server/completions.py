"""``/v1/completions``: one prompt or several, as texts or token ids, without a chat template."""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from mcsd.results import Completion
from mcsd.server.answers import TokenWriter, head, note, usage_of_prompts
from mcsd.server.parameters import sampling_fields
from mcsd.server.schema import CompletionRequest
from mcsd.server.service import Service, Texts, prompt_requests
from mcsd.server.streams import Event, EventStream, unless_disconnected
from mcsd.server.traces import trace_object, wants_trace


async def complete(service: Service, body: CompletionRequest, request: Request, writer: TokenWriter) -> Response:
    """Continue prompts."""
    engine = service.engine
    prompts = _prompts(body)
    service.check_size(body.model, body.n * len(prompts))
    fields = sampling_fields(body, engine)
    trace = wants_trace(body, service.options)
    texts = await service.submit(lambda: prompt_requests(engine, prompts, fields, trace))
    answer = _Answer(service, body, texts, writer, request.scope["state"]["log"])
    if body.stream:
        return EventStream(texts, answer.events())
    async with texts:
        return JSONResponse(await unless_disconnected(request, answer.whole()))


def _prompts(body: CompletionRequest) -> list[Any]:
    prompt = body.prompt
    return prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]


class _Answer:
    """The answer to one request, whole or in events."""

    def __init__(
        self, service: Service, body: CompletionRequest, texts: Texts, writer: TokenWriter, log: dict[str, Any]
    ) -> None:
        self._body, self._texts, self._writer, self._log = body, texts, writer, log
        self._model = service.model

    async def whole(self) -> dict[str, Any]:
        """The answer in one object."""
        done = await self._texts.completions()
        choices = []
        for index, each in enumerate(done):
            logprobs = None if each.logprobs is None else self._writer.text_logprobs(each.logprobs, 0)
            ids = {"token_ids": each.token_ids} if self._body.return_token_ids else {}
            choice = {"index": index, "text": each.text, "logprobs": logprobs, "finish_reason": each.finish_reason}
            choices.append(choice | ids)
        return head("text_completion", "cmpl", self._model) | {"choices": choices, "usage": self._usage(done)}

    def _usage(self, done: list[Completion]) -> dict[str, Any]:
        size = self._body.n
        counts = usage_of_prompts([done[start : start + size] for start in range(0, len(done), size)])
        note(self._log, counts)
        return counts

    async def events(self) -> AsyncGenerator[Event, None]:
        """The answer in chunks."""
        first = head("text_completion", "cmpl", self._model)
        options = self._body.stream_options
        with_usage = options is not None and options.include_usage
        rest = {"usage": None} if with_usage else {}
        lengths = [0] * len(self._texts)
        done: dict[int, Completion] = {}
        async with aclosing(self._texts.chunks()) as chunks:
            async for index, chunk in chunks:
                choice: dict[str, Any] = {"index": index, "text": chunk.text, "logprobs": None, "finish_reason": None}
                if chunk.logprobs is not None:
                    choice["logprobs"] = self._writer.text_logprobs(chunk.logprobs, lengths[index])
                if self._body.return_token_ids:
                    choice["token_ids"] = chunk.token_ids
                if chunk.trace is not None:
                    choice["trace"] = trace_object(chunk.trace, chunk.pieces, self._writer)
                if chunk.completion is not None:
                    done[index] = chunk.completion
                    choice["finish_reason"] = chunk.completion.finish_reason
                lengths[index] += len(chunk.text)
                yield first | {"choices": [choice]} | rest
        counts = self._usage([done[index] for index in range(len(self._texts))])
        if with_usage:
            yield first | {"choices": [], "usage": counts}
