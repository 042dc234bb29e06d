"""One engine behind a front: an actor that answers requests which have passed the gateway."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import TYPE_CHECKING, Any

from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import Message

from mcsd.config import EngineOptions
from mcsd.errors import ReplicaLost
from mcsd.ray.front import Call
from mcsd.server.api_errors import ApiError
from mcsd.server.logs import log_event, log_to_stderr, place_of
from mcsd.server.options import ServerOptions

if TYPE_CHECKING:
    from mcsd.engine import Engine


def load_engine(options: EngineOptions) -> "Engine":
    """Load an engine and calibrate it."""
    from mcsd.engine import Engine

    engine = Engine.from_options(options)
    engine.calibrate()
    return engine


class Replica:
    """A deployment of Ray Serve: an engine, and the routes of the server.

    The process that starts replicas imports this class, and no torch.

    Args:
        load: loads the engine.
        options: of the server.
    """

    async def __init__(  # type: ignore[misc]  # Ray awaits it.
        self, load: "Callable[[], Engine]", options: ServerOptions
    ) -> None:
        from mcsd.server.app import create_routes
        from mcsd.server.service import Service

        log_to_stderr()
        self._name: str = serve.get_replica_context().replica_id.unique_id
        self._service = Service(await asyncio.to_thread(load), options, name=self._name)
        self._service.start()
        self._routes = create_routes(self._service)
        self._routes.add_exception_handler(Exception, _internal_error)

    def check_health(self) -> None:
        """Called by Ray, which replaces a replica that fails.

        Raises:
            ReplicaLost: a step hangs.
        """
        if self._service.state == "failed":
            raise self._lost()

    def _lost(self) -> ReplicaLost:
        return ReplicaLost(f"the engine of replica {self._name} has failed", "see its log")

    async def metrics(self) -> bytes:
        """The metrics of this replica in Prometheus' format."""
        return self._service.metrics.text()

    async def answer(self, call: Call, beginning: str, avoid: list[str]) -> AsyncGenerator[Any, None]:
        """Answer a request. Closing the iterator cancels its texts.

        Args:
            call: the request.
            beginning, avoid: for the router.

        Yields:
            The name of this replica; lists of ASGI messages as they come; and the fields of the request's log line.

        Raises:
            ReplicaLost: the engine has failed before the answer began.
            Exception: another failure after it began.
        """
        yield self._name
        scope, messages = call.scope(), asyncio.Queue[Message | None]()
        body: list[Message] = [{"type": "http.request", "body": call.body, "more_body": False}]

        async def receive() -> Message:
            # When the client goes away this iterator is closed.
            return body.pop() if body else await asyncio.Future()

        work = asyncio.ensure_future(self._routes(scope, receive, messages.put))
        work.add_done_callback(lambda _: messages.put_nowait(None))
        has_begun, is_complete, is_done = False, False, False
        try:
            while not is_done:
                batch = [await messages.get()]
                while not messages.empty():
                    batch.append(messages.get_nowait())
                if not has_begun and self._service.state == "failed":
                    raise self._lost()
                is_done = batch[-1] is None
                parts = [message for message in batch if message is not None]
                bodies = [message for message in parts if message["type"] == "http.response.body"]
                has_begun = has_begun or bool(bodies)
                is_complete = is_complete or any(not message.get("more_body", False) for message in bodies)
                if parts:
                    yield parts
            if (error := work.exception()) is not None:
                log_event("request failed", level="ERROR", **place_of(error))
                if not is_complete:
                    raise error
            yield scope["state"]["log"]
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)


async def _internal_error(request: Request, error: Exception) -> JSONResponse:
    failed = ApiError(500, "an internal error", "internal_error")
    request.scope["state"]["log"]["code"] = failed.code
    return JSONResponse(failed.body, failed.status)
