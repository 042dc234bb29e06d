"""The engine behind the server: loading, ready, draining or failed; and the texts that HTTP requests wait for."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, Literal

from mcsd.async_engine import AsyncEngine, AsyncRequest
from mcsd.engine import Engine
from mcsd.errors import McsdError, RequestTimedOut, StepFailed, StepHung
from mcsd.request import Request
from mcsd.results import Chunk, Completion
from mcsd.server.api_errors import ApiError
from mcsd.server.logs import log_event, place_of
from mcsd.server.metrics import Metrics
from mcsd.server.options import ServerOptions

State = Literal["loading", "ready", "draining", "failed"]

_WATCH_SECONDS = 1.0


class Service:
    """One engine, and whether it takes requests.

    Args:
        engine: an engine; or a function that loads it, which `start` calls in a thread.
        options: of the server.
        name: of the engine, in metrics.

    Attributes:
        state: loading, ready, draining or failed.
        error: why it failed.
        on_failure: called once when loading has failed or a step hangs.
    """

    def __init__(
        self, engine: Engine | AsyncEngine | Callable[[], Engine], options: ServerOptions, name: str = "0"
    ) -> None:
        self.options = options
        self.state: State = "loading"
        self.error: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self._load = engine if not isinstance(engine, Engine | AsyncEngine) else None
        self._owns = not isinstance(engine, AsyncEngine)
        self._engine: AsyncEngine | None = None
        self._tasks: list[asyncio.Task[None]] = []
        if isinstance(engine, Engine | AsyncEngine):
            self._take(engine)
        self.metrics = Metrics(lambda: self.model, lambda: self._engine, lambda: self.state, name)

    def _take(self, engine: Engine | AsyncEngine) -> None:
        self._engine = engine if isinstance(engine, AsyncEngine) else AsyncEngine(engine, self.options.max_waiting)
        self.state = "ready"

    @property
    def model(self) -> str:
        """The name of the model for clients, which shows no path of this machine."""
        if self.options.served_name is not None:
            return self.options.served_name
        return "loading" if self._engine is None else Path(self._engine.engine.target_name).name

    @property
    def engine(self) -> Engine:
        """The engine.

        Raises:
            ApiError: it is not there yet, or no more.
        """
        return self._accepting().engine

    @property
    def is_busy(self) -> bool:
        """Whether accepted requests have not ended."""
        return self._engine is not None and self._engine.status[:2] != (0, 0)

    def check_size(self, model: str | None, texts: int) -> None:
        """Check that a request names this model, and asks for no more texts than are allowed.

        Raises:
            ApiError: it does not.
        """
        if model is not None and model != self.model:
            raise ApiError(404, f"there is no model {model!r:.80}, only {self.model!r}", "model_not_found", "model")
        if texts > self.options.max_completions:
            most = self.options.max_completions
            raise ApiError(400, f"{texts} texts in one request; at most {most} are allowed", "invalid_value", "n")

    def _accepting(self) -> AsyncEngine:
        if self.state != "ready" or self._engine is None:
            raise ApiError(503, f"the server is {self.state}", self.state, retry=self.state == "loading")
        return self._engine

    def start(self) -> None:
        """Load the engine, if that is left to do, and watch its steps. Called in the event loop."""
        self._tasks = [asyncio.create_task(self._run())]

    async def stop(self) -> None:
        """End all requests."""
        for task in self._tasks:
            task.cancel()
        if self._engine is not None and self._owns:
            await self._engine.aclose()

    def drain(self) -> None:
        """Refuse new requests; accepted ones go on."""
        if self.state in ("loading", "ready"):
            self.state = "draining"
            log_event("draining")

    async def _run(self) -> None:
        if self._load is not None:
            try:
                engine = await asyncio.to_thread(self._load)
            except Exception as error:
                self._fail(error)
                return
            if self.state == "loading":
                self._take(engine)
                log_event("ready", model=self.model)
        leaked = 0
        while self._engine is not None and self.state != "failed":
            await asyncio.sleep(min(_WATCH_SECONDS, self.options.step_seconds / 4))
            if self._engine.leaked_sequences > leaked:
                leaked = self._engine.leaked_sequences
                log_event("sequences leaked", level="ERROR", total=leaked)
            if self._engine.step_seconds > self.options.step_seconds:
                hung = StepHung(f"a step has taken more than {self.options.step_seconds:g} s", "restart the server")
                self._fail(hung)
                self._engine.abandon(hung)

    def _fail(self, error: BaseException) -> None:
        self.state, self.error = "failed", error
        log_event("failed", level="ERROR", error=type(error).__name__, message=str(error))
        self.on_failure()

    async def submit(self, make: Callable[[], list[Request]]) -> "Texts":
        """Queue the requests that a function makes: all or none.

        Raises:
            RequestError, ApiError: they are refused.
        """
        began = time.monotonic()
        return Texts(self, await self._accepting().submit_requests(make), began)


class Texts:
    """The texts of one HTTP request, with limits of time. Leaving the context cancels what has not ended.

    Args:
        service: counts them.
        requests: submitted.
        began: when the HTTP request began, by the monotonic clock.

    Attributes:
        have_begun: whether one of them has tokens.
    """

    def __init__(self, service: Service, requests: list[AsyncRequest], began: float) -> None:
        self._service = service
        self._requests = requests
        self._began = began
        self.have_begun = False
        loop, options = asyncio.get_running_loop(), service.options
        self._timers = {each: loop.call_later(options.max_wait_seconds, self._look, each) for each in requests}

    def __len__(self) -> int:
        return len(self._requests)

    async def __aenter__(self) -> "Texts":
        return self

    async def __aexit__(self, *_: object) -> None:
        for request, timer in self._timers.items():
            timer.cancel()
            request.cancel()

    def _look(self, request: AsyncRequest) -> None:
        """End a request that still waits, or give it its time to run."""
        options = self._service.options
        if not request.request.started:
            self._end(request, f"the request waited for more than {options.max_wait_seconds:g} s", "try again later")
            return
        loop = asyncio.get_running_loop()
        message = f"the request ran for more than {options.max_run_seconds:g} s"
        self._timers[request] = loop.call_later(
            options.max_run_seconds, self._end, request, message, "ask for fewer tokens"
        )

    def _end(self, request: AsyncRequest, message: str, hint: str) -> None:
        request.cancel(RequestTimedOut(message, hint))

    async def completions(self) -> list[Completion]:
        """Wait for all texts.

        Raises:
            RequestError: the first failure.
        """
        done: dict[int, Completion] = {}
        async with aclosing(self.chunks()) as chunks:
            async for index, chunk in chunks:
                if chunk.completion is not None:
                    done[index] = chunk.completion
        return [done[index] for index in range(len(self))]

    async def chunks(self) -> AsyncGenerator[tuple[int, Chunk], None]:
        """The chunks of all texts as they come, each with the index of its text.

        Raises:
            RequestError: the first failure.
        """
        if len(self) == 1:
            async with aclosing(self._chunks(self._requests[0])) as chunks:
                async for chunk in chunks:
                    yield 0, chunk
            return
        queue: asyncio.Queue[tuple[int, Chunk] | BaseException | None] = asyncio.Queue(maxsize=len(self))

        async def forward(index: int, request: AsyncRequest) -> None:
            try:
                async for chunk in self._chunks(request):
                    await queue.put((index, chunk))
                await queue.put(None)
            except McsdError as error:
                await queue.put(error)

        tasks = [asyncio.create_task(forward(index, request)) for index, request in enumerate(self._requests)]
        try:
            left = len(tasks)
            while left:
                item = await queue.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    left -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _chunks(self, request: AsyncRequest) -> AsyncGenerator[Chunk, None]:
        metrics, last, is_first = self._service.metrics, self._began, True
        try:
            async with aclosing(request.__aiter__()) as chunks:
                async for chunk in chunks:
                    self.have_begun = True
                    now = time.monotonic()
                    metrics.observe_chunk(len(chunk.token_ids), now - last, is_first)
                    last, is_first = now, False
                    if (done := chunk.completion) is not None:
                        metrics.observe_end(done.finish_reason, done.stats, now - self._began)
                    yield chunk
        finally:
            if (failed := request.request.error) is not None:
                metrics.observe_failure(failed)
                if isinstance(failed, StepFailed) and failed.__cause__ is not None:
                    log_event("step failed", level="ERROR", **place_of(failed.__cause__))


def prompt_requests(engine: Engine, prompts: list[Any], fields: dict[str, Any], trace: bool = False) -> list[Request]:
    """The requests of several prompts with equal parameters."""
    requests = [request for prompt in prompts for request in engine.requests(prompt, **fields)]
    for request in requests:
        request.trace = trace
    return requests
