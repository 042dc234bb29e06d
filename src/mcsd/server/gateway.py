"""What every HTTP request passes before its route: host, key, size and time of the body; and a log line after it.

A route that is not in `OPEN_ROUTES` needs the key, also one that is added later.
"""

import asyncio
import hmac
import json
import re
import secrets
import time
from collections.abc import Callable
from typing import Any

from starlette.applications import Starlette
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mcsd.server.api_errors import ApiError
from mcsd.server.logs import log_event
from mcsd.server.options import ServerOptions, is_address
from mcsd.server.page import FILES

_SUPERVISION = frozenset({"/health", "/ready"})

OPEN_ROUTES = _SUPERVISION | FILES.keys()
"""Routes that need no key: whether the server works, for what supervises it; and the files of the playground."""

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_PORT = re.compile(r":[0-9]{1,5}")


def add_gateway(app: Starlette, options: ServerOptions, observe: Callable[[str, int], None]) -> None:
    """Put the gateway around the routes of an application, and around it what browsers ask before they send the key.

    Args:
        app: the routes.
        options: of the server.
        observe: called with the route and the status of every answer.
    """
    app.add_middleware(Gateway, options=options, observe=observe)
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type"],
        )


class Gateway:
    """ASGI middleware around all routes; see `add_gateway`."""

    def __init__(self, app: ASGIApp, options: ServerOptions, observe: Callable[[str, int], None]) -> None:
        self._app = app
        self._options = options
        self.observe = observe
        self._key = None if options.api_key is None else options.api_key.encode()
        self._hosts = {"localhost", *(name.lower() for name in options.allowed_hosts or ())}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a connection."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        await _Exchange(self, scope, send).run(receive)

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check a request, and pass it on with its body.

        Raises:
            ApiError: it is refused.
        """
        headers: dict[bytes, bytes] = {}
        for name, value in scope["headers"]:
            if name in (b"host", b"authorization", b"content-length") and name in headers:
                raise ApiError(400, f"the header {name.decode()} is given twice", "invalid_header")
            headers[name] = value
        self._check_host(headers.get(b"host", b"").decode("latin-1"))
        if scope["path"] not in OPEN_ROUTES:
            self._check_key(headers.get(b"authorization", b""))
        await self._app(scope, await self._body(headers.get(b"content-length", b"0"), receive), send)

    def _check_host(self, host: str) -> None:
        name, port = host.lower(), ""
        if not name.endswith("]"):
            name, colon, port = name.rpartition(":") if ":" in name else (name, "", "")
            port = colon + port
        if (not port or _PORT.fullmatch(port)) and (
            name in self._hosts or is_address(name.removeprefix("[").removesuffix("]"))
        ):
            return
        raise ApiError(400, f"host {host!r:.80} is not allowed (see --allowed-host)", "invalid_host")

    def _check_key(self, given: bytes) -> None:
        if self._key is None:
            return
        kind, _, key = given.partition(b" ")
        # In constant time, also for a key of another length.
        same = hmac.compare_digest(key.strip(), self._key)
        if not same or kind.lower() != b"bearer":
            raise ApiError(401, "a valid key is needed: Authorization: Bearer KEY", "invalid_api_key")

    async def _body(self, length: bytes, receive: Receive) -> Receive:
        """Read the body, and return a `receive` that gives it again."""
        most = self._options.max_body_bytes
        if not length.isdigit() or len(length) > 18 or int(length) > most:
            raise _too_large(most)
        body = bytearray()
        try:
            async with asyncio.timeout(self._options.body_seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Disconnected
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise _too_large(most)
                    more = message.get("more_body", False)
        except TimeoutError as error:
            raise ApiError(408, "the body did not arrive in time", "body_timeout") from error
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def again() -> Message:
            return whole.pop() if whole else await receive()

        return again


class _Exchange:
    """One request and its answer."""

    def __init__(self, gateway: Gateway, scope: Scope, send: Send) -> None:
        self._gateway, self._scope, self._send = gateway, scope, send
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        self._id = given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        self._status = 0
        self._began = time.monotonic()
        self._fields: dict[str, Any] = {}
        scope.setdefault("state", {})["log"] = self._fields

    async def run(self, receive: Receive) -> None:
        """Handle the request; answer and log its failure."""
        try:
            await self._gateway.handle(self._scope, receive, self.send)
        except ApiError as error:
            await self._refuse(error)
        except _Disconnected:
            pass
        except Exception as error:
            self._fields["error"] = type(error).__name__
            if self._status:
                raise
            await self._refuse(ApiError(500, "an internal error", "internal_error"))
        finally:
            self._log()

    async def send(self, message: Message) -> None:
        """Send a part of the answer."""
        if message["type"] == "http.response.start":
            self._status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self._id.encode())]
        await self._send(message)

    async def _refuse(self, error: ApiError) -> None:
        body = json.dumps(error.body).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
        # What is left of the body is not read.
        headers |= {"connection": "close"} if error.status in (408, 413) else {}
        listed = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        self._fields["code"] = error.code
        await self.send({"type": "http.response.start", "status": error.status, "headers": listed})
        await self.send({"type": "http.response.body", "body": body})

    def _log(self) -> None:
        route = getattr(self._scope.get("route"), "path", "other")
        self._gateway.observe(route, self._status)
        if route in _SUPERVISION:
            return  # Whoever supervises the server asks every few seconds.
        log_event(
            "request",
            id=self._id,
            method=self._scope["method"],
            route=route,
            status=self._status,
            seconds=round(time.monotonic() - self._began, 4),
            **self._fields,
        )


class _Disconnected(Exception):
    """The client is gone before its request was complete."""


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes", "body_too_large")
