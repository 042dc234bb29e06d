"""Answers that come while the text is made (server-sent events), and answers for which a client waits."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from mcsd.errors import McsdError
from mcsd.server.api_errors import ApiError, api_error

if TYPE_CHECKING:
    from mcsd.server.service import Texts

T = TypeVar("T")

Event = dict[str, Any]


class EventStream(StreamingResponse):
    """Sends events; a client that goes away cancels the texts they come from.

    Nothing is sent before there is text: so a proxy may send a request that has got no event to another server.

    Args:
        texts: cancelled at the end, if they have not ended.
        events: JSON objects. One with a ``type`` that begins with "response." is sent with that name.
        ends: whether "[DONE]" is the last event.
    """

    def __init__(self, texts: "Texts", events: AsyncGenerator[Event, None], ends: bool = True) -> None:
        self._texts, self._events, self._ends = texts, events, ends
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(self._lines(), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        async with self._texts, aclosing(self._events):
            await super().__call__(scope, receive, send)

    async def _lines(self) -> AsyncIterator[str]:
        held = ""
        try:
            async for event in self._events:
                name = event.get("type", "")
                held += (f"event: {name}\n" if name.startswith("response.") else "") + _data(event)
                if self._texts.have_begun:
                    yield held
                    held = ""
        except McsdError as error:
            # The status is sent already.
            yield held + error_event(api_error(error))
            return
        if self._ends:
            yield "data: [DONE]\n\n"


def error_event(error: ApiError) -> str:
    """The last event of a stream that fails."""
    return _data(error.body)


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
