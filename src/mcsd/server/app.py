"""The application: routes, and what answers their errors. It has no globals."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import cache
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic_core import from_json
from starlette.exceptions import HTTPException as StarletteHTTPException

import mcsd
from mcsd.async_engine import AsyncEngine
from mcsd.engine import Engine
from mcsd.errors import McsdError
from mcsd.server.answers import TokenWriter
from mcsd.server.api_errors import ApiError, api_error, validation_error
from mcsd.server.chat import chat
from mcsd.server.completions import complete
from mcsd.server.gateway import add_gateway
from mcsd.server.options import ServerOptions
from mcsd.server.page import add_page
from mcsd.server.parameters import chat_messages, speculation
from mcsd.server.responses import respond
from mcsd.server.schema import ChatRequest, CompletionRequest, DetokenizeRequest, ResponsesRequest, TokenizeRequest
from mcsd.server.service import Service


def create_app(engine: Engine | AsyncEngine | Callable[[], Engine], **options: Any) -> FastAPI:
    """A server for one engine, as an ASGI application: for uvicorn, or as a part of another application.

    Args:
        engine: that generates; or a function that loads one, which is called when the application starts, while
            ``/ready`` says "loading". An `AsyncEngine` stays open when the application ends.
        options: fields of `mcsd.server.ServerOptions`. Without ``api_key`` whoever reaches the server may use it.

    Raises:
        InvalidOption: an unknown option, or a value outside its range.
    """
    service = Service(engine, ServerOptions.of(options))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        try:
            yield
        finally:
            await service.stop()

    app = create_routes(service, lifespan)
    add_gateway(app, service.options, service.metrics.observe_answer)
    return app


def create_routes(
    service: Service, lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None
) -> FastAPI:
    """The routes of a service, without the gateway: for callers that a gateway lets in."""
    app = FastAPI(
        title="mcsd", version=mcsd.__version__, lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.state.service = service
    app.router.route_class = _StrictRoute
    _add_routes(app, service)
    if service.options.playground:
        add_page(app)
    app.add_exception_handler(ApiError, _answer)
    app.add_exception_handler(McsdError, _answer)
    app.add_exception_handler(RequestValidationError, _answer)
    app.add_exception_handler(StarletteHTTPException, _answer)
    return app


def _add_routes(app: FastAPI, service: Service) -> None:
    @cache
    def writer() -> TokenWriter:
        return TokenWriter(service.engine)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await chat(service, body, request, writer())

    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await complete(service, body, request, writer())

    @app.post("/v1/responses")
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        return await respond(service, body, request)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        engine = service.engine
        one: dict[str, Any] = {"id": service.model, "object": "model", "created": 0, "owned_by": "mcsd"}
        one |= {"max_model_len": engine.max_length, "speculative": speculation(engine)}
        return {"object": "list", "data": [one]}

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        engine = service.engine
        service.check_size(body.model, 1)
        tokens = await asyncio.to_thread(_tokens, engine, body)
        return {"tokens": tokens, "count": len(tokens), "max_model_len": engine.max_length}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        engine = service.engine
        service.check_size(body.model, 1)
        return {"prompt": await asyncio.to_thread(_text, engine, body.tokens)}

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": mcsd.__version__}

    @app.get("/health")
    async def health() -> Response:
        failed = service.state == "failed"
        return JSONResponse({"status": "failed" if failed else "ok"}, 503 if failed else 200)

    @app.get("/ready")
    async def ready() -> Response:
        return JSONResponse({"status": service.state}, 200 if service.state == "ready" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _tokens(engine: Engine, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise ApiError(400, "give prompt or messages", "invalid_value", "prompt")
    if body.messages is not None:
        return engine.chat_tokens(chat_messages(body.messages))
    if engine.tokenizer is None:
        raise ApiError(400, "the engine has no tokenizer", "unsupported_parameter", "prompt")
    return list(engine.tokenizer(body.prompt, add_special_tokens=body.add_special_tokens)["input_ids"])


def _text(engine: Engine, tokens: list[int]) -> str:
    if engine.tokenizer is None:
        raise ApiError(400, "the engine has no tokenizer", "unsupported_parameter", "tokens")
    if (largest := max(tokens, default=0)) >= engine.target.vocab_size:
        raise ApiError(400, f"token id {largest} is outside the vocabulary", "invalid_value", "tokens")
    return str(engine.tokenizer.decode(tokens))


class _StrictRequest(Request):
    """A request whose JSON has no NaN, no invalid Unicode, and a bounded depth."""

    async def json(self) -> Any:
        """The body."""
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            raise HTTPException(400, f"the body is not JSON: {error!s:.200}") from error


class _StrictRoute(APIRoute):
    """A route that reads bodies with `_StrictRequest`."""

    def get_route_handler(self) -> Callable[[Request], Any]:
        """The handler of the route."""
        handle = super().get_route_handler()

        async def strict(request: Request) -> Response:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if request.method == "POST" and kind != "application/json":
                # A web page of another origin can send other types without asking.
                raise ApiError(415, "Content-Type must be application/json", _CODES[415])
            return await handle(_StrictRequest(request.scope, request.receive))

        return strict


async def _answer(request: Request, error: Exception) -> Response:
    """The answer to any error that is not a fault of the server's code."""
    if isinstance(error, McsdError):
        error = api_error(error)
    elif isinstance(error, RequestValidationError):
        error = validation_error(error)
    elif isinstance(error, StarletteHTTPException):
        error = ApiError(error.status_code, str(error.detail), _CODES.get(error.status_code))
    assert isinstance(error, ApiError)
    request.scope["state"]["log"]["code"] = error.code
    return JSONResponse(error.body, error.status, error.headers)


_CODES = {400: "invalid_body", 404: "not_found", 405: "method_not_allowed", 415: "unsupported_media_type"}
