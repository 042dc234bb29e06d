"""A thread that steps an engine while it has requests, and hands out what they emit. Every request has an end."""

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from threading import Condition, Thread, current_thread
from typing import NamedTuple

from mcsd.errors import EngineBusy, EngineClosed, McsdError, RequestInterrupted
from mcsd.request import Request
from mcsd.request_queue import RequestQueue
from mcsd.results import Chunk

Listener = Callable[[list[Chunk], bool], None]
"""Called by the thread with new chunks, and whether the request has ended. Must not wait."""


class EngineStatus(NamedTuple):
    """The state of an engine that serves requests.

    Attributes:
        running: requests in the batch.
        waiting: requests that wait for a place in it.
        error: of the last step; None if it succeeded. If it stays, the model or its device is broken.
        closed: whether new requests are refused.
    """

    running: int
    waiting: int
    error: BaseException | None
    closed: bool


class SteppingThread:
    """Steps an engine for requests of any threads. The thread starts with the first of them.

    Args:
        engine: others may use it too.
        max_batch: requests that it runs together.
        max_waiting: requests that wait, at most; more are refused.

    Attributes:
        leaked: sequences that were still in use when no request was left, and have been freed.
    """

    def __init__(self, engine: RequestQueue, max_batch: int, max_waiting: int) -> None:
        self._engine = engine
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._changed = Condition()
        self._live: dict[Request, Listener] = {}
        self._thread: Thread | None = None
        self._accepts = True
        self._stopped = False
        self._error: BaseException | None = None
        self.leaked = 0
        self._step_began: float | None = None

    @property
    def step_seconds(self) -> float:
        """How long the step that runs now has taken so far; 0 between steps."""
        began = self._step_began
        return 0.0 if began is None else time.monotonic() - began

    @property
    def status(self) -> EngineStatus:
        """The state now."""
        live = len(self._live)
        running = min(live, self._max_batch)
        return EngineStatus(running, live - running, self._error, not self._accepts)

    def check_space(self, count: int) -> None:
        """Check that some more requests are accepted.

        Raises:
            EngineBusy: too many are waiting.
            EngineClosed: none is accepted any more.
        """
        if not self._accepts:
            raise EngineClosed("the engine was closed", "make a new AsyncEngine")
        waiting = max(len(self._live) - self._max_batch, 0)
        if len(self._live) + count > self._max_batch + self._max_waiting:
            raise EngineBusy(
                f"{waiting} requests are waiting: {count} more exceed max_waiting={self._max_waiting}",
                "try again later, or raise max_waiting",
            )

    def submit(self, requests: Sequence[tuple[Request, Listener]]) -> None:
        """Queue requests: all, or none if `check_space` refuses them."""
        with self._changed:
            self.check_space(len(requests))
            self._live.update(requests)
            for request, _ in requests:
                self._engine.submit(request)
            if self._thread is None:
                self._thread = Thread(target=self._run, name="mcsd-steps", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def close(self, seconds: float = 0.0) -> None:
        """Accept no more requests, give those that there are some time, end the others, and end the thread."""
        with self._changed:
            self._accepts = False
            self._changed.wait_for(lambda: not self._live, seconds)
            self._stopped = True
            self._changed.notify_all()
        if self._thread is not None and self._thread is not current_thread():
            self._thread.join()

    def abandon(self, error: McsdError) -> None:
        """Accept no more requests and end all others with an error, while a step never ends. The thread is left."""
        with self._changed:
            self._accepts, self._stopped = False, True
            live, self._live = self._live, {}
            self._thread = None  # Nobody waits for its end.
            self._changed.notify_all()
        for request, listener in live.items():
            self._engine.cancel(request, error)
            with suppress(RuntimeError):  # The event loop of its reader has ended.
                listener([], True)

    def _run(self) -> None:
        while self._wait():
            try:
                self._step_began = time.monotonic()
                self._engine.step()
                self._error = None
            except BaseException as error:
                self._error = error
                if not any(request.done for request in list(self._live)):
                    # None was running. Those that wait would meet the same error for ever.
                    self._end_all("the engine cannot step", error)
            self._step_began = None
            self._deliver()
            if not self._live:
                self._free_leaked()
        self._end_all("the engine was closed")
        self._deliver()

    def _free_leaked(self) -> None:
        try:
            self.leaked += self._engine.free_leaked()
        except Exception as error:  # Of a drafter. The thread goes on.
            self._error = error

    def _wait(self) -> bool:
        """Wait for requests; false once the thread must end."""
        with self._changed:
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._live or self._stopped)
            return not self._stopped

    def _end_all(self, message: str, cause: BaseException | None = None) -> None:
        for request in list(self._live):
            error = RequestInterrupted(message, "submit the request again")
            error.__cause__ = cause
            self._engine.cancel(request, error)

    def _deliver(self) -> None:
        for request, listener in list(self._live.items()):
            # In this order: a request that has ended has all its chunks.
            ended = request.done
            chunks = []
            while request.has_chunk:
                chunks.append(request.chunks.popleft())
            if ended:
                with self._changed:
                    self._live.pop(request, None)  # `abandon` may have taken it.
            if chunks or ended:
                try:
                    listener(chunks, ended)
                except RuntimeError:
                    # The event loop of its reader has ended.
                    self._engine.cancel(request)
