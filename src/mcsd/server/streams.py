"""Answers that come while the text is made (server-sent events), and answers for which a client waits."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from mcsd.errors import McsdError
from mcsd.server.api_errors import ApiError, api_error
from mcsd.server.service import Texts

T = TypeVar("T")

Event = dict[str, Any]


class EventStream(StreamingResponse):
    """Sends events; a client that goes away cancels the texts they come from.

    Args:
        texts: cancelled at the end, if they have not ended.
        events: JSON objects. One with a ``type`` that begins with "response." is sent with that name.
        ends: whether "[DONE]" is the last event.
    """

    def __init__(self, texts: Texts, events: AsyncGenerator[Event, None], ends: bool = True) -> None:
        self._texts, self._events, self._ends = texts, events, ends
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._lines(), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        async with self._texts, aclosing(self._events):
            await super().__call__(scope, receive, send)

    async def _lines(self) -> AsyncIterator[str]:
        try:
            async for event in self._events:
                name = event.get("type", "")
                yield (f"event: {name}\n" if name.startswith("response.") else "") + _data(event)
        except McsdError as error:
            # The status is sent already.
            yield _data(api_error(error).body)
            return
        if self._ends:
            yield "data: [DONE]\n\n"


def _data(event: Event) -> str:
    return f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work, which is cancelled when the client goes away.

    Raises:
        ApiError: it has.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ApiError(499, "the client has gone away", "client_closed_request")
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
