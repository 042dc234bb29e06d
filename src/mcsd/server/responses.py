"""``/v1/responses``, without state: nothing is stored, and every request brings its whole conversation."""

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from itertools import count
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response

from mcsd.results import Completion
from mcsd.server.answers import note, usage
from mcsd.server.parameters import sampling_fields, text_of
from mcsd.server.schema import ResponsesRequest
from mcsd.server.service import Service, Texts, prompt_requests
from mcsd.server.streams import Event, EventStream, unless_disconnected


async def respond(service: Service, body: ResponsesRequest, request: Request) -> Response:
    """Answer a conversation."""
    engine = service.engine
    service.check_size(body.model, 1)
    fields = sampling_fields(body, engine)
    messages = _messages(body)
    texts = await service.submit(lambda: prompt_requests(engine, [engine.chat_tokens(messages)], fields))
    answer = _Answer(service, body, texts, request.scope["state"]["log"])
    if body.stream:
        return EventStream(texts, answer.events(), ends=False)
    async with texts:
        return JSONResponse(await unless_disconnected(request, answer.whole()))


def _messages(body: ResponsesRequest) -> list[dict[str, str]]:
    messages = [{"role": "system", "content": body.instructions}] if body.instructions is not None else []
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    roles = {"developer": "system"}
    given = [{"role": roles.get(item.role, item.role), "content": text_of(item.content)} for item in body.input]
    return messages + given


class _Answer:
    """The answer to one request, whole or in events."""

    def __init__(self, service: Service, body: ResponsesRequest, texts: Texts, log: dict[str, Any]) -> None:
        self._body, self._texts, self._log = body, texts, log
        self._item = f"msg_{secrets.token_hex(12)}"
        self._first: dict[str, Any] = {
            "id": f"resp_{secrets.token_hex(12)}",
            "object": "response",
            "created_at": int(time.time()),
            "model": service.model,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "temperature": body.temperature,
            "text": {"format": {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_p": body.top_p,
            "truncation": "disabled",
            "error": None,
        }

    async def whole(self) -> dict[str, Any]:
        """The answer in one object."""
        (done,) = await self._texts.completions()
        return self._ended(done)

    def _ended(self, done: Completion) -> dict[str, Any]:
        counts = usage([done])
        note(self._log, counts)
        whole = done.finish_reason == "stop"
        return self._first | {
            "status": "completed" if whole else "incomplete",
            "incomplete_details": None if whole else {"reason": "max_output_tokens"},
            "output": [self._message(done.text, "completed" if whole else "incomplete")],
            "usage": {
                "input_tokens": counts["prompt_tokens"],
                "input_tokens_details": counts["prompt_tokens_details"],
                "output_tokens": counts["completion_tokens"],
                "output_tokens_details": counts["completion_tokens_details"],
                "total_tokens": counts["total_tokens"],
                "speculative_decoding": counts["speculative_decoding"],
            },
        }

    def _message(self, text: str | None, status: str) -> dict[str, Any]:
        content = [] if text is None else [_part(text)]
        return {"id": self._item, "type": "message", "status": status, "role": "assistant", "content": content}

    async def events(self) -> AsyncGenerator[Event, None]:
        """The answer in events."""
        numbers, begun = count(), self._first | {"status": "in_progress", "incomplete_details": None, "output": []}
        place = {"item_id": self._item, "output_index": 0, "content_index": 0}

        def event(name: str, **fields: Any) -> Event:
            return {"type": f"response.{name}", "sequence_number": next(numbers), **fields}

        yield event("created", response=begun | {"usage": None})
        yield event("in_progress", response=begun | {"usage": None})
        yield event("output_item.added", output_index=0, item=self._message(None, "in_progress"))
        yield event("content_part.added", **place, part=_part(""))
        done: Completion | None = None
        async with aclosing(self._texts.chunks()) as chunks:
            async for _, chunk in chunks:
                done = chunk.completion
                if chunk.text:
                    yield event("output_text.delta", **place, delta=chunk.text, logprobs=[])
        assert done is not None
        ended = self._ended(done)
        yield event("output_text.done", **place, text=done.text, logprobs=[])
        yield event("content_part.done", **place, part=_part(done.text))
        yield event("output_item.done", output_index=0, item=ended["output"][0])
        yield event("completed" if ended["status"] == "completed" else "incomplete", response=ended)


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
