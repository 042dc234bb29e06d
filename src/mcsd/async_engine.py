"""The engine for asyncio: requests of many tasks in one batch, stepped by one thread."""

import asyncio
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self

from mcsd.engine import Engine
from mcsd.errors import McsdError, check_int
from mcsd.request import Request
from mcsd.results import Chunk, Completion
from mcsd.stepping_thread import EngineStatus, SteppingThread
from mcsd.tokenization import Message

MAX_UNREAD = 256
"""Chunks that wait for the reader of a request. If it lags by more they are joined, so that the text bounds memory."""


class AsyncRequest:
    """A submitted request: iterate over its chunks, or wait for its `completion`. Both belong to the submitting loop.

    A task that is cancelled while it waits, and an iteration that is left, cancel the request.

    Attributes:
        request: the engine's request.
    """

    def __init__(self, engine: "AsyncEngine", request: Request) -> None:
        self._engine = engine  # Which stays open as long as the request runs.
        self.request = request
        self._loop = asyncio.get_running_loop()
        self._chunks: deque[Chunk] = deque()
        self._ended = False
        self._news = asyncio.Event()

    async def __aiter__(self) -> AsyncGenerator[Chunk, None]:
        try:
            while self._chunks or not self._ended:
                while self._chunks:
                    yield self._chunks.popleft()
                if not self._ended:
                    await self._next()
        finally:
            self.cancel()
        if self.request.error is not None:
            raise self.request.error

    async def completion(self) -> Completion:
        """Wait for the result.

        Raises:
            RequestError: the request has failed or was cancelled.
        """
        try:
            while not self._ended:
                await self._next()
        finally:
            self.cancel()
        if self.request.error is not None:
            raise self.request.error
        assert self.request.completion is not None
        return self.request.completion

    def cancel(self, error: McsdError | None = None) -> None:
        """End the request with an error, by default `RequestInterrupted`, if it has not ended."""
        self._engine.engine.cancel(self.request, error)

    async def _next(self) -> None:
        self._news.clear()
        await self._news.wait()

    def listen(self, chunks: list[Chunk], ended: bool) -> None:
        """Called by the stepping thread."""
        self._loop.call_soon_threadsafe(self._receive, chunks, ended)

    def _receive(self, chunks: list[Chunk], ended: bool) -> None:
        for chunk in chunks:
            if len(self._chunks) < MAX_UNREAD:
                self._chunks.append(chunk)
            else:
                self._chunks[-1] = self._chunks[-1].joined(chunk)
        self._ended = ended
        self._news.set()


class AsyncEngine:
    """An engine for tasks of any event loops and threads: their requests share its batch. No request is lost.

    One thread makes the steps. Every submitted request ends with a completion or an error, also when a step fails and
    when the engine is closed. An engine that is no longer used, or a program that ends, closes it.

    Args:
        engine: may be used directly as well.
        max_waiting: requests that wait for a place in the batch, at most; more are refused with `EngineBusy`.

    Raises:
        InvalidOption: ``max_waiting`` is not an integer from 0 to 1,048,576.
    """

    def __init__(self, engine: Engine, max_waiting: int = 256) -> None:
        check_int("max_waiting", max_waiting, 0, 1 << 20)
        self.engine = engine
        self._thread = SteppingThread(engine, engine.max_batch, max_waiting)
        weakref.finalize(self, self._thread.close)

    @property
    def status(self) -> EngineStatus:
        """Running and waiting requests, and the engine's health."""
        return self._thread.status

    @property
    def leaked_sequences(self) -> int:
        """Sequences in use when no request was left. They were freed; mcsd or a drafter has a fault."""
        return self._thread.leaked

    async def submit(self, prompt: Any, params: Any = None, *, trace: bool = False, **fields: Any) -> AsyncRequest:
        """Queue a prompt. Arguments are those of `Engine.stream`; the prompt is a text or token ids.

        Raises:
            RequestError: the prompt or a parameter is wrong.
            EngineBusy: too many requests are waiting.
            EngineClosed: the engine was closed.
        """
        return await self._submit_one(lambda: prompt, params, trace, fields)

    async def submit_chat(
        self, messages: Sequence[Message], params: Any = None, *, trace: bool = False, **fields: Any
    ) -> AsyncRequest:
        """`submit`, for a conversation."""
        return await self._submit_one(lambda: self.engine.chat_tokens(messages), params, trace, fields)

    async def submit_requests(self, make: Callable[[], list[Request]]) -> list[AsyncRequest]:
        """Queue requests, all or none.

        Args:
            make: makes them, with `Engine.requests`. It is called in a thread, because the tokenizer takes time.

        Raises:
            RequestError: as `submit`, or what ``make`` raises.
        """
        self._thread.check_space(1)
        requests = [AsyncRequest(self, request) for request in await asyncio.to_thread(make)]
        self._thread.submit([(each.request, each.listen) for each in requests])
        return requests

    async def generate(self, prompt: Any, params: Any = None, **fields: Any) -> Any:
        """Complete one prompt; with ``n > 1`` a list. For several prompts gather several calls: they share the batch.

        Raises:
            RequestError: what `submit` and `AsyncRequest.completion` raise.
        """
        return await self._complete(lambda: prompt, params, fields)

    async def chat(self, messages: Sequence[Message], params: Any = None, **fields: Any) -> Any:
        """Answer a conversation; as `generate`."""
        return await self._complete(lambda: self.engine.chat_tokens(messages), params, fields)

    async def stream(
        self, prompt: Any, params: Any = None, *, trace: bool = False, **fields: Any
    ) -> AsyncGenerator[Chunk, None]:
        """Complete one prompt, one chunk per step; the last chunk carries the completion. See `Engine.stream`.

        Errors are those of `submit`, raised by the first iteration. Closing the iterator cancels the request.
        """
        async with aclosing((await self.submit(prompt, params, trace=trace, **fields)).__aiter__()) as chunks:
            async for chunk in chunks:
                yield chunk

    async def stream_chat(
        self, messages: Sequence[Message], params: Any = None, *, trace: bool = False, **fields: Any
    ) -> AsyncGenerator[Chunk, None]:
        """`stream`, for a conversation."""
        async with aclosing((await self.submit_chat(messages, params, trace=trace, **fields)).__aiter__()) as chunks:
            async for chunk in chunks:
                yield chunk

    @property
    def step_seconds(self) -> float:
        """How long the step that runs now has taken so far; 0 between steps."""
        return self._thread.step_seconds

    def abandon(self, error: McsdError) -> None:
        """Refuse new requests and end all others with an error, without waiting for a step that never ends."""
        self._thread.abandon(error)

    async def aclose(self, seconds: float = 0.0) -> None:
        """Refuse new requests, give those that run or wait some time, and end the others with `RequestInterrupted`.

        Args:
            seconds: how long to wait for requests to end by themselves.
        """
        await asyncio.to_thread(self._thread.close, seconds)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def _submit_one(
        self, prompt: Callable[[], Any], params: Any, trace: bool, fields: dict[str, Any]
    ) -> AsyncRequest:
        def make() -> list[Request]:
            request = self.engine.request(prompt(), params, **fields)
            request.trace = trace
            return [request]

        return (await self.submit_requests(make))[0]

    async def _complete(self, prompt: Callable[[], Any], params: Any, fields: dict[str, Any]) -> Any:
        requests = await self.submit_requests(lambda: self.engine.requests(prompt(), params, **fields))
        try:
            done = [await each.completion() for each in requests]
        finally:
            for each in requests:
                each.cancel()
        return done if len(done) > 1 else done[0]
