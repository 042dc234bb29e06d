"""One address for all replicas: an ASGI application that sends every request to one of them.

It has the gateway of the server (host, key, size of the body), and imports no torch. A request whose replica ends
before any part of its answer was sent goes to another replica. A stream that has begun ends with an error event.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from ray.exceptions import ObjectLostError, RayActorError, WorkerCrashedError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Mount
from starlette.types import Message, Receive, Scope, Send

from mcsd.errors import EngineBusy, ReplicaLost, RequestTimedOut
from mcsd.ray.front_metrics import FrontMetrics, merged
from mcsd.ray.routing import running_replicas
from mcsd.server.api_errors import ApiError, api_error
from mcsd.server.gateway import add_gateway
from mcsd.server.logs import log_event, place_of
from mcsd.server.options import ServerOptions
from mcsd.server.page import FILES
from mcsd.server.scope import http_scope
from mcsd.server.streams import error_event

FORWARDED = frozenset(
    {
        *("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models"),
        *("/tokenize", "/detokenize", "/version", "/openapi.json"),
        *FILES,
    }
)
"""The routes that any replica answers."""

TRIES = 3
"""How many replicas may be lost to a request: one that ends the process which reads it must not end all of them."""

BEGINNING = 1024
"""Characters of a request by which it is routed."""

_METRICS_SECONDS = 5.0
_LOST = (RayActorError, ObjectLostError, WorkerCrashedError, ReplicaLost)


@dataclass(frozen=True)
class Call:
    """A request that has passed the gateway. Of its headers it has the type of the body: the key stays in the front."""

    method: str
    path: str
    query: bytes
    content_type: bytes
    body: bytes

    def scope(self) -> Scope:
        """The ASGI scope of the request in a replica."""
        headers = [(b"content-type", self.content_type)]
        return {**http_scope(self.method, self.path, headers, self.query), "state": {"log": {}}}

    def beginning(self) -> str:
        """What the requests of one conversation have in common: it ends with the first message of the user."""
        try:
            given = json.loads(self.body)
        except (ValueError, RecursionError):
            return ""
        if not isinstance(given, dict):
            return ""
        text = given.get("messages") or given.get("input") or given.get("prompt") or ""
        if isinstance(text, list):
            roles = [each.get("role") if isinstance(each, dict) else None for each in text]
            text = text[: roles.index("user") + 1 if "user" in roles else BEGINNING]
        return f"{given.get('instructions') or ''}{text}"[:BEGINNING]


class Front:
    """Sends requests to replicas; for `mcsd.server.listen`, or in an ingress of Ray Serve.

    Args:
        connect: returns the handle of the replicas; called in a thread when the application starts.
        options: of the server.
        name: of this front, in metrics.
        peers: returns the handle of all fronts, if there may be several.

    Attributes:
        options: of the server.
        error: why the replicas could not be started.
        on_failure: called then.
        metrics: of this front.
    """

    def __init__(
        self,
        connect: Callable[[], Any],
        options: ServerOptions,
        name: str = "",
        peers: Callable[[], Any] | None = None,
    ) -> None:
        self.options = options
        self.error: BaseException | None = None
        self.on_failure: Callable[[], None] = lambda: None
        self.metrics = FrontMetrics(lambda: self._replicas, name)
        self._connect, self._peers = connect, peers
        self._handle: Any = None
        self._is_draining = False
        self._running = 0
        self._own = {"/health": self._health, "/ready": self._ready, "/metrics": self._all_metrics}

    def application(self) -> Starlette:
        """The application, with the gateway around it."""
        app = Starlette(routes=[Mount("/", self)], lifespan=self._lifespan)
        app.state.service = self
        add_gateway(app, self.options, self.metrics.observe_answer)
        return app

    @property
    def state(self) -> str:
        """Loading while no replica runs, ready, draining or failed."""
        if self.error is not None:
            return "failed"
        if self._is_draining:
            return "draining"
        return "ready" if self._replicas else "loading"

    @property
    def _replicas(self) -> int:
        return 0 if self._handle is None else running_replicas(self._handle.app_name)

    @property
    def is_busy(self) -> bool:
        """Whether accepted requests have not ended."""
        return self._running > 0

    def drain(self) -> None:
        """Refuse new requests; accepted ones go on."""
        self._is_draining = True
        log_event("draining")

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(self._start())
        try:
            yield
        finally:
            task.cancel()

    async def _start(self) -> None:
        try:
            handle = await asyncio.to_thread(self._connect)
        except Exception as error:
            self.error = error
            log_event("failed", level="ERROR", error=type(error).__name__, message=str(error))
            self.on_failure()
            return
        self._handle = handle.options(stream=True)
        log_event("connected")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request.

        Raises:
            ApiError: it is refused, or has failed before its answer began.
        """
        path, method = scope["path"].removeprefix(scope.get("root_path", "")), scope["method"]
        own = self._own.get(path)
        scope["route"] = SimpleNamespace(path=path if own or path in FORWARDED else "other")
        if own is not None:
            if method not in ("GET", "HEAD"):
                raise ApiError(405, "Method Not Allowed", "method_not_allowed")
            await (await own())(scope, receive, send)
            return
        if self._handle is None or self._is_draining:
            raise ApiError(503, f"the server is {self.state}", self.state, retry=self.state == "loading")
        kind = dict(scope["headers"]).get(b"content-type", b"")
        call = Call(method, path, scope["query_string"], kind, (await receive())["body"])
        log = scope["state"]["log"]
        self._running += 1
        try:
            await _unless_gone(receive, _Forwarding(self, call, send, log).run(), log)
        finally:
            self._running -= 1

    async def _health(self) -> Response:
        failed = self.error is not None
        return JSONResponse({"status": "failed" if failed else "ok"}, 503 if failed else 200)

    async def _ready(self) -> Response:
        state = self.state
        return JSONResponse({"status": state, "replicas": self._replicas}, 200 if state == "ready" else 503)

    async def _all_metrics(self) -> Response:
        handles = [] if self._handle is None else [self._handle]
        handles += [] if self._peers is None else [self._peers()]
        asked = [
            handle.broadcast("metrics").results_async(timeout_s=_METRICS_SECONDS, return_exceptions=True)
            for handle in handles
        ]
        # A process that does not answer in time takes the metrics of its deployment with it, and nothing else.
        answers = await asyncio.gather(*asked, return_exceptions=True)
        results = [each for some in answers if isinstance(some, list) for each in some]
        texts = [each for each in results if isinstance(each, bytes)]
        if self._peers is None:
            texts.append(self.metrics.text())
        return Response(await asyncio.to_thread(merged, texts), media_type=CONTENT_TYPE_LATEST)

    def ask(self, call: Call, avoid: list[str]) -> Any:
        """The answer of a replica, as `mcsd.ray.replica.Replica.answer` yields it."""
        return self._handle.answer.remote(call, beginning=call.beginning(), avoid=avoid)


