"""Serving an application with uvicorn: limits of connections, and draining."""

import asyncio
import os
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from mcsd.errors import StepHung
from mcsd.server.logs import log_event, log_to_stderr
from mcsd.server.options import ListenOptions, ServerOptions, check_exposure

MAX_HEADER_BYTES = 16 << 10
_KEEP_ALIVE_SECONDS = 5
_LAST_ANSWERS_SECONDS = 2.0
"""After a step has hung, for the answers that say so."""


class Served(Protocol):
    """What is behind an application, as far as its listener knows: the attributes of `mcsd.server.service.Service`."""

    options: ServerOptions
    error: BaseException | None
    on_failure: Callable[[], None]

    @property
    def is_busy(self) -> bool:
        """Whether accepted requests have not ended."""

    def drain(self) -> None:
        """Refuse new requests; accepted ones go on."""


def serve(app: Starlette, listen: ListenOptions, announce: Callable[[str], None] = lambda url: None) -> None:
    """Serve an application of `create_app` until SIGTERM or SIGINT, and end accepted requests first.

    Args:
        app: the application; its ``state.service`` is a `Served`.
        listen: where.
        announce: called with the address, once it can be reached.

    Raises:
        InvalidOption: other machines could use the server without a key.
        OSError: the address cannot be used, or a certificate cannot be read.
        McsdError, Exception: loading the engine has failed.
    """
    log_to_stderr()
    server = make_server(app, listen, announce)
    server.run()
    if server.service.error is not None:
        raise server.service.error


def make_server(
    app: Starlette, listen: ListenOptions, announce: Callable[[str], None] = lambda url: None
) -> "DrainingServer":
    """The server that `serve` runs.

    Raises:
        InvalidOption: other machines could use the server without a key.
    """
    service: Served = app.state.service
    check_exposure(service.options, listen)
    config = uvicorn.Config(
        app,
        host=listen.host,
        port=listen.port,
        loop="asyncio",
        http=_protocol(listen),
        ws="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        limit_concurrency=listen.max_connections,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=_KEEP_ALIVE_SECONDS,
        ssl_certfile=listen.tls_cert,
        ssl_keyfile=listen.tls_key,
    )
    return DrainingServer(config, service, listen, announce)


class DrainingServer(uvicorn.Server):
    """A server that lets accepted requests end: meanwhile it says that it drains. A second signal ends it at once."""

    def __init__(
        self, config: uvicorn.Config, service: Served, listen: ListenOptions, announce: Callable[[str], None]
    ) -> None:
        super().__init__(config)
        self.service, self._listen, self._announce = service, listen, announce
        self._drains_until: float | None = None
        service.on_failure = self._fail

    async def startup(self, sockets: Any = None) -> None:
        """Listen."""
        await super().startup(sockets)
        if self.started:
            name, port = self.servers[0].sockets[0].getsockname()[:2]
            scheme = "https" if self.config.is_ssl else "http"
            url = f"{scheme}://{f'[{name}]' if ':' in name else name}:{port}"
            log_event("listening", url=url)
            self._announce(url)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain; the second time, stop."""
        if self._drains_until is not None:
            self.should_exit = self.force_exit = True
        self._drains_until = time.monotonic() + self._listen.drain_seconds
        self.service.drain()

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop; called ten times a second."""
        if self._drains_until is not None and (not self.service.is_busy or time.monotonic() > self._drains_until):
            self.should_exit = True
        return await super().on_tick(counter)

    def _fail(self) -> None:
        self.should_exit = True
        if isinstance(self.service.error, StepHung):
            # The thread of the step may never end, nor the libraries that wait for it.
            end = threading.Timer(_LAST_ANSWERS_SECONDS, os._exit, (1,))
            end.daemon = True
            end.start()


def _protocol(listen: ListenOptions) -> type[H11Protocol]:
    """uvicorn's protocol for HTTP/1.1, which ends connections that neither send a header nor read."""

    class Protocol(H11Protocol):
        _header_timer: asyncio.TimerHandle | None = None
        _write_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self._header_timer = self.loop.call_later(listen.header_seconds, transport.abort)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            waits = self.conn.their_state is h11.IDLE
            if not waits:
                self._cancel_header_timer()
            elif self._header_timer is None:
                self._header_timer = self.loop.call_later(listen.header_seconds, self.transport.abort)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._write_timer = self.loop.call_later(listen.write_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._cancel_write_timer()

        def connection_lost(self, exc: Exception | None) -> None:
            self._cancel_header_timer()
            self._cancel_write_timer()
            super().connection_lost(exc)

        def _cancel_header_timer(self) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None

        def _cancel_write_timer(self) -> None:
            if self._write_timer is not None:
                self._write_timer.cancel()
                self._write_timer = None

    return Protocol
