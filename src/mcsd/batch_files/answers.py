"""Requests through the application of the server, without a network: the same checks, answers and errors."""

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, Generator, Iterable
from typing import Any, NamedTuple

from fastapi import FastAPI
from starlette.types import Message

from mcsd.async_engine import AsyncEngine
from mcsd.batch_files.lines import Line
from mcsd.batch_files.output import answer_line
from mcsd.engine import Engine
from mcsd.errors import RequestInterrupted, step_error
from mcsd.server import create_app
from mcsd.server.api_errors import ApiError, unsupported
from mcsd.server.scope import http_scope

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/responses")

_SUBMITTED = 2
"""Requests that run or wait, for each sequence of the batch: the next ones are ready when a sequence is free."""
_AHEAD = 64
"""Requests between the first that has no answer and the last that was begun, for each sequence of the batch."""
_MOST_WAITING, _MOST_SECONDS = 1 << 20, 86400.0
"""Instead of the limits of the server that protect one client from others."""


class Answer(NamedTuple):
    """The answer to a request.

    Attributes:
        text: a line of the output.
        failed: whether it is an error.
        tokens: that were generated for it.
    """

    text: str
    failed: bool
    tokens: int


def answers(engine: Engine, lines: Iterable[Line], served_name: str | None = None) -> Generator[Answer, None, None]:
    """Answer requests, in their order. Many share the batch of the engine; they are read as places become free.

    Args:
        engine: answers them.
        lines: the requests.
        served_name: the name of the model in requests and answers; None: that of the target.

    Raises:
        McsdError: the engine cannot go on. An error of a single request is its answer.
    """
    stream = _answers(engine, lines, served_name)

    async def following() -> Answer | None:
        return await anext(stream, None)

    with asyncio.Runner() as runner:
        try:
            while (answer := runner.run(following())) is not None:
                yield answer
        finally:
            runner.run(stream.aclose())


async def _answers(engine: Engine, lines: Iterable[Line], served_name: str | None) -> AsyncGenerator[Answer, None]:
    served = AsyncEngine(engine, _MOST_WAITING)
    app = create_app(served, served_name=served_name, max_wait_seconds=_MOST_SECONDS, max_run_seconds=_MOST_SECONDS)
    free = asyncio.Semaphore(_SUBMITTED * engine.max_batch)
    begun: deque[asyncio.Task[Answer]] = deque()
    async with served, app.router.lifespan_context(app):
        try:
            for line in lines:
                await free.acquire()
                begun.append(asyncio.create_task(_answer(app, served, line)))
                begun[-1].add_done_callback(lambda _: free.release())
                while begun and (begun[0].done() or len(begun) >= _AHEAD * engine.max_batch):
                    yield await begun.popleft()
            while begun:
                yield await begun.popleft()
        finally:
            for task in begun:
                task.cancel()
            await asyncio.gather(*begun, return_exceptions=True)


async def _answer(app: FastAPI, engine: AsyncEngine, line: Line) -> Answer:
    try:
        given = _body(line)
        status, body = await _post(app, line.value["url"], given)
    except ApiError as error:
        status, body = error.status, error.body
    if status in (429, 503) and body["error"]["code"] != "request_timed_out":
        cause = app.state.service.error or engine.status.error
        raise step_error(cause) if cause else RequestInterrupted(body["error"]["message"], "run it again to go on")
    usage = body.get("usage", {})
    tokens = usage.get("completion_tokens", usage.get("output_tokens", 0))
    return Answer(answer_line(line, status, body), status != 200, tokens)


def _body(line: Line) -> bytes:
    """The body of a request, with a seed: a text that is begun again after a kill is the same."""
    method, url, body = (line.value.get(name) for name in ("method", "url", "body"))
    if method != "POST":
        raise ApiError(400, f"method {method!r:.40} is not POST", "invalid_value", "method")
    if url not in URLS:
        raise ApiError(404, f"url {url!r:.80} is not one of {', '.join(URLS)}", "not_found", "url")
    if not isinstance(body, dict):
        raise ApiError(400, "the body is no JSON object", "invalid_value", "body")
    if body.get("stream") is True:
        raise unsupported("stream", "a batch has no streams")
    if body.get("seed") is None:
        body = body | {"seed": line.seed}
    return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode(errors="surrogatepass")


async def _post(app: FastAPI, path: str, body: bytes) -> tuple[int, Any]:
    """The status and the JSON of an answer of an application."""
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    headers.append((b"content-length", str(len(body)).encode()))
    scope = http_scope("POST", path, headers)
    unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    answer: list[Message] = []

    async def receive() -> Message:
        if not unread:
            await asyncio.Event().wait()  # The client stays.
        return unread.pop()

    async def send(message: Message) -> None:
        answer.append(message)

    await app(scope, receive, send)
    return answer[0]["status"], json.loads(b"".join(message.get("body", b"") for message in answer[1:]))