class _Forwarding:
    """One request on its way, and how much of its answer was sent."""

    def __init__(self, front: Front, call: Call, send: Send, log: dict[str, Any]) -> None:
        self._front, self._call, self._send, self._log = front, call, send, log
        self._start: Message | None = None
        self._has_begun = self._is_complete = False
        self._replica = ""

    async def run(self) -> None:
        """Send the request to a replica, and to another one if that ends before its answer has begun.

        Raises:
            ApiError: it has failed before its answer began.
        """
        error = await self._result()
        if error is None or self._is_complete:
            return
        if not self._has_begun:
            raise error
        self._log["code"] = error.code
        await self._send({"type": "http.response.body", "body": error_event(error).encode()})

    async def _result(self) -> ApiError | None:
        lost: list[str] = []
        while len(lost) < TRIES and not self._has_begun:
            try:
                await self._ask(lost)
                return None
            except _LOST:
                lost.append(self._replica)
                self._log["lost"] = lost
                if not self._is_complete:
                    self._front.metrics.observe_loss(self._has_begun)
            except TimeoutError:
                seconds = self._front.options.max_wait_seconds
                return api_error(RequestTimedOut(f"no replica was free for {seconds:g} s", "try again later"))
            except BackPressureError:
                return api_error(EngineBusy("too many requests wait for a replica", "try again later"))
            except DeploymentUnavailableError:
                return ApiError(503, "no replica can be started", "failed")
            except Exception as error:
                self._log |= place_of(error)
                return ApiError(500, "an internal error", "internal_error")
        return api_error(ReplicaLost("the replica that answered has ended", "send the request again"))

    async def _ask(self, avoid: list[str]) -> None:
        self._start, self._replica = None, ""
        parts, has_ended = self._front.ask(self._call, avoid), False
        try:
            async with asyncio.timeout(self._front.options.max_wait_seconds):
                self._replica = self._log["replica"] = await anext(parts)
            async for part in parts:
                if isinstance(part, dict):
                    self._log |= part
                    continue
                for message in part:
                    await self._pass_on(message)
            has_ended = True
        finally:
            if not has_ended:
                parts.cancel()

    async def _pass_on(self, message: Message) -> None:
        """Send a message; the status waits for the first part of the body, so that until then the request may move."""
        if message["type"] == "http.response.start":
            self._start = message
            return
        if not self._has_begun and self._start is not None:
            self._has_begun = True
            await self._send(self._start)
        self._is_complete = not message.get("more_body", False)
        await self._send(message)


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, None], log: dict[str, Any]) -> None:
    """Do some work, which is cancelled when the client goes away."""

    async def disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
        else:
            log["code"] = "client_closed_request"
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
